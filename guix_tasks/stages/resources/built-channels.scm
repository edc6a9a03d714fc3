;; A channels file: the channels of `channels.scm`, or else those of the image, with Guix's own
;; channel at the newest commit that a substitute server has built.  `guix pull` compiles a newer
;; one for minutes.
;;
;; Servers with Cuirass, such as ci.guix.gnu.org, tell which commits they have built.  The commit
;; must be on the channel's branch.  If `locked.scm` or the Guix that runs is at a newer commit,
;; the channel stays there.

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
      ;; Guix 1.4 raises an error if the server does not answer.
      (catch #t
        (lambda ()
          (parameterize ((guix-warning-port (%make-void-port "w")))
            (channel-commit (channel-with-substitutes-available chan server))))
        (const #f)))
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

(define (known-commits)
  "Return the commits of Guix in `locked.scm` and of the Guix that runs, which refuses to go back."
  (filter-map (lambda (channels)
                (and=> (find guix-channel? channels) channel-commit))
              (list (if (file-exists? (string-append directory "/locked.scm"))
                        (channels "locked.scm")
                        '())
                    (or (false-if-exception ((@ (guix describe) current-channels))) '()))))

(define (newer chan one other)
  (if (and (on-branch? chan other) (eq? 'ancestor (relation chan one `(commit . ,other))))
      other
      one))

(define (at-built-commit chan)
  (define (built server)
    (let ((commit (built-commit chan server)))
      (and commit (on-branch? chan commit) (cons server commit))))
  (match (any built (servers))
    (#f
     (report "taking the newest commit, because no substitute server names one that it has built")
     chan)
    ((server . commit)
     (let ((best (fold (lambda (other best) (newer chan best other)) commit (known-commits))))
       (if (string=? best commit)
           (report "commit ~a is the newest that ~a has built" commit server)
           (report "staying at commit ~a, because ~a has built no newer one" best server))
       (channel (inherit chan) (commit best))))))

(map (lambda (chan)
       (if (and (guix-channel? chan) (not (channel-commit chan)))
           (at-built-commit chan)
           chan))
     (channels "channels.scm"))
