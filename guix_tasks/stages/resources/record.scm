;; Records in the store volume what the roots of this container need:  record.scm RESULT [PROFILE]
;;
;; With PROFILE, what building such a profile takes gets roots: the next stage, also one on another
;; machine, would fetch or build all of it again.
;;
;; RESULT is a directory next to earlier results.  It gets the file `items`, the names of the store
;; items in order; the file `size`, the bytes of those that the base image does not have, and the
;; bytes of items on the volume that no result has; and `db/`, the database that an image with
;; exactly these items has.  The same items give the same database.
;;
;; The exit status is 113 if a root is not in the store volume's database.
;;
;; The database of the container's image is at its usual place, that of the store volume is the
;; one of the daemon.  An image's own items have the registration time 1.  Every other item in
;; the image's database is one of its base, and stays, because deleting it frees nothing.

(use-modules (guix build utils) (guix config) (guix store) (sqlite3)
             (ice-9 ftw) (ice-9 match) (ice-9 rdelim) (srfi srfi-1) (srfi srfi-26))

(primitive-load (string-append (dirname (car (command-line))) "/database.scm"))
(primitive-load (string-append (dirname (car (command-line))) "/profile-tools.scm"))

(define tools-directory "/var/guix/gcroots/guix-tasks")
(define root-directories '("/var/guix/profiles" "/var/guix/gcroots"))

(define (symbolic-links directory)
  "Return the symbolic links below DIRECTORY."
  (define (add-link file stat result)
    (if (eq? 'symlink (stat:type stat)) (cons file result) result))
  (define (keep file stat result) result)
  (define (skip file stat errno result) result)
  (file-system-fold (const #t) add-link keep keep keep skip '() directory lstat))

(define (root-item link)
  "Return the store item that LINK refers to, or #f."
  (let ((file (false-if-exception (canonicalize-path link))))
    (and file
         (store-path? (or (false-if-exception (direct-store-path file)) ""))
         (direct-store-path file))))

(define (add-roots items)
  (mkdir-p tools-directory)
  (for-each (lambda (item)
              (let ((link (string-append tools-directory "/" (basename item))))
                (unless (false-if-exception (lstat link))
                  (symlink item link))))
            items))

(define (quoted text)
  (string-append "'" (string-join (string-split text #\') "''") "'"))

(define (create-tables db)
  "Create the tables of the database `main` in the database `result`."
  (for-each
   (lambda (text)
     ;; CREATE KIND NAME ... -> CREATE KIND result.NAME ...
     (match (string-split text #\space)
       ((create kind name . rest)
        (sqlite-exec db (string-join (cons* create kind (string-append "result." name) rest))))))
   (definitions db "main")))

(define (write-database db directory roots)
  "Write the database of the closure of ROOTS to DIRECTORY."
  (sqlite-exec db "create temp table wanted (path text primary key)")
  (for-each (lambda (root)
              (sqlite-exec db (string-append "insert into wanted values (" (quoted root) ")")))
            roots)
  (match (query db "select path from wanted where path not in (select path from main.ValidPaths)")
    (() #t)
    ((#(path) . _)
     (format (current-error-port) "error: the store item ~a is not valid~%" path)
     (exit 113)))
  (if (file-exists? image-database)
      (sqlite-exec db (string-append "attach database " (quoted image-database) " as image"))
      (begin
        (sqlite-exec db "attach database ':memory:' as image")
        (sqlite-exec db "create table image.ValidPaths (id, path, hash, registrationTime, deriver, narSize)")
        (sqlite-exec db "create table image.Refs (referrer, reference)")
        (sqlite-exec db "create table image.DerivationOutputs (drv, id, path)")))
  (sqlite-exec db (string-append "attach database " (quoted (string-append directory "/db.sqlite"))
                             " as result"))
  (sqlite-exec db "begin")
  (create-tables db)
  (sqlite-exec db "create temp table closure as
    with recursive needed(id) as (
      select id from main.ValidPaths where path in (select path from wanted)
      union
      select reference from main.Refs join needed on referrer = needed.id)
    select path from main.ValidPaths where id in (select id from needed)")
  (sqlite-exec db "create temp table row as
    select path, hash, registrationTime, deriver, narSize from image.ValidPaths
      where registrationTime <> 1
    union all
    select path, hash, 1, deriver, narSize from main.ValidPaths
      where path in (select path from closure)
      and path not in (select path from image.ValidPaths where registrationTime <> 1)")
  (sqlite-exec db "insert into result.ValidPaths (path, hash, registrationTime, deriver, narSize)
    select * from row order by path")
  (for-each
   (lambda (source)
     (sqlite-exec db (string-append "insert or ignore into result.Refs
        select new.id, newer.id
        from " source ".Refs as old
        join " source ".ValidPaths as referrer on referrer.id = old.referrer
        join " source ".ValidPaths as reference on reference.id = old.reference
        join result.ValidPaths as new on new.path = referrer.path
        join result.ValidPaths as newer on newer.path = reference.path
        order by new.id, newer.id"))
     (sqlite-exec db (string-append "insert or ignore into result.DerivationOutputs
        select new.id, old.id, old.path
        from " source ".DerivationOutputs as old
        join " source ".ValidPaths as drv on drv.id = old.drv
        join result.ValidPaths as new on new.path = drv.path
        order by new.id, old.id")))
   '("image" "main"))
  (sqlite-exec db "commit"))

(define (waste db results)
  "Return the size in bytes of the items of the database `main` that no directory in RESULTS lists."
  (define kept (make-hash-table))
  (define (keep name)
    (let ((items (string-append results "/" name "/items")))
      (when (file-exists? items)
        (call-with-input-file items
          (lambda (port)
            (let loop ((line (read-line port)))
              (unless (eof-object? line)
                (hash-set! kept line #t)
                (loop (read-line port)))))))))
  (for-each keep (scandir results (negate (cut string-prefix? "." <>))))
  (fold (match-lambda* ((#(path size) sum)
                        (if (hash-ref kept (basename path)) sum (+ sum (or size 0)))))
        0
        (query db "select path, narSize from main.ValidPaths")))

(define (write-lines file lines)
  (call-with-output-file file
    (lambda (port)
      (for-each (cut format port "~a~%" <>) lines))))

;; The daemon creates the database when the first client connects.
(with-store store
  (match (command-line)
    ((_ _ profile) (add-roots (profile-tools store profile)))
    (_ #t)))

(match (command-line)
  ((_ result . _)
   (let* ((directory (string-append result "/db"))
          (source    %store-database-directory)
          (roots     (delete-duplicates
                      (filter-map root-item (append-map symbolic-links
                                                        (filter file-exists? root-directories)))))
          (db        (open-database (string-append source "/db.sqlite"))))
     (mkdir directory)
     (write-database db directory roots)
     (copy-file (string-append source "/schema") (string-append directory "/schema"))
     (write-lines (string-append result "/items")
                  (map (match-lambda (#(path) (basename path)))
                       (query db "select path from row order by path")))
     (match (query db "select sum(narSize) from row where registrationTime = 1")
       ((#(size))
        (write-lines (string-append result "/size")
                     (list (or size 0) (waste db (dirname result))))))
     (sqlite-close db))))
