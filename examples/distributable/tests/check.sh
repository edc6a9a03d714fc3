# Run in a Debian container in which the tarball is unpacked.
set -eu

output=$(/opt/announce/bin/announce /test/tests/guests.json)
echo "$output"
[ "$output" = "Please welcome Ada!
Please welcome Grace!" ]
! /opt/announce/bin/announce 2>/dev/null
