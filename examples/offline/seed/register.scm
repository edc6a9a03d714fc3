;;; Register store items whose files were copied to the store.  The argument is a file with lines
;;; "ITEM DERIVATION REFERENCE…".

(use-modules (guix build store-copy)
             (guix store)
             (guix store database)
             (ice-9 match)
             (ice-9 rdelim))

(define store-info
  (@@ (guix build store-copy) store-info))

(define (read-items port)
  (match (read-line port)
    ((? eof-object?) '())
    (line (match (string-split line #\space)
            ((item derivation references ...)
             (reset-timestamps item)
             (cons (store-info item derivation references) (read-items port)))))))

(match (command-line)
  ((_ list)
   (with-database (store-database-file) database
     (register-items database (call-with-input-file list read-items)
                     #:log-port (%make-void-port "w")))))
