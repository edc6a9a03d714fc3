;; announce FILE: announce the guests that a JSON file lists.
(use-modules (json) (phrases) (ice-9 match))

(match (command-line)
  ((_ file)
   (for-each (lambda (name)
               (display (greeting name))
               (newline))
             (vector->list (call-with-input-file file json->scm))))
  (_
   (display "usage: announce FILE\n" (current-error-port))
   (exit 2)))
