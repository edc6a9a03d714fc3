;;; A channel of one's own, with one package.  It has no source to fetch, and is built by
;;; nothing but Guile, so that it can be built where there is no network.

(define-module (offline packages)
  #:use-module (guix build-system trivial)
  #:use-module (guix gexp)
  #:use-module ((guix licenses) #:prefix license:)
  #:use-module (guix packages))

(define-public greet
  (package
    (name "greet")
    (version "1.0")
    (source #f)
    (build-system trivial-build-system)
    (arguments
     (list #:builder
           #~(let ((share (string-append #$output "/share")))
               (mkdir #$output)
               (mkdir share)
               (call-with-output-file (string-append share "/greeting")
                 (lambda (port)
                   (display "hello from a channel\n" port))))))
    (home-page "https://example.org")
    (synopsis "File with a greeting")
    (description "This package is a file with a greeting, @file{share/greeting}.")
    (license license:gpl3+)))
