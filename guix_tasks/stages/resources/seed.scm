;; Compares the database of this container's image with that of the store volume:
;;   seed.scm VOLUME missing     prints the names of the items that the volume lacks
;;   seed.scm VOLUME register    adds them to the volume's database

(use-modules (sqlite3) (ice-9 match))

(primitive-load (string-append (dirname (car (command-line))) "/database.scm"))

(define missing
  "from image.ValidPaths where path not in (select path from main.ValidPaths)")

(define (create-tables db)
  (sqlite-exec db "begin")
  (for-each (lambda (text) (sqlite-exec db text)) (definitions db "image"))
  (sqlite-exec db "commit"))

(define (register db)
  (sqlite-exec db "begin")
  (sqlite-exec db (string-append "create temp table added as select path " missing))
  (sqlite-exec db "insert into main.ValidPaths (path, hash, registrationTime, deriver, narSize)
    select path, hash, registrationTime, deriver, narSize from image.ValidPaths
    where path in (select path from added)")
  (sqlite-exec db "insert or ignore into main.Refs
    select new.id, newer.id from image.Refs as old
    join image.ValidPaths as referrer on referrer.id = old.referrer
    join image.ValidPaths as reference on reference.id = old.reference
    join main.ValidPaths as new on new.path = referrer.path
    join main.ValidPaths as newer on newer.path = reference.path
    where referrer.path in (select path from added)")
  (sqlite-exec db "insert or ignore into main.DerivationOutputs
    select new.id, old.id, old.path from image.DerivationOutputs as old
    join image.ValidPaths as drv on drv.id = old.drv
    join main.ValidPaths as new on new.path = drv.path
    where drv.path in (select path from added)")
  (sqlite-exec db "commit"))

(match (command-line)
  ((_ volume command)
   (let* ((directory (string-append volume "/guix-tasks/db"))
          (file      (string-append directory "/db.sqlite"))
          (schema    (string-append directory "/schema"))
          (is-new?   (not (file-exists? schema)))
          (db        (open-database file)))
     (sqlite-exec db (string-append "attach database '" image-database "' as image"))
     (when is-new?
       (when (null? (query db "select 1 from main.sqlite_master where name = 'ValidPaths'"))
         (create-tables db))
       (copy-file "/var/guix/db/schema" schema))
     (match command
       ("missing"
        (for-each (match-lambda (#(path) (format #t "~a~%" (basename path))))
                  (query db (string-append "select path " missing))))
       ("register"
        (register db)))
     (sqlite-close db))))
