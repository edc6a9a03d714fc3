;; What building a profile takes; other scripts load this file.

(use-modules (guix derivations) (guix store) (srfi srfi-1) (srfi srfi-26))

(define (inputs drv)
  (map derivation-input-derivation (derivation-inputs drv)))

(define (outputs drv)
  (map derivation-output-path (map cdr (derivation-outputs drv))))

;; A profile is built of what its hooks made (fonts, manuals, ...), and those by tools: two steps.
(define (profile-tools store profile)
  "Return the valid store items from which PROFILE was built, without their references."
  (let* ((drvs  (filter file-exists? (valid-derivers store (canonicalize-path profile))))
         (hooks (append-map (compose inputs read-derivation-from-file) drvs))
         (tools (append-map inputs hooks)))
    (filter (cut valid-path? store <>)
            (delete-duplicates (append-map outputs (append hooks tools))))))
