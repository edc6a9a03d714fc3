;;; Print "NAME OUTPUT DERIVATION" for each package that a seed replaces, from the package graph of
;;; this Guix.

(use-modules (guix)
             (guix packages)
             (ice-9 match))

(define-syntax-rule (package-of module name)
  (module-ref (resolve-interface 'module) 'name))

(define seeds
  `(("guile"       ,(module-ref (resolve-module '(gnu packages commencement)) 'guile-final))
    ("guile-3.0"   ,(package-of (gnu packages guile) guile-3.0))
    ("guile-json"  ,(package-of (gnu packages guile) guile-json-3))
    ("guile-gcrypt" ,(package-of (gnu packages gnupg) guile-gcrypt))
    ("texinfo"     ,(package-of (gnu packages texinfo) texinfo))
    ("gzip"        ,(package-of (gnu packages compression) gzip))
    ("tar"         ,(package-of (gnu packages base) tar))
    ("hello"       ,(package-of (gnu packages base) hello))
    ("locales"     ,((package-of (gnu packages base) libc-utf8-locales-for-target)
                     (%current-system)))
    ("mkfontscale" ,(package-of (gnu packages xorg) mkfontscale))
    ("mkfontdir"   ,(package-of (gnu packages xorg) mkfontdir))
    ;; Propagated inputs of Guile: libgc, libunistring.
    ,@(map (match-lambda
             ((_ package . _) (list (package-name package) package)))
           (package-propagated-inputs (package-of (gnu packages guile) guile-3.0)))))

(with-store store
  (for-each (match-lambda
              ((name package)
               (let ((derivation (package-derivation store package #:graft? #f)))
                 (format #t "~a ~a ~a~%" name
                         (derivation->output-path derivation)
                         (derivation-file-name derivation)))))
            seeds))
