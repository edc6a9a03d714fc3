#!/bin/sh
# Records in the store volume what a stage has made:  record.sh RESULT PROFILE STATE...
#
# What building a profile like PROFILE takes stays in the image, if PROFILE is not empty.
# RESULT is a directory of the volume, which also gets the script that assembles an image from it.
# STATE are files and directories outside of the store that belong to Guix, for example the
# profiles of root.
set -eu

result=$1 profile=$2
shift 2
rm -rf "$result"
mkdir -p "$result/state"
cp "${0%/*}/assemble.sh" "$result/"
guix repl -- "${0%/*}/record.scm" "$result" ${profile:+"$profile"}
for path; do
    if [ -e "$path" ] || [ -L "$path" ]; then
        mkdir -p "$result/state${path%/*}"
        cp -pPR "$path" "$result/state${path%/*}/"
    fi
done
# The newest results can be needed again.  Their names have no spaces.
# shellcheck disable=SC2012
cd "$result/.." && ls -t | tail -n +9 | while read -r old; do rm -rf "./$old" || :; done
