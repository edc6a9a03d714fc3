;; Builds a derivation with a shell that is in a directory:  probe.scm DIRECTORY LOADER
;; LOADER, of the same directory, starts it; it is empty where the shell needs none.

(use-modules (guix) (ice-9 match))

(match (command-line)
  ((_ directory loader)
   (with-store store
     ;; Nobody has it, and without a network each server would be waited for.
     (set-build-options store #:use-substitutes? #f)
     (let ((tools (add-to-store store "guix-tasks-probe-tools" #t "sha256" directory)))
       (define (tool name)
         (string-append tools "/" name))
       (define command
         `(,@(if (string-null? loader) '() (list (tool loader) "--library-path" tools))
           ,(tool "sh") "-c" "echo built >$out"))
       (build-derivations
        store
        (list (derivation store "guix-tasks-probe" (car command) (cdr command)
                          #:sources (list tools)
                          ;; Salted, so that it is built and not found in the store.
                          #:env-vars `(("salt" . ,(number->string (current-time)))))))))))
