#!/bin/sh
# make-channel.sh: make channel.git, a Git repository with signed commits of the directory channel/,
# and add its entry to channels.scm.  Later calls commit changes.
#
# Guix accepts a commit of a channel only with the signature of an authorized key.  To keep the
# example short, the script makes a key without a passphrase.  Use your key for a real channel.
set -eu

cd "$(dirname "$0")"
here=$PWD
repository=$here/channel.git
work=$(mktemp -d)
export GNUPGHOME="$work/gnupg"
trap 'gpgconf --kill all; rm -rf "$work"' EXIT
mkdir -m 700 "$GNUPGHOME"

sign="gpg --batch --quiet --pinentry-mode loopback --passphrase="
if [ -e channel.key ]; then
    $sign --import channel.key 2>/dev/null
else
    $sign --quick-generate-key 'Example <example@example.org>' ed25519 sign never 2>/dev/null
    (umask 077 && $sign --armor --export-secret-keys >channel.key)
fi
key=$(gpg --quiet --list-keys --with-colons | sed -n 's/^fpr:*\([0-9A-F]*\):$/\1/p' | head -n 1)

commit() { # MESSAGE
    git add --all
    git diff --cached --quiet ||
        git -c user.name=Example -c user.email=example@example.org -c user.signingkey="$key" \
            -c commit.gpgsign=true commit --quiet --message "$1"
}

if ! [ -e "$repository" ]; then
    git init --quiet --bare --template= --initial-branch=master "$work/new.git"
    git clone --quiet "$work/new.git" "$work/channel" 2>/dev/null
    cd "$work/channel"
    # The branch "keyring" contains the authorized keys.
    git checkout --quiet --orphan keyring
    gpg --armor --export "$key" >example.key
    commit 'Add the key.'
    git checkout --quiet --orphan master
    git rm --quiet -f example.key
    echo "(authorizations (version 0) ((\"$key\" (name \"example\"))))" >.guix-authorizations
    # Guix checks the signatures of this commit and of all later ones.
    commit 'Introduce the channel.'
    git push --quiet origin keyring master
    introduction=$(git rev-parse HEAD)
    mv "$work/new.git" "$repository"
    # Replace the last parenthesis of the list by the entry.
    sed '$s/)[[:space:]]*$//' "$here/channels.scm" >"$work/channels.scm"
    cat >>"$work/channels.scm" <<END

      (channel
       (name 'example)
       (url "file:///channel.git")
       (branch "master")
       (introduction
        (make-channel-introduction
         "$introduction"
         (openpgp-fingerprint "$key")))))
END
    cat "$work/channels.scm" >"$here/channels.scm"
    echo "make-channel: added the channel to channels.scm; keep channel.key secret"
fi

git clone --quiet "$repository" "$work/clone"
cd "$work/clone"
cp -R "$here/channel/." .
commit 'Update the channel.'
git push --quiet origin master
echo "make-channel: channel.git is at commit $(git rev-parse HEAD)"
