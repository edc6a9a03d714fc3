;;; A 'guix' channel that is small enough to be pulled in seconds and without a network.
;;;
;;; "guix pull" asks this file for the derivation of the new Guix.  The real channel compiles
;;; all of Guix there.  This one makes a launcher, and two links to what Debian's package has
;;; compiled already:
;;;
;;; - outside of a build, the launcher runs Debian's Guix modules where they are;
;;; - inside a build, /usr is absent.  There (profile hooks and the like start "guix repl") it
;;;   runs a copy of the core modules, which is in the store.

(use-modules (guix gexp)
             (guix packages)
             (guix store)
             (guix utils)
             (ice-9 match)
             (srfi srfi-26))

(define %libraries
  ;; Debian's folder for libraries, as /usr/lib/x86_64-linux-gnu.
  (string-append "/usr/lib/" (%current-system) "-gnu"))

(define %modules "/usr/share/guile/site/3.0")
(define %compiled (string-append %libraries "/guile/3.0/site-ccache"))

(define (core? root)
  "Return a predicate for the files below ROOT that Guix cannot do without: no packages, and
few of the commands and build systems."
  (define (among names base)
    (->bool (member (basename (basename base ".scm") ".go") names)))

  (lambda (file stat)
    (match (string-split (string-drop file (+ 1 (string-length root))) #\/)
      (("gnu")                              #t)
      (("gnu" name)                         (among '("packages") name))
      (("gnu" _ ...)                        #f)
      (("guix" (or "import" "tests") _ ...) #f)
      (("guix" "scripts" name)              (among '("repl") name))
      (("guix" "build-system" name)         (among '("trivial" "gnu" "copy") name))
      (_                                    #t))))

(define (core root name)
  (local-file root name #:recursive? #t #:select? (core? root)))

(define loaded-libraries
  ;; What Guile's bindings open while they run, for the launcher inside a build.
  (file-union "guix-libraries"
              (map (lambda (name)
                     (list name
                           (local-file (canonicalize-path
                                        (string-append %libraries "/" name))
                                       name)))
                   '("libgcrypt.so.20" "libgpg-error.so.0" "libz.so.1"))))

(define (launcher modules compiled)
  "Return the 'guix' command, as a script; MODULES and COMPILED are for its use inside a build."
  (define program
    #~(let ((debian #$(string-append %libraries "/guix/guile"))
            (launched? (getenv "GUIX_LAUNCHED")))
        (when (and (not launched?) (file-exists? debian))
          ;; Debian's Guile, whose libraries are those of Debian's Guix modules.
          (for-each unsetenv
                    '("GUILE_SYSTEM_PATH" "GUILE_SYSTEM_COMPILED_PATH"
                      "GUILE_SYSTEM_EXTENSIONS_PATH" "LOCPATH" "GCONV_PATH"))
          (setenv "GUIX_LAUNCHED" "1")
          (apply execl debian debian "--no-auto-compile" "-s" (command-line)))
        (unsetenv "GUIX_LAUNCHED")
        (set! %load-path
              (cons (if launched? #$%modules #$modules) %load-path))
        (set! %load-compiled-path
              (cons (if launched? #$%compiled #$compiled) %load-compiled-path))
        (unless launched?
          (setenv "GUILE_EXTENSIONS_PATH" #$loaded-libraries)
          ;; A cache of the packages that are here, which are none, would hide all others.
          (module-remove! (resolve-interface '(gnu packages)) 'generate-package-cache))
        (apply (module-ref (resolve-interface '(guix ui)) 'guix-main)
               (command-line))))

  (computed-file
   "guix-command"
   #~(begin
       (call-with-output-file #$output
         (lambda (port)
           (format port "#!~a/bin/guile --no-auto-compile~%!#~%~s~%"
                   #$(default-guile) '#$program)))
       (chmod #$output #o555))))

(define* (build source #:key version #:allow-other-keys)
  (let* ((modules (core %modules "guix-modules"))
         (compiled (core %compiled "guix-compiled")))
    (gexp->derivation
     (string-append "guix-" (string-take version 9))
     #~(let ((make (lambda (link target)
                     (let ((file (string-append #$output "/" link)))
                       (let loop ((folder (dirname file)))
                         (unless (file-exists? folder)
                           (loop (dirname folder))
                           (mkdir folder)))
                       (symlink target file)))))
         (make "bin/guix" #$(launcher modules compiled))
         (make "share/guile/site/3.0" #$modules)
         (make "lib/guile/3.0/site-ccache" #$compiled)))))

;; The value of this file is the procedure.
build
