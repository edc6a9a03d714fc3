#!/bin/sh
# Makes Guix's store and state of this container equal to a result on the store volume:
#   assemble.sh VOLUME RESULT KEY LIMIT FILES STATE...
#
# Nothing of Guix runs here.  KEY is the name that the result gets, if it is not empty.  LIMIT is
# the size in bytes of the layers that this container already has on the base image; 0 means that
# no waste is possible.  FILES is the directory with what `other-files.sh` found, or empty if all
# other files stay.  STATE are the files and directories outside of the store that a result
# contains.  All times are fixed, so that the same result gives the same layer.
#
# It prints two sizes in bytes: of the store items that the base image does not have, and of the
# items on the volume that no result has.
#
# Exit status: 113 if the volume lacks the result or an item of it, 114 if too much of the layers
# would be waste, or if the other files cannot be changed.
set -eu
export LC_ALL=C

volume=$1 results=$1/guix-tasks/results result=$1/guix-tasks/results/$2 key=$3 limit=$4 files=$5
shift 5
scratch=/dev/shm/guix-tasks-assemble sizes=/dev/shm/guix-tasks-assemble/sizes
store=/gnu/store

[ -f "$result/items" ] || exit 113
if [ -n "$files" ]; then limit=$((limit + $(stat -c %s "$files/changed.tar"))); fi
if [ "$limit" -gt 0 ] && [ "$((limit * 5))" -gt "$(($(head -n 1 "$result/size") * 6 + 50000000))" ]; then
    exit 114
fi

mkdir -p "$scratch" "$store"
cp "$result/size" "$sizes"
sort "$result/items" >"$scratch/items"
for item in "$store"/*; do
    if [ -e "$item" ] || [ -L "$item" ]; then echo "${item##*/}"; fi
done | sort >"$scratch/present"
comm -13 "$scratch/present" "$scratch/items" >"$scratch/missing"
comm -23 "$scratch/present" "$scratch/items" >"$scratch/dead"
while read -r item; do
    [ -e "$volume/store/$item" ] || [ -L "$volume/store/$item" ] || exit 113
done <"$scratch/missing"

if [ -n "$files" ]; then
    xargs -0 rm -rf -- <"$files/removed" || exit 114
    tar --extract --file="$files/changed.tar" --directory=/ --numeric-owner --same-owner \
        --preserve-permissions --xattrs --xattrs-include='*' || exit 114
    rm -rf "$files"
fi

cd "$volume/store"
# Not cp -a: which files are hard links depends on what else is on the volume.
# shellcheck disable=SC2016 # the inner shell expands it, as below
xargs -n 100 sh -c '[ $# -eq 0 ] || cp -pPR -- "$@" /gnu/store/' sh <"$scratch/missing"
cd "$store"
if [ -z "$(find "$volume/store" -prune -user 0)" ]; then
    # shellcheck disable=SC2016
    xargs -n 100 sh -c '[ $# -eq 0 ] || chown -hR 0:0 -- "$@"' sh <"$scratch/missing"
fi
xargs rm -rf -- <"$scratch/dead"

# The engine would put an entry in the layer for each file that is written, also if it stays equal,
# and not all image stores do so.  Therefore nothing is written that is as it should be.
touch -d @1 "$scratch/one"
_own() { # PATH...
    for _path; do
        # shellcheck disable=SC3067 # dash, bash and busybox have -O
        [ -O "$_path" ] || chown 0:0 "$_path"
    done
}
_age() { # PATH...
    for _path; do
        if [ "$_path" -nt "$scratch/one" ]; then touch -h -d @1 "$_path"; fi
    done
}
_copy() { # SOURCE TARGET
    rm -f "$2"
    cp -pP "$1" "$2"
    chown -h 0:0 "$2"
}

mkdir -p /var/guix/db
rm -f /var/guix/db/db.sqlite-*
chmod 644 "$result/db/"*
for file in "$result/db/"*; do
    cmp -s "$file" "/var/guix/db/${file##*/}" || _copy "$file" "/var/guix/db/${file##*/}"
done
_own /gnu /gnu/store /var/guix /var/guix/db

tab=$(printf '\t')
_list() { # DIRECTORY PATH...
    cd "$1"
    shift
    for _path; do
        if [ -e ".$_path" ] || [ -L ".$_path" ]; then
            find ".$_path" -exec stat -c "%n$tab%F$tab%a$tab%N" {} +
        fi
    done | sort
}
# A daemon without root has a directory for profiles of its own.
for path in "$result/state/var/guix/profiles/per-user"/*; do
    [ "${path##*/}" = root ] || rmdir "$path" 2>/dev/null || :
done
: >"$scratch/changed"
(_list / "$@") >"$scratch/state"
(_list "$result/state" "$@") >"$scratch/wanted"
cd /
comm -23 "$scratch/state" "$scratch/wanted" | while IFS=$tab read -r path type _; do
    wanted=$result/state/$path
    if [ "$type" != directory ] || [ -L "$wanted" ] || [ ! -d "$wanted" ]; then rm -rf "$path"; fi
    echo "$path" >>"$scratch/changed"
done
comm -13 "$scratch/state" "$scratch/wanted" | while IFS=$tab read -r path type mode _; do
    mkdir -p "${path%/*}"
    if [ "$type" = directory ]; then
        mkdir -p "$path"
        chmod "$mode" "$path"
        _own "$path"
    else
        _copy "$result/state/$path" "$path"
    fi
    echo "$path" >>"$scratch/changed"
done
comm -12 "$scratch/state" "$scratch/wanted" | while IFS=$tab read -r path type _; do
    case $type in
    regular*)
        cmp -s "$result/state/$path" "$path" && continue
        _copy "$result/state/$path" "$path"
        echo "$path" >>"$scratch/changed"
        ;;
    esac
done
for path; do
    if [ -e "$path" ] || [ -L "$path" ]; then
        find "$path" -newer "$scratch/one" -exec touch -h -d @1 {} +
    fi
    # The engine changes the time of /etc in each container, but that is in no layer.
    grep -q "^\.$path" "$scratch/changed" || continue
    parent=${path%/*}
    while [ -n "$parent" ]; do
        _age "$parent"
        parent=${parent%/*}
    done
done

if [ -n "$key" ] && [ "$result" != "$results/$key" ]; then
    rm -rf "${results:?}/$key"
    mv "$result" "$results/$key"
fi
_age /gnu/store /gnu /var/guix/db/* /var/guix/db
_age /var/guix /var
cat "$sizes"
