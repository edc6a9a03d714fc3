;; Deletes what a stage added to the store and nothing needs:  collect.scm BEFORE [PROFILE]
;;
;; BEFORE is a file that lists the store as the stage found it.  What was there is in a lower
;; layer of the image, where deleting it gives nothing back, so it stays.  With PROFILE, so does
;; what building such a profile takes: the next stage would fetch or build all of it again.

(use-modules (guix store) (guix derivations) (ice-9 match) (ice-9 rdelim) (srfi srfi-1))

(define (lines file)
  (call-with-input-file file
    (lambda (port)
      (let loop ((found '()))
        (match (read-line port)
          ((? eof-object?) found)
          (line (loop (cons line found))))))))

(define (set items)
  (let ((table (make-hash-table)))
    (for-each (lambda (item) (hash-set! table item #t)) items)
    (lambda (item) (hash-ref table item))))

(define (inputs drv)
  (map derivation-input-derivation (derivation-inputs drv)))

(define (outputs drv)
  (map derivation-output-path (map cdr (derivation-outputs drv))))

;; A profile is built of what its hooks made (fonts, manuals, ...), and those by tools: two steps.
(define (tools store profile)
  (let* ((drvs  (filter file-exists? (valid-derivers store (canonicalize-path profile))))
         (hooks (append-map (compose inputs read-derivation-from-file) drvs))
         (tools (append-map inputs hooks))
         (items (append-map outputs (append hooks tools))))
    (requisites store (filter (lambda (item) (valid-path? store item))
                              (delete-duplicates items)))))

(with-store store
  ;; The daemon tells of every item.
  (current-build-output-port (%make-void-port "w"))
  (match (command-line)
    ((_ before . profile)
     (let* ((stays? (set (append (lines before)
                                 (append-map (lambda (profile) (tools store profile)) profile))))
            (goes   (remove stays? (dead-paths store))))
       (unless (null? goes)
         (delete-paths store goes))
       (format #t "collected ~a store items~%" (length goes))))))
