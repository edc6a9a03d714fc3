;; Builds a derivation with a shell that is in a folder, by its loader:  probe.scm FOLDER LOADER

(use-modules (guix) (ice-9 match))

(match (command-line)
  ((_ folder loader)
   (with-store store
     (let ((tools (add-to-store store "guix-tasks-probe-tools" #t "sha256" folder)))
       (define (tool name)
         (string-append tools "/" name))
       (build-derivations
        store
        (list (derivation store "guix-tasks-probe" (tool loader)
                          (list "--library-path" tools (tool "sh") "-c" "echo built >$out")
                          #:sources (list tools)
                          ;; Salted, so that it is built and not found in the store.
                          #:env-vars `(("salt" . ,(number->string (current-time)))))))))))
