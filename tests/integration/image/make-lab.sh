#!/bin/sh
# Runs in a container of the base stage, and gives it something to build: derivations whose
# builder is the container's own dynamic loader, shell and sleep, put into the store.  So a
# real daemon builds real derivations without a network and without any package.
#
# Afterwards /lab/NAME is the name of the derivation NAME (ok, slow, failing), and root's
# profile has a program `hello`.  The script for Guile is /lab/lab.scm.
set -eu

kit=/lab/kit
mkdir -p "$kit" /lab/profile/bin
for program in sh sleep; do
    cp -L "$(command -v "$program")" "$kit/$program"
    ldd "$(command -v "$program")" | grep -o '/[^ ]*' | while read -r library; do
        cp -L "$library" "$kit/"
    done
done
cp "$kit"/ld-linux* "$kit/loader"

printf '#!/bin/sh\necho Hello, world!\n' >/lab/profile/bin/hello
chmod 755 /lab/profile/bin/hello

guix repl /lab/lab.scm
ln -s "$(cat /lab/profile-in-store)" /var/guix/profiles/per-user/root/guix-profile
# The outputs are to be built by the tests.
rm -rf "$kit" /lab/profile /lab/lab.scm /lab/make-lab.sh
