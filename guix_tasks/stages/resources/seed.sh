#!/bin/sh
# Copies what the store volume lacks from the store of this container's image:
#   seed.sh VOLUME
#
# The file `owner` next to this script contains the user ID of Guix's daemon.
set -eu

volume=$1 directory=${0%/*}
owner=$(cat "$directory/owner")
profiles=/var/guix/profiles/per-user/root
PATH=$profiles/current-guix/bin:$profiles/guix-profile/bin:$PATH
export HOME=/root

rm -rf "$volume/guix-tasks/incoming"
mkdir -p "$volume/store" "$volume/guix-tasks/db" "$volume/guix-tasks/incoming"
_give_to_owner() {
    if [ "$owner" -ne 0 ]; then
        chown "$owner:$owner" "$volume" "$volume/store"
        chown -R "$owner:$owner" "$volume/guix-tasks"
    fi
}
if ! [ -f /var/guix/db/db.sqlite ]; then
    _give_to_owner
    exit 0
fi
guix repl -- "$directory/seed.scm" "$volume" missing >"$directory/missing"
cd /gnu/store
# An item that the volume's database does not know is left over from a build that was killed.
# shellcheck disable=SC2016 # the inner shell expands it
xargs -n 100 sh -c '
    volume=$1 owner=$2
    shift 2
    [ $# -gt 0 ] || exit 0
    cp -pPR -- "$@" "$volume/guix-tasks/incoming/"
    [ "$owner" -eq 0 ] || chown -hR "$owner:$owner" "$volume/guix-tasks/incoming"
    cd "$volume/store"
    rm -rf -- "$@"
    mv -- "$volume/guix-tasks/incoming/"* .
' sh "$volume" "$owner" <"$directory/missing"
guix repl -- "$directory/seed.scm" "$volume" register
_give_to_owner
