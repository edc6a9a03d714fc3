#!/bin/sh
# Checks the database of the store volume:  check-store.sh VOLUME
#
# It prints `ok`, or what SQLite reports.  The exit status is 0 in both cases.
set -eu

profiles=/var/guix/profiles/per-user/root
PATH=$profiles/current-guix/bin:$profiles/guix-profile/bin:$PATH
export HOME=/root

database=$1/guix-tasks/db/db.sqlite
if [ -f "$database" ]; then
    guix repl -- "${0%/*}/check-store.scm" "$database" 2>&1 | tail -n 1
else
    echo ok
fi
