#!/bin/bash
# make.sh: make the substitutes and channels with which a real Guix works without a network.
#
# Run in a container of a Debian image with Guix; loopback is the only network it needs.
#   /debs     Debian packages that the image lacks: busybox-static git gpg gpg-agent hello
#             install-info patchelf, and their dependencies
#   /example  this directory
#   /out      the result; OWNER=UID:GID is its owner
# The result, which is used at /offline:
#   substitutes/         a substitute server as a directory; substitutes.pub is its key
#   channels/            the Git repositories "guix" and "offline", with signed commits
#   channels.scm         both channels with their introductions; moved into place last
set -euo pipefail

example=/example
result=/out
url=file:///offline/channels
owner=${OWNER:-0:0}

export HOME=/root LC_ALL=C.UTF-8
export GUIX_DAEMON_SOCKET=/var/guix/daemon-socket/socket

say() { echo "$*" >&2; }

# install_debs: install the tools of this script, and the programs for the seeds.
install_debs() {
  # The image excludes documentation, but the seed of "hello" needs its manual.
  dpkg --install --path-include='/usr/share/info/hello*' /debs/*.deb >/dev/null
}

start_guix() {
  guix-daemon --no-substitutes 2>/dev/null &
  until [ -S "$GUIX_DAEMON_SOCKET" ]; do sleep 0.01; done
}

# --- seeds: programs of Debian, at the store paths of Guix's package graph ---

declare -A output derivation

read_outputs() {
  local name item drv
  while read -r name item drv; do
    output[$name]=$item
    derivation[$name]=$drv
    rm -rf "$item"
  done < <(guix repl "$example/seed/outputs.scm")
  [ -n "${output[hello]-}" ] || { say "cannot get the store paths of the packages from guix"; return 1; }
}

# relocate OUTPUT PROGRAM NAME LIBRARIES: copy a program of Debian into OUTPUT/bin/NAME, with
# its libraries into OUTPUT/LIBRARIES, so that it needs nothing outside of OUTPUT.
relocate() {
  local out=$1 program=$2 name=$3 libraries=$1/$4 loader library
  mkdir -p "$out/bin" "$libraries"
  cp -L "$program" "$out/bin/$name"
  while read -r library; do
    cp -Lu "$library" "$libraries/"
  done < <(ldd "$program" | grep -o '/[^ ]*')
  loader=$libraries/$(basename "$(patchelf --print-interpreter "$program")")
  patchelf --set-interpreter "$loader" --set-rpath "$libraries" "$out/bin/$name"
  for library in "$libraries"/*.so*; do
    case $library in
      "$loader" | */libc.so.6) ;;
      *) patchelf --set-rpath "$libraries" "$library" ;;
    esac
  done
}

# script FILE INTERPRETER: write a shell script from standard input.  The build environment has no
# /bin/sh, so the interpreter is a copied shell.
script() {
  { echo "#!$2"; cat; } >"$1"
  chmod 755 "$1"
}

copy_shell() { # OUTPUT
  mkdir -p "$1/libexec"
  cp "$(command -v busybox)" "$1/libexec/sh"
}

seed_guile() {
  local out=${output[guile]} lib
  lib=$(echo /usr/lib/*/guile/3.0/bin)
  lib=${lib%/guile/3.0/bin}
  relocate "$out" "$lib/guile/3.0/bin/guile" .guile-real lib
  copy_shell "$out"
  mkdir -p "$out/share/guile" "$out/lib/guile/3.0" "$out/lib/locale" "$out/lib/gconv"
  cp -r /usr/share/guile/3.0 "$out/share/guile/"
  cp -r "$lib/guile/3.0/ccache" "$lib/guile/3.0/extensions" "$out/lib/guile/3.0/"
  cp -r "$lib"/gconv/gconv-modules* "$lib"/gconv/{ISO8859-1,ISO8859-15,UTF-16,UTF-32,UTF-7}.so \
    "$out/lib/gconv/"
  cp -rL /usr/lib/locale/C.utf8 "$out/lib/locale/"
  ln -s C.utf8 "$out/lib/locale/en_US.utf8"
  script "$out/bin/guile" "$out/libexec/sh" <<END
export GUILE_SYSTEM_PATH=$out/share/guile/3.0
export GUILE_SYSTEM_COMPILED_PATH=$out/lib/guile/3.0/ccache
export GUILE_SYSTEM_EXTENSIONS_PATH=$out/lib/guile/3.0/extensions
export LOCPATH=\${LOCPATH:-$out/lib/locale}
export GCONV_PATH=$out/lib/gconv
exec $out/bin/.guile-real "\$@"
END
  mkdir -p "${output[guile-3.0]}/bin"
  ln -s "$out/bin/guile" "${output[guile-3.0]}/bin/"
  ln -s "$out/share" "$out/lib" "${output[guile-3.0]}/"
}

seed_tar() {
  local out=${output[tar]}
  relocate "$out" "$(command -v tar)" .tar-real libexec/tar
  copy_shell "$out"
  # tar starts a compressor (-I PROGRAM) with /bin/sh, so use a pipe to create an archive.
  { echo "real=$out/bin/.tar-real"; cat <<'END'; } | script "$out/bin/tar" "$out/libexec/sh"
set -o pipefail
[ "${1-}" = -cvf ] || exec "$real" "$@"
archive=$2
shift 2
compressor=
left=$#
while [ "$left" -gt 0 ]; do
  argument=$1
  shift
  left=$((left - 1))
  if [ "$argument" = -I ]; then
    compressor=$1
    shift
    left=$((left - 1))
  else
    set -- "$@" "$argument"
  fi
done
[ -n "$compressor" ] || exec "$real" -cvf "$archive" "$@"
"$real" -cvf - "$@" | $compressor >"$archive"
END
}

# seed_libraries OUTPUT NAME...: copy libraries of Debian that depend only on libc.
seed_libraries() {
  local lib=$1/lib name
  shift
  mkdir -p "$lib"
  for name; do
    cp -L /usr/lib/*/"$name" "$lib/"
    patchelf --set-rpath "$lib" "$lib/$name"
  done
}

# seed_modules OUTPUT MODULE: copy the source of a library of Debian's Guile.
seed_modules() {
  local site=$1/share/guile/site/3.0
  mkdir -p "$site"
  cp -r "/usr/share/guile/site/3.0/$2"* "$site/"
}

# "guix pack --format=docker" writes JSON with this library: an older version than Debian's, in
# which JSON's null has a different value.
seed_guile_json() {
  local site=${output[guile-json]}/share/guile/site/3.0
  seed_modules "${output[guile-json]}" json
  sed -i "s/(null 'null)/(null #nil)/" "$site/json/builder.scm"
}

# "guix pack" computes checksums with this library.
seed_guile_gcrypt() {
  local out=${output[guile-gcrypt]}
  seed_modules "$out" gcrypt
  seed_libraries "$out" libgcrypt.so.20 libgpg-error.so.0
  ln -s libgcrypt.so.20 "$out/lib/libgcrypt.so"
  sed -i "s,\"libgcrypt\",\"$out/lib/libgcrypt\"," \
    "$out/share/guile/site/3.0/gcrypt/package-config.scm"
}

make_seeds() {
  seed_guile
  seed_tar
  seed_guile_json
  seed_guile_gcrypt
  seed_libraries "${output[libgc]}" libgc.so.1
  seed_libraries "${output[libunistring]}" libunistring.so.5
  relocate "${output[texinfo]}" "$(command -v install-info)" install-info libexec/texinfo
  relocate "${output[gzip]}" "$(command -v gzip)" gzip libexec/gzip
  relocate "${output[hello]}" "$(command -v hello)" hello libexec/hello
  mkdir -p "${output[hello]}/share/info" "${output[locales]}/lib/locale"
  gzip -dc /usr/share/info/hello.info.gz >"${output[hello]}/share/info/hello.info"
  cp -r "${output[guile]}/lib/locale" "${output[locales]}/lib/locale/2.41"
  # Profile hooks name these, but have no fonts to run them on.
  mkdir -p "${output[mkfontscale]}/bin" "${output[mkfontdir]}/bin"
}

register_seeds() {
  local name references list
  list=$(mktemp)
  for name in "${!output[@]}"; do
    references=${output[$name]}
    [ "$name" != guile-3.0 ] || references+=" ${output[guile]}"
    echo "${output[$name]} ${derivation[$name]} $references"
  done >"$list"
  guix repl -- "$example/seed/register.scm" "$list"
}

# publish DIRECTORY: store the files that "guix publish" serves for the seeds.
publish() {
  local directory=$1 server=http://127.0.0.1:8181 item hash nar
  fetch() { busybox wget -q -O "$directory/$1" "$server/$1"; }
  mkdir -p "$directory"
  guix archive --generate-key='(genkey (ecdsa (curve Ed25519) (flags rfc6979)))' 2>/dev/null
  guix publish --listen=127.0.0.1 --port=8181 >/dev/null 2>&1 &
  until fetch nix-cache-info 2>/dev/null; do sleep 0.05; done
  for item in "${output[@]}"; do
    hash=$(basename "$item" | cut -d- -f1)
    fetch "$hash.narinfo"
    nar=$(sed -n 's/^URL: //p' "$directory/$hash.narinfo")
    mkdir -p "$directory/$(dirname "$nar")"
    fetch "$nar"
  done
}

# --- channels: Git repositories that "guix pull" authenticates ---

# make_channels DIRECTORY FILE: make repositories in DIRECTORY, and their channel list in FILE.
make_channels() {
  local directory=$1 file=$2 channel fingerprint introduction
  GNUPGHOME=$(mktemp -d)
  export GNUPGHOME
  echo trust-model always >"$GNUPGHOME/gpg.conf"
  gpg --batch --quiet --pinentry-mode loopback --passphrase '' \
    --quick-generate-key 'Offline <offline@example.org>' ed25519 sign never 2>/dev/null
  fingerprint=$(gpg --list-keys --with-colons | sed -n 's/^fpr:*\([0-9A-F]*\):$/\1/p' | head -n 1)
  git config --global user.name Offline
  git config --global user.email offline@example.org
  git config --global user.signingkey "$fingerprint"
  git config --global commit.gpgsign true
  git config --global init.defaultBranch master
  for channel in guix offline; do
    git init --quiet "$directory/$channel"
    introduction=$(make_commits "$directory/$channel" "$example/channels/$channel" "$fingerprint")
    cat <<END
 (channel
  (name '$channel)
  (url "$url/$channel")
  (introduction
   (make-channel-introduction
    "$introduction"
    (openpgp-fingerprint "$fingerprint"))))
END
  done | { echo '(list'; sed '$s/$/)/'; } >"$file"
  gpgconf --kill all
}

# make_commits REPOSITORY SOURCE FINGERPRINT: print the commit that introduces the channel.
make_commits() (
  cd "$1"
  git checkout --quiet --orphan keyring
  gpg --armor --export "$3" >offline.key
  git add offline.key
  git commit --quiet --message 'Add the key.'
  git checkout --quiet --orphan master
  git rm --quiet -f offline.key
  cp -r "$2/." .
  # The owner of this key may sign commits, from the first one on.
  echo "(authorizations (version 0) ((\"$3\" (name \"offline\"))))" >.guix-authorizations
  git add --all
  git commit --quiet --message 'Begin the channel.'
  git rev-parse HEAD
  # "guix pull" checks commits after the introduction.
  date >.updated
  git add --all
  git commit --quiet --message 'Update the channel.'
)

main() {
  local new part
  rm -rf "$result"/.unfinished.* # left by a killed run
  new=$(mktemp -d "$result/.unfinished.XXXXXX")
  # shellcheck disable=SC2064 # expand the variable now
  trap "rm -rf '$new'" EXIT
  install_debs
  say "making the channels"
  make_channels "$new/channels" "$new/channels.scm"
  say "making the substitutes"
  start_guix
  read_outputs
  make_seeds
  register_seeds
  publish "$new/substitutes"
  cp /etc/guix/signing-key.pub "$new/substitutes.pub"
  chmod -R u+rwX,go+rX "$new"
  chown -R "$owner" "$new"
  # Guix is root in its container and opens only repositories of root.  The group can still delete
  # them.
  chown 0 "$new"/channels/*/ "$new"/channels/*/.git
  chmod g+w "$new"/channels/*/ "$new"/channels/*/.git
  # channels.scm marks a complete result, so it is removed first and moved last.
  rm -rf "$result/channels.scm" "$result/channels" "$result/substitutes" "$result/substitutes.pub"
  for part in channels substitutes substitutes.pub channels.scm; do
    mv "$new/$part" "$result/"
  done
}

main
