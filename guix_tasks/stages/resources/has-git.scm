;; Fails if the program git is missing that this Guix runs:  has-git.scm

(use-modules (guix config))

(exit (if (absolute-file-name? %git)
          (file-exists? %git)
          (->bool (search-path (parse-path (getenv "PATH")) %git))))
