;; Guix's database, for the scripts of the warm store, which load this file.

(use-modules (sqlite3))

(define image-database "/var/guix/db/db.sqlite")

(define (open-database file)
  "Open the database FILE.  Guix's daemon locks it while it closes it."
  (let ((db (sqlite-open file)))
    (sqlite-exec db "pragma busy_timeout = 60000")
    db))

(define (query db text)
  "Return the rows of the SQL query TEXT as vectors."
  (let* ((statement (sqlite-prepare db text))
         (rows      (sqlite-map identity statement)))
    (sqlite-finalize statement)
    rows))

(define (definitions db schema)
  "Return the SQL statements that created the tables, indexes and triggers of SCHEMA."
  (map (lambda (row) (vector-ref row 0))
       (query db (string-append "select sql from " schema ".sqlite_master where sql is not null "
                                "and name not like 'sqlite_%' "
                                "order by type = 'table' desc, name"))))
