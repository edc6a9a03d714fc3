;; Everything needed to build the package of guix.scm: its inputs, and those of its build system.
(use-modules (guix profiles))

(package->development-manifest (primitive-load "guix.scm"))
