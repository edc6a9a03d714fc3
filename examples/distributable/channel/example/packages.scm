;;; Channel of this project, with the dependencies that Guix does not have.

(define-module (example packages)
  #:use-module (guix build-system trivial)
  #:use-module (guix gexp)
  #:use-module ((guix licenses) #:prefix license:)
  #:use-module (guix packages))

(define %modules
  ;; Directory of Guile modules in the output of a package.
  "/share/guile/site/3.0")

(define-public phrases
  (package
    (name "phrases")
    (version "0.1")
    (source #f)
    (build-system trivial-build-system)
    (arguments
     (list #:modules '((guix build utils))
           #:builder
           #~(begin
               (use-modules (guix build utils))
               (mkdir-p (string-append #$output #$%modules))
               (call-with-output-file (string-append #$output #$%modules "/phrases.scm")
                 (lambda (port)
                   (for-each (lambda (form)
                               (write form port))
                             '((define-module (phrases)
                                 #:export (greeting))
                               (define (greeting name)
                                 (string-append "Please welcome " name "!")))))))))
    (home-page "https://example.org")
    (synopsis "Phrases for every occasion")
    (description "This package is a module for Guile, @code{(phrases)}, with a greeting.")
    (license license:gpl3+)))
