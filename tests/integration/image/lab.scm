;; Puts what make-lab.sh has gathered into the store, and writes the names of three
;; derivations and of a profile to files in /lab.
(use-modules (guix derivations) (guix store) (ice-9 match))

(define (note name text)
  (call-with-output-file (string-append "/lab/" name)
    (lambda (port) (display text port))))

(with-store store
  (let ((kit (add-to-store store "kit" #t "sha256" "/lab/kit")))
    (define prelude
      (string-append
       "sleep() { " kit "/loader --library-path " kit " " kit "/sleep \"$@\"; }; "))
    (for-each
     (match-lambda
       ((name script)
        (note name
              (derivation-file-name
               (derivation store name (string-append kit "/loader")
                           (list "--library-path" kit (string-append kit "/sh")
                                 "-c" (string-append prelude script))
                           #:sources (list kit))))))
     '(("ok" "echo done > $out")
       ("slow" "echo started; sleep 600; echo done > $out")
       ("failing"
        "echo half > $out; n=1; while [ $n -le 60 ]; do echo line $n of the log; n=$((n+1)); done; exit 3")))
    (note "profile-in-store" (add-to-store store "profile" #t "sha256" "/lab/profile"))))
