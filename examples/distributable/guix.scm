;; Package of the program, built from the sources in src/.
(use-modules (example packages)                   ;the channel of this project
             (gnu packages guile)
             (guix build-system trivial)
             (guix gexp)
             ((guix licenses) #:prefix license:)
             (guix packages))

(package
  (name "announce")
  (version "1.0")
  (source (local-file "src" #:recursive? #t))
  ;; This is enough for a script.  For C programs, use gnu-build-system.
  (build-system trivial-build-system)
  (arguments
   (list #:modules '((guix build utils))
         #:builder
         #~(begin
             (use-modules (guix build utils))
             (let ((program (string-append #$output "/bin/announce"))
                   (modules (map (lambda (input)
                                   (string-append input "/share/guile/site/3.0"))
                                 (list #$guile-json-3 #$phrases))))
               (mkdir-p (dirname program))
               (call-with-output-file program
                 (lambda (port)
                   (format port "#!~a/bin/guile --no-auto-compile~%!#~%"
                           #$guile-3.0)
                   (write `(set! %load-path (append ',modules %load-path)) port)
                   (newline port)
                   (call-with-input-file (string-append #$source "/announce.scm")
                     (lambda (source)
                       (dump-port source port)))))
               (chmod program #o555)))))
  (inputs (list guile-3.0 guile-json-3 phrases))
  (home-page "https://example.org")
  (synopsis "Announce the guests of a list")
  (description "This program reads a list of guests, as JSON, and announces each of them.")
  (license license:gpl3+))
