#!/bin/sh
# Finds which files outside of Guix's directories differ between two images, of which one replaces
# layers of the other:
#   other-files.sh list DIRECTORY STATE...       in a container of the image to change
#   other-files.sh compare DIRECTORY STATE...    then in a container of the image to equal
#
# STATE are Guix's files and directories outside of the store.  In DIRECTORY, on the store volume,
# `assemble.sh` finds then what to do: `removed` has the paths to remove, and `changed.tar` all
# files to extract.
#
# Files are the same if they are one file of a layer that both images have: with the same inode and
# the same time of its last change.  Nothing is read for that.
#
# It needs GNU find, sort, comm, sed and tar; with others it fails.
set -eu
export LC_ALL=C

command=$1 directory=$2
shift 2

# The engine makes or mounts the other files here in each container.
for path in /dev /proc /sys /.dockerenv /run/.containerenv /etc/hosts /etc/hostname \
    /etc/mtab /etc/resolv.conf /gnu /var/guix/db /var/guix/guix-tasks; do
    set -- "$@" "$path"
done

# Prints a record for each file: type, mode, owner, group, time, size, inode, time of the last
# change, path.
_list() {
    _device=$(stat -c %d /)
    _expression=
    for _path; do
        _expression="$_expression -path $_path -prune -o"
    done
    # shellcheck disable=SC2086 # the paths contain no spaces
    find / -mindepth 1 -xdev $_expression \
        -type d -printf '%D %y %m %U %G %T@ - - - %p\0' -o \
        -printf '%D %y %m %U %G %T@ %s %i %C@ %p\0' |
        sed -nz "s/^$_device //p" | sort -z
}

_paths() {
    cut -z -d ' ' -f 9- | sort -z
}

if [ "$command" = list ]; then
    rm -rf "$directory"
    mkdir -p "$directory"
    _list "$@" >"$directory/start"
    exit
fi

scratch=/dev/shm/guix-tasks-files
mkdir -p "$scratch"
cd "$scratch"
_list "$@" >wanted
comm -z -13 "$directory/start" wanted >new
comm -z -23 "$directory/start" wanted >old
sed -nz '/^d /p' wanted | _paths >wanted-directories
sed -nz '/^d /!p' wanted | _paths >wanted-files
# A file that only has another content is replaced: programs that run here can need it.
{
    sed -nz '/^d /p' old | _paths | comm -z -23 - wanted-directories
    sed -nz '/^d /!p' old | _paths | comm -z -23 - wanted-files
} | sort -z >"$directory/removed"
# The directories above get the right times again.
{
    _paths <new
    _paths <new | cat - "$directory/removed" | sed -z 's,/[^/]*$,,' | sort -zu |
        comm -z -12 - wanted-directories
} | sort -zu | sed -z 's,^/,,' >changed
tar --create --file="$directory/changed.tar" --directory=/ --format=posix --no-recursion \
    --numeric-owner --xattrs --xattrs-include='security.capability' --xattrs-include='user.*' \
    --null --verbatim-files-from --files-from="$scratch/changed"
