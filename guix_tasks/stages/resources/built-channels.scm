;; A channels file: the channels of `channels.scm`, or else those of the image, with Guix's own
;; channel at the newest commit that a substitute server has built.  `guix pull` compiles a newer
;; one for minutes.
;;
;; Servers with Cuirass, such as ci.guix.gnu.org, tell which commits they have built.  The commit
;; must be on the channel's branch.  If `locked.scm` has a newer one, the channel stays there.

(use-modules (guix channels) (guix ci) (guix diagnostics) (guix git) (guix scripts pull)
             (guix store) (ice-9 match) (srfi srfi-1) (srfi srfi-26))

(define directory (dirname (current-filename)))

(define time-limit 20)                            ;seconds for one server

(define (report message . arguments)
  (apply format (current-error-port) (string-append "guix: " message "~%") arguments))

(define (channels name)
  "Return the channels of the file NAME, or the default channels if it does not exist."
  (let ((file (string-append directory "/" name)))
    ;; It has reported its own error, which the load of this file would report again.
    (catch 'quit
      (lambda ()
        (channel-list (if (file-exists? file) `((channel-file . ,file)) '())))
      (lambda (key . status)
        (apply primitive-exit status)))))

(define (servers)
  (filter (cut string-prefix? "http" <>)
          (match (string-tokenize (or (getenv "GUIX_SUBSTITUTE_URLS") ""))
            (()   %default-substitute-urls)
            (urls urls))))

(define (built-commit chan server)
  "Return the newest commit that SERVER has built, or #f."
  (dynamic-wind
    (lambda ()
      (sigaction SIGALRM (lambda _ (throw 'time-limit)))
      (alarm time-limit))
    (lambda ()
      (parameterize ((guix-warning-port (%make-void-port "w")))
        (channel-commit (channel-with-substitutes-available chan server))))
    (lambda ()
      (alarm 0)
      (sigaction SIGALRM SIG_DFL))))

(define (relation chan commit reference)
  "Return how COMMIT relates to REFERENCE in the repository of CHAN; #f if either is unknown."
  (catch 'git-error
    (lambda ()
      (call-with-values
          (cut update-cached-checkout (channel-url chan) #:ref reference #:starting-commit commit
               #:check-out? #f)
        (lambda (checkout new relation)
          relation)))
    (const #f)))

(define (on-branch? chan commit)
  (memq (relation chan commit `(branch . ,(channel-branch chan))) '(self ancestor)))

(define (locked-commit chan)
  (and (file-exists? (string-append directory "/locked.scm"))
       (and=> (find guix-channel? (channels "locked.scm")) channel-commit)))

(define (at-built-commit chan)
  (let* ((found  (any (lambda (server)
                        (let ((commit (built-commit chan server)))
                          (and commit (on-branch? chan commit) (cons server commit))))
                      (servers)))
         (locked (and found (locked-commit chan))))
    (match found
      (#f
       (report "taking the newest commit, because no substitute server names one that it has built")
       chan)
      ((server . commit)
       (if (and locked (on-branch? chan locked)
                (eq? 'ancestor (relation chan commit `(commit . ,locked))))
           (begin
             (report "staying at commit ~a of the lock, because ~a has built no newer one"
                     locked server)
             (channel (inherit chan) (commit locked)))
           (begin
             (report "commit ~a is the newest that ~a has built" commit server)
             (channel (inherit chan) (commit commit))))))))

(map (lambda (chan)
       (if (and (guix-channel? chan) (not (channel-commit chan)))
           (at-built-commit chan)
           chan))
     (channels "channels.scm"))
