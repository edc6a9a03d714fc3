;;; Packages to measure with: part-1 to part-20, of 1 MB each, and large, of 500 MB in 20,000
;;; files.  They are built by nothing but Guile, are the same in every build, and hardly shrink
;;; when they are compressed: gzip does not see what repeats itself only after 32 KiB.

(define-module (offline benchmark)
  #:use-module (guix build-system trivial)
  #:use-module (guix gexp)
  #:use-module ((guix licenses) #:prefix license:)
  #:use-module (guix packages))

(define (noise seed size)
  "Return code that makes a bytevector of SIZE pseudo-random bytes."
  #~(let ((bytes (make-bytevector #$size)))
      (let loop ((index 0) (state #$seed))
        (if (< index #$size)
            (let ((next (modulo (+ (* 69069 state) 12345) 4294967296)))
              ;; The low bits of such a generator are far from random.
              (bytevector-u16-native-set! bytes index (ash next -16))
              (loop (+ index 2) next))
            bytes))))

(define (noise-package name text builder)
  (package
    (name name)
    (version "1.0")
    (source #f)
    (build-system trivial-build-system)
    (arguments
     (list #:builder
           #~(begin
               (use-modules (ice-9 binary-ports) (rnrs bytevectors))
               #$builder)))
    (home-page "https://example.org")
    (synopsis text)
    (description text)
    (license license:gpl3+)))

(define (part number)
  (noise-package
   (string-append "part-" (number->string number))
   "File of 1 MB"
   #~(let ((block #$(noise number 65536))
           (share (string-append #$output "/share")))
       (mkdir #$output)
       (mkdir share)
       (call-with-output-file (string-append share "/part-" #$(number->string number))
         (lambda (port)
           (let loop ((left 16))
             (unless (zero? left)
               (put-bytevector port block)
               (loop (- left 1)))))))))

(for-each
 (lambda (number)
   (let ((name (symbol-append 'part- (string->symbol (number->string number)))))
     (module-define! (current-module) name (part number))
     (module-export! (current-module) (list name))))
 (iota 20 1))

(define-public large
  (noise-package
   "large"
   "Files of 500 MB"
   #~(let ((block #$(noise 1 1048576))
           (share (string-append #$output "/share")))
       (define (make-folder folder)
         (mkdir (string-append share "/" (number->string folder)))
         (let loop ((file 0))
           (when (< file 100)
             (call-with-output-file (string-append share "/" (number->string folder)
                                                   "/" (number->string file))
               (lambda (port)
                 ;; No two files begin at the same place.
                 (put-bytevector port block
                                 (modulo (* 524287 (+ file (* 100 folder))) 1023576)
                                 25000)))
             (loop (+ file 1)))))
       (mkdir #$output)
       (mkdir share)
       (for-each make-folder (iota 200)))))
