#!/bin/sh
# Writes an archive of the Git checkouts of channels, or nothing if they need no push:
#   pack-checkouts.sh CACHES MARK DAYS
#
# CACHES is the cache volume.  If its file MARK is younger than DAYS, the checkouts were pushed
# lately.  The archive contains a new MARK, so that a volume that is filled from it knows.
# Worktrees are left out, because Guix resets them before each use.
set -eu

caches=$1 mark=$2 days=$3 name=${1##*/}
cd "$caches"
[ -z "$(find . -maxdepth 1 -name "$mark" -mtime "-$days")" ] || exit 0
set -- guix/checkouts/*/.git
[ -e "$1" ] || exit 0
# The lock of stages, which write to the checkouts.
if command -v flock >/dev/null; then
    exec 9<.
    flock 9
fi
[ ! -d guix/authentication ] || set -- "$@" guix/authentication
for path; do
    shift
    set -- "$@" "$name/$path"
done
mkdir -p "/tmp/$name"
: >"/tmp/$name/$mark"
exec tar -cf - -C /tmp "$name/$mark" -C "${caches%/*}" "$@"
