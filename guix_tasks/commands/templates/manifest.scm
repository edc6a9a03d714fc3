;; Packages that `inv install` installs.  Find names with `inv run -- guix search WORD`.
(specifications->manifest
 '("hello"))
