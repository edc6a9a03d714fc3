;; Deletes what a stage added to the store and nothing needs:  collect.scm BEFORE [PROFILE]
;;
;; BEFORE is a file that lists the store as the stage found it.  What was there is in a lower
;; layer of the image, where deleting it gives nothing back, so it stays.  With PROFILE, so does
;; what building such a profile takes: the next stage would fetch or build all of it again.

(use-modules (guix store) (ice-9 match) (ice-9 rdelim) (srfi srfi-1))

(primitive-load (string-append (dirname (car (command-line))) "/profile-tools.scm"))

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

(with-store store
  ;; The daemon tells of every item.
  (current-build-output-port (%make-void-port "w"))
  (match (command-line)
    ((_ before . profile)
     (let* ((stays? (set (append (lines before)
                                 (append-map (lambda (profile) (requisites store (profile-tools store profile)))
                                              profile))))
            (goes   (remove stays? (dead-paths store))))
       (unless (null? goes)
         (delete-paths store goes))
       (format #t "collected ~a store items~%" (length goes))))))
