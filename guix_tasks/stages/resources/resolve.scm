;; Prints the channels that `guix pull` would pull now, with their commits, as a channels file:
;;   resolve.scm [--disable-authentication] [CHANNELS]
;;
;; They are fetched and authenticated as by `guix pull`, which finds them in its cache then.

(use-modules (guix channels) (guix store) (guix scripts pull) (ice-9 match) (ice-9 pretty-print))

(define (pinned instance)
  (channel (inherit (channel-instance-channel instance))
           (commit (channel-instance-commit instance))))

(match (command-line)
  ((_ . words)
   (with-store store
     (let* ((disable   "--disable-authentication")
            (file      (delete disable words))
            (wanted    (channel-list (map (lambda (name) `(channel-file . ,name)) file)))
            (instances (latest-channel-instances store wanted
                                                 #:authenticate? (not (member disable words)))))
       (pretty-print `(list ,@(map (compose channel->code pinned) instances)))))))
