#!/bin/sh
# Check an image inside a fresh container.  Print one line per check to standard output:
# "ok NAME" or "failed NAME: reason".  The expected values are in files next to this one.
set -u
here=/var/guix/guix-tasks

ok() { printf 'ok %s\n' "$1"; }
failed() { printf 'failed %s: %s\n' "$1" "$2"; }

# Report the last line of a failed command, which is Guix's error message.
check() {
  name=$1
  shift
  if reason=$("$@" 2>&1 >/dev/null); then ok "$name"; else
    failed "$name" "$(printf '%s\n' "$reason" | tail -n 1)"
  fi
}

daemon_answers() { guix gc --references "$(readlink -f "$(command -v guix)")" || guix gc --list-roots; }

# The current time is in the derivation, so that it is never in the store already.
derivation_builds() {
  guix build --no-grafts --expression="
    (begin (use-modules (guix gexp))
      (computed-file \"guix-tasks-verify\"
        #~(call-with-output-file #\$output (lambda (port) (display \"$(date +%s%N)\" port)))))"
}

channels_match() {
  guix describe --format=channels >"$here/channels.actual"
  while read -r commit; do
    grep -q "$commit" "$here/channels.actual" || { echo "guix describe does not list $commit" >&2; return 1; }
  done <"$here/commits"
}

packages_are_installed() {
  guix package --list-installed | tr -d ' ' | cut -f 1,2,3 >"$here/packages.actual"
  while IFS='	' read -r name version output; do
    grep -qx "$name	$version	$output" "$here/packages.actual" ||
      { echo "$name@$version:$output is not in the profile" >&2; return 1; }
  done <"$here/packages"
}

certificates_exist() {
  for bundle in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt \
    /var/guix/profiles/per-user/root/guix-profile/etc/ssl/certs/ca-certificates.crt; do
    [ -n "$bundle" ] && grep -qs 'BEGIN CERTIFICATE' "$bundle" && return 0
  done
  echo 'no certificate bundle at SSL_CERT_FILE or at the paths of Debian and Guix' >&2
  return 1
}

check daemon daemon_answers
check build derivation_builds
check channels channels_match
check packages packages_are_installed
check certificates certificates_exist
