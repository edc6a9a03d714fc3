;; Runs a command of Guix that fetches from Git, with what is given to open private channels:
;;   fetch.scm DIRECTORY GUIX ARGUMENT...
;;
;; DIRECTORY is a home for libgit2, with .gitconfig and .ssh/known_hosts, and may have `credentials`,
;; a list of (URL-PREFIX USER PASSWORD).  GUIX is the program that the command is one of.
;;
;; libgit2 has no credential helpers, and a URL with a password in it would stay in the checkout's
;; reflog.  So Guile-Git is given another callback here; to it, a module is what is exported.

(use-modules (git) (git bindings) (git cred) (git structs) (guix ui)
             (ice-9 match) (srfi srfi-1) (system foreign))

(define original make-fetch-options)

(define set-error!
  (libgit2->procedure int "git_error_set_str" (list int '*)))

(define (known-credentials directory)
  (let ((file (string-append directory "/credentials")))
    (if (file-exists? file)
        (call-with-input-file file read #:encoding "UTF-8")
        '())))

(define (answer-with credentials)
  "A callback of libgit2 that shows a server what is for it, and once: it asks again where that is
refused."
  (define shown '())
  (define (userpass cred url)
    (match (find (lambda (each) (string-prefix? (car each) url)) credentials)
      ((prefix user password)
       (if (member url shown)
           (begin
             (set-error! 26                       ;GIT_ERROR_CALLBACK
                         (string->pointer "the server refused the credentials given for it"))
             -16)                                 ;GIT_EAUTH
           (begin
             (set! shown (cons url shown))
             (cred-userpass-paintext-new cred user password))))
      (#f 1)))                                    ;as if there were no callback
  (cred-acquire-cb
   (lambda (cred url username allowed payload)
     (let ((url  (pointer->string url))
           (user (if (null-pointer? username) "" (pointer->string username))))
       (cond ((= allowed CREDTYPE-SSH-USERNAME)
              (cred-username-new cred "git"))
             ((logtest allowed CREDTYPE-SSH-KEY)
              (cred-ssh-key-from-agent cred user))
             (else
              (userpass cred url)))))))

(define callbacks '())                            ;which C code must find where they were

(define (options-with credentials)
  (lambda arguments
    (let ((options  (apply original arguments))
          (callback (answer-with credentials)))
      (set! callbacks (cons callback callbacks))
      (set-remote-callbacks-credentials! (fetch-options-remote-callbacks options)
                                         (pointer-address callback))
      ;; Guix itself knows but one proxy, and not what is to be reached without.
      (set-proxy-options-type! (fetch-options-proxy-options options) 'auto)
      options)))

;; GIT_OPT_SET_SEARCH_PATH of GIT_CONFIG_LEVEL_GLOBAL, and GIT_OPT_SET_HOMEDIR.
(define (set-home! directory)
  (let ((path (string->pointer directory)))
    ((libgit2->procedure* "git_libgit2_opts" (list int int '*)) 5 4 path)
    ((libgit2->procedure* "git_libgit2_opts" (list int '*)) 38 path)))

(match (command-line)
  ((_ directory guix . arguments)
   (libgit2-init!)
   (set-home! directory)
   (module-set! (resolve-module '(git fetch)) 'make-fetch-options
                (options-with (known-credentials directory)))
   (set-program-arguments (cons guix arguments))
   (apply guix-main guix arguments)))
