;; Asks the substitute servers for what a manifest and packages take:
;;   weather.scm SYSTEMS MANIFEST PACKAGE...
;;
;; SYSTEMS have spaces between them, an empty MANIFEST is none.  As `guix weather`, but that of 1.5
;; asks each server for itself: it ends with a backtrace at one that is a directory, ends at the first
;; that does not answer, and counts what is not trusted here.
;;
;; Prints, after "weather:" and with tabs between, for each system
;;   system SYSTEM
;;   wanted NAME STATE     STATE is stored, substitutable, missing, or unsupported
;;   fetch ITEMS UNPACKED PACKED UNKNOWN     bytes; how much UNKNOWN items are packed, none says

(use-modules (guix derivations) (guix gexp) (guix grafts) (guix narinfo) (guix packages) (guix pki)
             (guix profiles) (guix store) (guix substitutes) (guix ui) (gnu packages)
             (ice-9 match) (srfi srfi-1))

(define (say . words)
  (format #t "weather:~a~%" (string-join words "\t")))

(define (entries manifest packages)
  (manifest-transitive-entries
   (concatenate-manifests
    (cons (specifications->manifest packages)
          (if (string-null? manifest)
              '()
              (list (load* manifest (make-user-module '((guix profiles) (gnu))))))))))

(define (entry-label entry)
  (match (manifest-entry-output entry)
    ("out" (format #f "~a@~a" (manifest-entry-name entry) (manifest-entry-version entry)))
    (other (format #f "~a@~a:~a" (manifest-entry-name entry) (manifest-entry-version entry)
                   other))))

(define (entry-output store entry system)
  "Return the store item of ENTRY, or #f where its package is not for SYSTEM."
  (match (manifest-entry-item entry)
    ((? string? item) item)
    (item
     (and (or (not (package? item)) (supported-package? item system))
          (derivation->output-path
           (run-with-store store (lower-object item system))
           (manifest-entry-output entry))))))

(define (ask urls items)
  (define acl (current-acl))
  ;; A server that does not answer is reported as in a stage, if this program asks.
  (parameterize ((program-name "substitute"))
    (lookup-narinfos/diverse urls items (lambda (narinfo) (valid-narinfo? narinfo acl)))))

(define (needed narinfo)
  (delete (narinfo-path narinfo)
          (map (lambda (name) (string-append (%store-prefix) "/" name))
               (narinfo-references narinfo))))

(define (ask-for-all urls items stored?)
  "Return the narinfos, by item, of ITEMS and of all that they need, where they are not STORED?."
  (define found (make-hash-table))
  (let loop ((items items))
    (let ((new (remove (lambda (item) (or (hash-get-handle found item) (stored? item)))
                       (delete-duplicates items))))
      (for-each (lambda (item) (hash-set! found item #f)) new)
      (unless (null? new)
        (let ((narinfos (ask urls new)))
          (for-each (lambda (narinfo) (hash-set! found (narinfo-path narinfo) narinfo)) narinfos)
          (loop (append-map needed narinfos))))))
  found)

(define (packed-size narinfo)
  (match (filter integer? (narinfo-file-sizes narinfo))
    (()    #f)
    (sizes (apply min sizes))))

(define (weather store system manifest packages)
  (define (stored? item) (valid-path? store item))
  (define urls (or (substitute-urls store) %default-substitute-urls))
  (define wanted
    (map (lambda (entry) (cons (entry-label entry) (entry-output store entry system)))
         (entries manifest packages)))
  (define found (ask-for-all urls (filter-map cdr wanted) stored?))

  (define seen (make-hash-table))
  (define (there? item)
    "Whether nothing of ITEM, and of all that it needs, has to be built."
    (match (hash-get-handle seen item)
      ((_ . known) known)
      (#f (let* ((narinfo (hash-ref found item))
                 (known   (or (stored? item) (and narinfo (every there? (needed narinfo))))))
            (hash-set! seen item known)
            known))))

  (say "system" system)
  (for-each (match-lambda
              ((label . #f)            (say "wanted" label "unsupported"))
              ((label . (? stored?))   (say "wanted" label "stored"))
              ((label . (? there?))    (say "wanted" label "substitutable"))
              ((label . _)             (say "wanted" label "missing")))
            wanted)
  (let* ((narinfos (filter identity (hash-map->list (lambda (_ narinfo) narinfo) found)))
         (packed   (filter-map packed-size narinfos)))
    (apply say "fetch"
           (map number->string
                (list (length narinfos) (apply + (map narinfo-size narinfos))
                      (apply + packed) (- (length narinfos) (length packed)))))))

(match (command-line)
  ((_ systems manifest packages ...)
   (parameterize ((program-name "weather") (%graft? #f))
     (with-error-handling
       (with-store store
         (for-each (lambda (system) (weather store system manifest packages))
                   (string-tokenize systems)))))))
