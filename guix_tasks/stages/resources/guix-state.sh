#!/bin/sh
# Prints two digests of this image, a line each: of its Guix with all that it has installed, and of
# the keys that its Guix trusts.
set -eu
export LC_ALL=C

_state() {
    ls /gnu/store
    for _link in $(find /var/guix/profiles /var/guix/gcroots /root/.guix-profile /root/.config/guix \
        -type l | sort); do
        echo "$_link $(readlink "$_link")"
    done
    cat /root/.config/guix/* /etc/guix/acl
    # Guix itself can be outside of the store.
    find /usr /opt -xdev -type f '(' -path '*guix*' -o -path '*guile*' ')' \
        -exec stat -c '%n %s %Y' {} + | sort
}

for _part in "$(_state 2>/dev/null || :)" "$(cat /etc/guix/acl 2>/dev/null || :)"; do
    echo "$_part" | sha256sum | cut -d ' ' -f 1
done
