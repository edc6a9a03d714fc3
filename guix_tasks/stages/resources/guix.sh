#!/bin/sh
# `guix` as a step finds it that fetches channels: the image's own, which is given what opens
# private ones and stands for others, where there is any of that.
readonly directory=/var/guix/guix-tasks
readonly agent=/dev/shm/guix-tasks-agent

_path=$(echo ":$PATH:" | sed "s,:$directory/bin:,:,g")
_path=${_path#:}
export PATH="${_path%:}"
guix=$(command -v guix)
access=${GUIX_TASKS_ACCESS:-$directory/access}

if [ -S "$agent" ]; then export SSH_AUTH_SOCK="$agent"; fi
case "$1 ${3##*/}" in
"pull "* | "time-machine "* | 'repl resolve.scm')
    if [ -f "$access/.gitconfig" ]; then
        exec "$guix" repl -- "$directory/fetch.scm" "$access" "$guix" "$@"
    fi
    ;;
esac
exec "$guix" "$@"
