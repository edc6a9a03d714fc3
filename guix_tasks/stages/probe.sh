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
# Where there is no ldd, as in an image that Guix made, glibc's loader does its work.
if command -v ldd >/dev/null; then
    libraries=$(ldd "$shell" 2>/dev/null || :)
else
    libraries=$(LD_TRACE_LOADED_OBJECTS=1 "$shell" </dev/null)
fi
for library in $(echo "$libraries" | grep -o '/[^ )]*'); do
    cp "$library" "$tools/"
done
set -- "$tools"/ld*.so*
# A static shell has no loader.
[ -e "$1" ] || set --
exec guix repl -- "$here/probe.scm" "$tools" "${1+"${1##*/}"}"
