;; Prints what SQLite's integrity check of a database reports:  check-store.scm DATABASE

(use-modules (ice-9 match))

(primitive-load (string-append (dirname (car (command-line))) "/database.scm"))

(match (command-line)
  ((_ file)
   (match (query (open-database file) "pragma integrity_check(1)")
     ((#(text)) (format #t "~a~%" text)))))
