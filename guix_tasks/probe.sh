#!/bin/sh
# Builds a derivation that takes nothing but a shell:  probe.sh
#
# It tells whether the daemon can build in this container at all, with no network and nothing
# fetched.  A build sees only the store, so the shell goes there with its libraries.
set -eu

here=${0%/*}
tools=$here/tools
mkdir "$tools"
shell=$(readlink -f /bin/sh)
cp "$shell" "$tools/sh"
for library in $(ldd "$shell" | grep -o '/[^ )]*'); do
    cp "$library" "$tools/"
done
loader=$(cd "$tools" && echo ld*.so*)
exec guix repl -- "$here/probe.scm" "$tools" "$loader"
