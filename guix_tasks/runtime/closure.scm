;; Prints what a profile consists of:  closure.scm PROFILE
;;
;; Each line is a keyword and fields, separated by tabs:
;;   profile PATH | package NAME VERSION OUTPUT | program NAME | certificates
;;   item PATH NAR-SHA256 NAR-SIZE REFERENCES    (separated by spaces)

(use-modules (guix profiles) (guix store) (ice-9 ftw) (ice-9 match) (rnrs bytevectors))

(define (print . fields)
  (display (string-join fields "\t"))
  (newline))

(define (hexadecimal bytes)
  (string-concatenate
   (map (lambda (byte) (string-pad (number->string byte 16) 2 #\0))
        (bytevector->u8-list bytes))))

(define (files directory)
  (or (scandir directory (lambda (name) (not (member name '("." ".."))))) '()))

(match (command-line)
  ((_ link)
   (let ((profile (canonicalize-path link)))
     (print "profile" profile)
     (for-each (lambda (entry)
                 (print "package" (manifest-entry-name entry) (manifest-entry-version entry)
                        (manifest-entry-output entry)))
               (manifest-entries (profile-manifest profile)))
     (for-each (lambda (directory)
                 (for-each (lambda (name) (print "program" name))
                           (files (string-append profile directory))))
               '("/bin" "/sbin"))
     (when (file-exists? (string-append profile "/etc/ssl/certs"))
       (print "certificates"))
     (with-store store
       (for-each (lambda (item)
                   (let ((info (query-path-info store item)))
                     (print "item" item (hexadecimal (path-info-hash info))
                            (number->string (path-info-nar-size info))
                            (string-join (path-info-references info) " "))))
                 (sort (requisites store (list profile)) string<?))))))
