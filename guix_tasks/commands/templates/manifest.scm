;; The packages that `inv install` installs.  `inv run -- guix search WORD` finds their names.
(specifications->manifest
 '("hello"))
