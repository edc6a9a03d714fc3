#!/bin/sh
# Makes an image ready for guix-daemon: the group `guixbuild` with ten users, the directory of
# root's profiles, and these profiles on the PATH of login shells.  It does nothing that is there
# already.
#
# The accounts are written by hand: a small base has neither useradd nor groupadd.
set -eu

readonly users=10
readonly profiles=/var/guix/profiles/per-user/root
readonly login=/etc/profile.d/guix-tasks.sh

_main() {
    _ensure_group
    _ensure_users
    mkdir -p "$profiles"
    _ensure_login_path
}

_ensure_group() {
    if ! _has /etc/group guixbuild; then
        echo "guixbuild:x:$(_free_id):" >>/etc/group
    fi
}

# The daemon runs builds as the users that the group's line lists.
_ensure_users() {
    gid=$(sed -n 's/^guixbuild:[^:]*:\([0-9]*\):.*/\1/p' /etc/group)
    members=$(sed -n 's/^guixbuild:[^:]*:[0-9]*://p' /etc/group)
    [ -z "$members" ] || return 0
    number=1
    while [ "$number" -le "$users" ]; do
        user=$(printf 'guixbuilder%02d' "$number")
        _has /etc/passwd "$user" || _add_user "$user"
        members=$members${members:+,}$user
        number=$((number + 1))
    done
    sed "s/^\(guixbuild:[^:]*:[0-9]*\):.*/\1:$members/" /etc/group >/etc/group.new
    # cat, not mv: the file keeps its owner and mode
    cat /etc/group.new >/etc/group
    rm /etc/group.new
}

# An exclamation mark for a password: nobody logs in as one of these.
_add_user() { # NAME
    echo "$1:!:$(_free_id):$gid:Guix build user ${1#guixbuilder}:/var/empty:/usr/sbin/nologin" \
        >>/etc/passwd
}

# /etc/profile replaces the PATH of the image, and then reads the files of this directory.
_ensure_login_path() {
    if ! [ -d "${login%/*}" ] || [ -e "$login" ]; then return 0; fi
    echo "PATH=$profiles/current-guix/bin:$profiles/guix-profile/bin:\$PATH" >"$login"
    chmod 644 "$login"
}

_has() { # FILE NAME
    grep -q "^$2:" "$1"
}

# The highest number for system accounts that no user and no group has.
_free_id() {
    id=999
    while grep -q "^[^:]*:[^:]*:$id:" /etc/passwd /etc/group; do
        id=$((id - 1))
    done
    echo "$id"
}

_main
