#!/bin/sh
# Writes an archive of the Git checkouts of channels, or nothing if they need no push:
#   pack-checkouts.sh CACHES MARK DAYS
#
# CACHES is the cache volume.  Its file MARK has the time of the last push in seconds, which is not
# repeated for DAYS.  The archive contains a new MARK, so that a volume that is filled from it knows.
# Worktrees are left out, because Guix resets them before each use.
set -eu

caches=$1 mark=$2 days=$3 name=${1##*/}
cd "$caches"
pushed=$(cat "$mark" 2>/dev/null || echo 0)
[ "$(date +%s)" -ge "$((pushed + days * 86400))" ] || exit 0
set -- guix/checkouts/*/.git
[ -e "$1" ] || exit 0
# The lock of stages, which write to the checkouts: while one runs, a later call does this.
if command -v flock >/dev/null; then
    exec 9<.
    flock -n 9 || exit 0
fi
[ ! -d guix/authentication ] || set -- "$@" guix/authentication
mkdir -p "/tmp/$name"
date +%s >"/tmp/$name/$mark"
for path; do
    shift
    set -- "$@" "$name/$path"
done
cd "${caches%/*}"
# The directories above come first, because a rootless daemon has to own them.
exec tar -cf - -C /tmp "$name/$mark" -C "$PWD" --no-recursion \
    "$name" "$name/guix" "$name/guix/checkouts" "$name"/guix/checkouts/* --recursion "$@"
