# Runs in a Debian in which the tarball was unpacked.
set -eu

said=$(/bin/announce /test/tests/guests.json)
echo "$said"
[ "$said" = "Please welcome Ada!
Please welcome Grace!" ]
! /bin/announce 2>/dev/null
