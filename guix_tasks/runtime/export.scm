;; Writes the nars of store items to standard output, one after another:  export.scm FILE
;;
;; FILE has the path of an item in each line.

(use-modules (guix serialization) (ice-9 match) (ice-9 rdelim))

(match (command-line)
  ((_ file)
   (call-with-input-file file
     (lambda (port)
       (let loop ((item (read-line port)))
         (unless (eof-object? item)
           (write-file item (current-output-port))
           (loop (read-line port))))))
   (force-output (current-output-port))))
