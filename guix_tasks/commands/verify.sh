#!/bin/sh
# Checks an image from within a fresh container of it.  One line a check on standard output:
# "ok NAME" or "failed NAME: reason".  What is expected lies beside this file.
set -u
here=/var/guix/guix-tasks

ok() { printf 'ok %s\n' "$1"; }
failed() { printf 'failed %s: %s\n' "$1" "$2"; }

# The last line of a command's errors, which is where Guix says what is wrong.
check() {
  name=$1
  shift
  if reason=$("$@" 2>&1 >/dev/null); then ok "$name"; else
    failed "$name" "$(printf '%s\n' "$reason" | tail -n 1)"
  fi
}

daemon_answers() { guix gc --references "$(readlink -f "$(command -v guix)")" || guix gc --list-roots; }

# Salted, so that it is built and not found in the store.
derivation_builds() {
  guix build --no-grafts --expression="
    (begin (use-modules (guix gexp))
      (computed-file \"guix-tasks-verify\"
        #~(call-with-output-file #\$output (lambda (port) (display \"$(date +%s%N)\" port)))))"
}

channels_are_right() {
  guix describe --format=channels >"$here/channels.got"
  while read -r commit; do
    grep -q "$commit" "$here/channels.got" || { echo "$commit is not what guix describe names" >&2; return 1; }
  done <"$here/commits"
}

packages_are_there() {
  guix package --list-installed | tr -d ' ' | cut -f 1,2,3 >"$here/packages.got"
  while IFS='	' read -r name version output; do
    grep -qx "$name	$version	$output" "$here/packages.got" ||
      { echo "$name@$version:$output is not in the profile" >&2; return 1; }
  done <"$here/packages"
}

certificates_are_there() {
  for bundle in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt \
    /var/guix/profiles/per-user/root/guix-profile/etc/ssl/certs/ca-certificates.crt; do
    [ -n "$bundle" ] && grep -qs 'BEGIN CERTIFICATE' "$bundle" && return 0
  done
  echo 'no bundle of certificates where SSL_CERT_FILE, Debian or Guix has it' >&2
  return 1
}

check daemon daemon_answers
check build derivation_builds
check channels channels_are_right
check packages packages_are_there
check certificates certificates_are_there
