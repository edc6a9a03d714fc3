;; Prints what SQLite's integrity check of a database reports:  check-store.scm DATABASE

(use-modules (sqlite3) (ice-9 match))

(match (command-line)
  ((_ database)
   (let* ((db        (sqlite-open database SQLITE_OPEN_READWRITE))
          (statement (begin (sqlite-exec db "pragma busy_timeout = 60000")
                            (sqlite-prepare db "pragma integrity_check(1)"))))
     (format #t "~a~%" (vector-ref (sqlite-step statement) 0)))))
