# Runs in a Debian in which the tarball was unpacked.
set -eu

said=$(/opt/announce/bin/announce /test/tests/guests.json)
echo "$said"
[ "$said" = "Please welcome Ada!
Please welcome Grace!" ]
! /opt/announce/bin/announce 2>/dev/null
