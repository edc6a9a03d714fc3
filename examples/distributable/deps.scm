;; All that the package in guix.scm is built with: its inputs, and what its build system adds.
(use-modules (guix profiles))

(package->development-manifest (primitive-load "guix.scm"))
