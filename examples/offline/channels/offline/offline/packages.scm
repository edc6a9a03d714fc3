;;; A custom channel with one package.  The package has no source to fetch and is built with
;;; Guile alone, so that it can be built without a network.

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
           #~(let* ((bin (string-append #$output "/bin"))
                    (program (string-append bin "/greet"))
                    (share (string-append #$output "/share")))
               (mkdir #$output)
               (mkdir bin)
               (mkdir share)
               (call-with-output-file program
                 (lambda (port)
                   (display "#!/bin/sh\necho hello from a channel\n" port)))
               (chmod program #o755)
               (call-with-output-file (string-append share "/greeting")
                 (lambda (port)
                   (display "hello from a channel\n" port))))))
    (home-page "https://example.org")
    (synopsis "Program that prints a greeting")
    (description
     "This package has a shell script, @command{greet}, and a file, @file{share/greeting}.")
    (license license:gpl3+)))
