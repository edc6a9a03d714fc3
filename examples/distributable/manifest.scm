;; What `inv pack` packs: the package, of the sources that the stage `build` has put there.
(packages->manifest (list (primitive-load "/project/guix.scm")))
