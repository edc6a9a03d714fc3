#!/bin/sh
# Installs GNU's binary tarball of Guix into a Debian base, while the image is built.
#
# GUIX_BINARY_URL      where the tarball is; nothing is done when both are empty
# GUIX_BINARY_SHA256   the sum that it must have
set -eu

readonly profile=/var/guix/profiles/per-user/root/current-guix
readonly tarball=/tmp/guix-binary.tar

url=${GUIX_BINARY_URL-}
expected=$(printf %s "${GUIX_BINARY_SHA256-}" | tr A-F a-f)
apt_updated=

_main() {
    [ -n "$url$expected" ] || return 0
    _check_arguments
    trap _clean EXIT
    # Also Guix itself needs the certificates, to pull.
    [ -e /etc/ssl/certs/ca-certificates.crt ] || _apt_install ca-certificates
    _download
    _check_sum
    _unpack
    _link
    _authorize_keys
}

_check_arguments() {
    [ -n "$url" ] || _fail "GUIX_BINARY_SHA256 is $expected, but GUIX_BINARY_URL is empty"
    case $expected in
    *[!0-9a-f]*) _fail "GUIX_BINARY_SHA256 is not a SHA-256 sum in hexadecimal: $expected" ;;
    esac
    [ "${#expected}" -eq 64 ] || [ -z "$expected" ] ||
        _fail "GUIX_BINARY_SHA256 has ${#expected} digits instead of 64: $expected"
    # The sum of what is there is not named here: it would only be copied over.
    [ -n "$expected" ] ||
        _fail "GUIX_BINARY_URL is $url, but GUIX_BINARY_SHA256, the sum it must have, is empty"
    # Its database would replace the one of the packages that are there.
    [ ! -e /var/guix/db/db.sqlite ] ||
        _fail 'the base already has a store of Guix: GUIX_BINARY_URL is for a base without'
}

# With what the base has: the slim images of Debian have neither curl nor wget, but apt.
_download() {
    if command -v curl >/dev/null; then
        curl --fail --silent --show-error --location --retry 3 --output "$tarball" "$url"
    elif command -v wget >/dev/null; then
        wget -q -O "$tarball" "$url"
    elif [ -x /usr/lib/apt/apt-helper ]; then
        /usr/lib/apt/apt-helper -o APT::Sandbox::User=root download-file "$url" "$tarball"
    else
        _fail 'the base has neither curl nor wget nor apt to download GUIX_BINARY_URL with'
    fi || _fail "cannot download $url"
}

_check_sum() {
    actual=$(sha256sum "$tarball")
    actual=${actual%% *}
    [ "$actual" = "$expected" ] ||
        _fail "$url has the SHA-256 sum $actual, but GUIX_BINARY_SHA256 is $expected"
}

_unpack() {
    # FD 37 7A 58 5A 00 begins a file of xz, which tar leaves to the program xz.
    if [ "$(head -c 6 "$tarball" | od -A n -t x1 | tr -d ' ')" = fd377a585a00 ]; then
        command -v xz >/dev/null || _apt_install xz-utils
    fi
    # The directories that the base has, as /var, stay as they are.
    tar --extract --no-overwrite-dir --directory=/ --file="$tarball" ||
        _fail "cannot unpack $url"
    [ -x "$profile/bin/guix-daemon" ] ||
        _fail "$url is not a binary tarball of Guix: it has no $profile/bin/guix-daemon"
}

# So it is in the GNU manual, for root's own guix to be the one that was unpacked.
_link() {
    mkdir -p /root/.config/guix
    ln -sf "$profile" /root/.config/guix/current
}

# The servers of the project, as the manual has it; others are authorised by a stage.
_authorize_keys() {
    for server in ci bordeaux; do
        key=$profile/share/guix/$server.guix.gnu.org.pub
        [ ! -f "$key" ] || "$profile/bin/guix" archive --authorize <"$key" ||
            _fail "cannot authorise $key"
    done
}

_apt_install() { # PACKAGE
    command -v apt-get >/dev/null || _fail "the base has no $1, and no apt to install it with"
    if [ -z "$apt_updated" ]; then
        apt-get -qq update || _fail "apt cannot update its lists, to install $1"
        apt_updated=yes
    fi
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 install \
        --yes --no-install-recommends "$1" ||
        _fail "apt cannot install $1"
}

_clean() {
    rm -f "$tarball"
    [ -z "$apt_updated" ] ||
        rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb
}

_fail() {
    echo "install-guix: error: $*" >&2
    exit 1
}

_main
