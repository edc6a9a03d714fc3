#!/bin/sh
# Runs a command with a Guix daemon next to it:  entry-point.sh [COMMAND [ARGUMENT]...]
#
# Starts guix-daemon, waits until its socket answers, runs COMMAND (a shell where none is
# given), stops the daemon with all its builds, waits until the store's database is clean,
# and exits with COMMAND's own status; with 69 if no daemon is available.
# HUP, INT, QUIT and TERM are passed on to COMMAND and to the processes it started.
#
# What it reads from the environment:
#   GUIX_SUBSTITUTE_URLS, GUIX_CORES, GUIX_MAX_JOBS   options of the daemon
#   GUIX_SANDBOX=nochroot    builds are not isolated (--disable-chroot)
#   GUIX_SANDBOX=rootless    the daemon runs as who calls this; the store and the directories of
#                            Guix's state have to be that user's
#   GUIX_DAEMON_TIMEOUT      seconds to wait for the daemon's socket; 30 by default
#   GUIX_DATABASE_DIRECTORY  directory of the daemon's database; /var/guix/db by default
#   GUIX_DAEMON_SOCKET       set to another socket: that daemon is used, none is started
#
# guix-tasks copies this file into its work containers, into /var/guix/guix-tasks, with the
# files `environment`, `keys/*.pub`, `local-server.pub` and `mount-points` next to it.  It removes that
# directory at its end, so that a commit does not hold it.
#
# It has to work under dash, bash and busybox, as process 1 and otherwise.  It looks into
# /proc instead of calling ps, pgrep or ss, which an image need not have, and it does not use
# the built-in `read`, which in busybox never returns once a signal was caught (seen in 1.38).

readonly _unavailable=69 # EX_UNAVAILABLE of sysexits.h
readonly _profiles=/var/guix/profiles/per-user/root
readonly _socket=/var/guix/daemon-socket/socket
readonly _build_logs=/var/log/guix/drvs
readonly _links=/gnu/store/.links
readonly _work_directory=/var/guix/guix-tasks

_directory=      # the work directory, where this process is the one that removes it
_scratch=     # a directory for the daemon's output
_daemon=      # its process
_command=     # the command's process
_canary=      # see _start_canary
_interrupted= # the number of the last signal caught
_pending=     # the name of a signal that the command has not got yet
_resettable=  # yes where env can give a process the default action of a signal
_git_settings= # a file of git's, where this process has made it
_configuration= # the directory of the daemon's configuration, where it is not /etc/guix
_access=      # a directory in memory, with what opens private channels
_status=0

# Guix itself would fetch and build one thing at a time. Each build may use all processors, so
# there are not to be many.
_usual_jobs() {
    _jobs=$(nproc 2>/dev/null || echo 1)
    if [ "$_jobs" -lt 4 ]; then echo "$_jobs"; else echo 4; fi
}

_main() {
    _use_work_directory
    _hide_access
    _trust_extra_authorities
    _set_path
    [ $# -gt 0 ] || set -- "$(command -v bash || command -v sh)"
    if ! _may_be_daemon || _other_daemon; then
        [ -n "$_directory" ] || exec "$@"
        _prepare_to_run
        _run "$@"
    else
        _prepare_to_run
        _run_with_daemon "$@"
    fi
    _remove_folders
    exit "$_status"
}

# With a read-only file system there can be no daemon, and what is installed runs without one.
_may_be_daemon() {
    if [ -d /var/guix ] && ! [ -w /var/guix ]; then return 1; fi
    [ "$(id -u)" -eq 0 ] || [ "${GUIX_SANDBOX-}" = rootless ]
}

# A command in a work container may call this file again; the first call owns the directory.
_use_work_directory() {
    case $0 in
    "$_work_directory"/*) [ -e "$_work_directory/running" ] || _directory=$_work_directory ;;
    esac
    [ -n "$_directory" ] || return 0
    echo $$ 2>/dev/null >"$_directory/running"
    [ -f "$_directory/environment" ] || return 0
    set -a
    # shellcheck source=/dev/null
    . "$_directory/environment"
    set +a
    # It may hold a password, and a container that is killed may be committed.  In a step of a
    # build it is a mount.
    rm -f "$_directory/environment" 2>/dev/null || :
}

# What opens private channels goes where no commit finds it, for the same reason.
_hide_access() {
    if ! [ -d "${_directory:-/}/access" ]; then return 0; fi
    _access=$(mktemp -d /dev/shm/guix-tasks-access.XXXXXX 2>/dev/null) || return 0
    cp -R "$_directory/access/." "$_access" && export GUIX_TASKS_ACCESS="$_access"
    rm -rf "$_directory/access" 2>/dev/null || :
}

# Guix reads a directory for its downloads, and a file for Git; here they have the same.  Programs
# that builds run as another user also read them.
_trust_extra_authorities() {
    if ! [ -s "${_directory:-/}/extra-ca.pem" ]; then return 0; fi
    _own=/etc/ssl/certs/ca-certificates.crt
    for _file in /etc/ssl/certs/ca-bundle.crt "$_profiles/guix-profile$_own"; do
        [ -f "$_own" ] || _own=$_file
    done
    if [ -f "${SSL_CERT_FILE-}" ]; then _own=$SSL_CERT_FILE; fi
    mkdir -p "$_directory/certificates"
    for _file in "$_own" "$_directory/extra-ca.pem"; do
        cat "$_file" 2>/dev/null && echo
    done >"$_directory/certificates/all.pem"
    chmod 755 "$_directory/certificates"
    chmod 644 "$_directory/certificates/all.pem"
    export SSL_CERT_DIR="$_directory/certificates" SSL_CERT_FILE="$_directory/certificates/all.pem"
    export GUIX_TLS_CERTIFICATE_DIRECTORY="$SSL_CERT_DIR"
    export GIT_SSL_CAINFO="$SSL_CERT_FILE" CURL_CA_BUNDLE="$SSL_CERT_FILE"
}

# Also where the profiles do not exist yet: the command may be what makes them.
_set_path() {
    for _bin in "$_profiles/guix-profile/bin" "$_profiles/current-guix/bin"; do
        case :$PATH: in
        *":$_bin:"*) ;;
        *) PATH=$_bin:$PATH ;;
        esac
    done
    if [ -n "$_directory" ] && [ -d "$_directory/bin" ]; then PATH=$_directory/bin:$PATH; fi
    export PATH
}

_prepare_to_run() {
    trap '_catch HUP 1' HUP
    trap '_catch INT 2' INT
    trap '_catch QUIT 3' QUIT
    trap '_catch TERM 15' TERM
    # sh gives a background command /dev/null as its input: keep ours at hand.  The test is
    # in a subshell because a failed exec ends the shell.
    if (exec 3<&0) 2>/dev/null; then exec 3<&0; else exec 3</dev/null; fi
    # And it has it ignore INT and QUIT, which no POSIX shell can undo, but GNU's env can.
    if env --default-signal=INT,QUIT true 2>/dev/null; then _resettable=yes; fi
}

_run_with_daemon() {
    # /dev/shm is memory in a container, and never part of a commit.
    _scratch=$(mktemp -d /dev/shm/guix-daemon.XXXXXX 2>/dev/null || mktemp -d) || {
        _fail 'no place for temporary files'
        return
    }
    : >"$_scratch/start"
    [ -n "${HOME-}" ] || HOME=~root
    export HOME
    _remove_stale_build_folders
    _trust_repositories
    if _authorize_keys && _authorize_nearby && _start_daemon && _await_daemon && _recover_database; then
        _run "$@"
        if ! _is_alive "$_daemon"; then
            _say 'guix-daemon ended before the command did:'
            tail -n 20 "$_scratch/daemon.log" >&2
        fi
        _stop_daemon
        _report_failure
    elif [ -n "$_daemon" ]; then
        _stop_daemon
    fi
    _remove_stale_build_folders
}

# --- the command -----------------------------------------------------------------------

_run() {
    if [ -n "$_interrupted" ]; then
        _status=$((128 + _interrupted))
        return
    fi
    # To env, a word with an equals sign is a variable.
    case $1 in *=*) _resettable= ;; esac
    if [ -n "$_resettable" ]; then
        set -- env --default-signal=INT,QUIT -- "$@"
    elif [ -t 0 ]; then
        # Ctrl-C has to work.  The price: a signal that comes from elsewhere than the
        # terminal waits for the command's end.
        (exec "$@")
        _status=$?
        return
    fi
    # In the background, because a shell acts on a signal only while it waits for such a
    # command.  It stays in our process group, so it is in the foreground of the terminal
    # whenever we are, and an interactive shell in it can have its job control.
    (exec "$@") <&3 3<&- &
    _command=$!
    _start_canary
    _pass_on
    _await_command
}

# The true status of the command: `wait` also returns when a signal is caught.
_await_command() {
    _before=
    while :; do
        _caught=
        wait "$_command" 2>/dev/null # bash reports here who was killed
        _status=$?
        [ -n "$_caught" ] || break
        _before=$_status
    done
    # The command can have ended at the moment of the signal, and dash knows the status
    # of a process only once.
    if [ "$_status" -eq 127 ] && [ -n "$_before" ]; then _status=$_before; fi
    _command=
    if [ -n "$_canary" ]; then
        kill -s KILL "$_canary"
        wait "$_canary"
        _canary=
    fi 2>/dev/null
}

# shellcheck disable=SC2329 # the traps call it
_catch() { # NAME NUMBER
    _caught=yes
    _interrupted=$2
    if [ "$1" = INT ] && _terminal_did_it; then return; fi
    _pending=$1
    _pass_on
}

# Ctrl-C at the terminal reaches the command without us, `docker kill -s INT` does not, and
# a second interrupt is not the same as one.  A process in the same group that dies of the
# first kind tells them apart.
_start_canary() {
    _canary=
    [ -t 0 ] && [ -n "$_resettable" ] || return 0
    env --default-signal=INT sleep 2147483647 </dev/null >/dev/null 2>&1 3<&- &
    _canary=$!
}

# shellcheck disable=SC2329
_terminal_did_it() {
    [ -n "$_canary" ] || return 1
    sleep 0.02
    if _is_alive "$_canary"; then return 1; fi
    _start_canary
}

# To the command and all below it, as a terminal would: a script that waits for a build
# does not hand on a signal that only the script got.
_pass_on() {
    [ -n "$_pending" ] && [ -n "$_command" ] || return 0
    _signal=$_pending
    _pending=
    _await_exec "$_command"
    if [ "$_signal" = INT ] && [ -z "$_resettable" ]; then _signal=TERM; fi
    _find_tree "$_command"
    # shellcheck disable=SC2086 # a list of numbers
    kill -s "$_signal" $_tree 2>/dev/null
    # An interactive shell takes no notice of TERM.
    # shellcheck disable=SC2086
    if [ "$_signal" = TERM ] && [ -t 0 ]; then kill -s HUP $_tree 2>/dev/null; fi
    return 0
}

# --- the daemon ------------------------------------------------------------------------

# Whether commands have another daemon than one that we would start.
_other_daemon() {
    case ${GUIX_DAEMON_SOCKET:-$_socket} in
    "$_socket" | "file://$_socket") ;;
    *) return 0 ;;
    esac
    [ -S "$_socket" ] || return 1
    # shellcheck disable=SC2013 # names without white space, one a line; so below
    for _pid in $(grep -l guix-daemon /proc/[0-9]*/comm 2>/dev/null); do
        _pid=${_pid#/proc/}
        if _is_listening "${_pid%/comm}"; then return 0; fi
    done
    # A socket file without a process stays behind from a container that was killed, or is
    # mounted from where we see no processes; then only a real connection tells.
    _is_mounted "$_socket" && _connect
}

_is_mounted() { # FILE
    # shellcheck disable=SC2013
    for _point in $(cut -d ' ' -f 5 /proc/self/mountinfo); do
        [ "$_point" != / ] || continue
        case $1 in "$_point" | "$_point"/*) return 0 ;; esac
    done
    return 1
}

_connect() {
    _script=$(mktemp) || return 1
    echo '(use-modules (guix store)) (with-store store #t)' >"$_script"
    guix repl "$_script" </dev/null >/dev/null 2>&1
    set -- $?
    rm -f "$_script"
    return "$1"
}

_authorize_keys() {
    [ -n "$_directory" ] || return 0
    for _key in "$_directory"/keys/*.pub; do
        if ! [ -f "$_key" ] || _is_authorized "$_key"; then continue; fi
        guix archive --authorize <"$_key" || {
            _fail "cannot authorise the substitute key ${_key##*/}"
            return 1
        }
    done
}

# A server that is there today is none of the image's: only the daemon, and only now, trusts it,
# by a list of its own.
_authorize_nearby() {
    [ -n "$_directory" ] && [ -f "$_directory/local-server.pub" ] || return 0
    _configuration=$_scratch/configuration
    mkdir "$_configuration"
    for _file in /etc/guix/*; do
        if [ -e "$_file" ]; then ln -s "$_file" "$_configuration/"; fi
    done
    rm -f "$_configuration/acl"
    if [ -e /etc/guix/acl ]; then cp /etc/guix/acl "$_configuration/"; fi
    GUIX_CONFIGURATION_DIRECTORY=$_configuration guix archive --authorize <"$_directory/local-server.pub" || {
        _fail 'cannot authorise the key of the substitute server of this machine'
        return 1
    }
}

# Saves a start of Guile where an earlier stage has authorised the key.
_is_authorized() { # FILE
    _point=$(sed -n 's/.*(q *\(#[0-9A-Fa-f]*#\)).*/\1/p' "$1")
    [ -n "$_point" ] && grep -qiF "$_point" /etc/guix/acl 2>/dev/null
}

# Channels at file:// URLs may be anybody's.  What is trusted is who signed their commits.
_trust_repositories() {
    if [ -z "$_directory" ] || [ -e "$HOME/.gitconfig" ]; then return 0; fi
    _git_settings=$HOME/.gitconfig
    printf '[safe]\n\tdirectory = *\n' >"$_git_settings"
}

# The daemon stores equal files once, by links, and Linux lets nobody link to files of others
# (proc(5), protected_hardlinks), as those of lower layers are where it is not root.
_start_links_anew() {
    for _link in "$_links"/*; do
        # shellcheck disable=SC3067 # dash, bash and busybox have -O
        if [ -f "$_link" ] && ! [ -O "$_link" ]; then
            rm -rf "$_links"
            mkdir "$_links"
            break
        fi
    done
}

_start_daemon() {
    _program=$_profiles/current-guix/bin/guix-daemon
    [ -x "$_program" ] || _program=$(command -v guix-daemon) || {
        _fail 'this image has no guix-daemon: it was built on a base without Guix'
        return 1
    }
    set -- "$_program"
    if [ "$(id -u)" -ne 0 ]; then
        _start_links_anew
    elif grep -q '^guixbuild:[^:]*:[^:]*:.' /etc/group; then # it has members
        set -- "$@" --build-users-group=guixbuild
    fi
    if [ -n "${GUIX_SUBSTITUTE_URLS-}" ]; then
        set -- "$@" --substitute-urls="$GUIX_SUBSTITUTE_URLS"
    fi
    if [ -n "${GUIX_CORES-}" ]; then set -- "$@" --cores="$GUIX_CORES"; fi
    set -- "$@" --max-jobs="${GUIX_MAX_JOBS:-$(_usual_jobs)}"
    if [ "${GUIX_SANDBOX-}" = nochroot ]; then set -- "$@" --disable-chroot; fi
    # The daemon would start a program, which takes 0.3 s, to learn that there is no other machine.
    if ! [ -f "${_configuration:-/etc/guix}/machines.scm" ]; then set -- "$@" --no-offload; fi
    # Substitutes have file names beyond ASCII, and the daemon's helpers obey the locale.
    set -- env LC_ALL="${LC_ALL:-C.UTF-8}" \
        ${_configuration:+"GUIX_CONFIGURATION_DIRECTORY=$_configuration"} "$@"
    if [ -n "$_resettable" ]; then
        shift
        set -- env --default-signal=INT,QUIT "$@"
    fi
    # Ctrl-C is for the command, not for the daemon and its builds.
    if command -v setsid >/dev/null; then set -- setsid "$@"; fi
    rm -f "$_socket"
    "$@" </dev/null >"$_scratch/daemon.log" 2>&1 3<&- &
    _daemon=$!
}

_await_daemon() {
    _limit=${GUIX_DAEMON_TIMEOUT:-30}
    case $_limit in *[!0-9]*) _limit=30 ;; esac
    _set_deadline "$_limit"
    until _answers; do
        if ! _is_alive "$_daemon"; then
            wait "$_daemon" 2>/dev/null
            _fail "guix-daemon ended with status $? before its socket answered:"
        elif [ -n "$_interrupted" ]; then
            _status=$((128 + _interrupted))
            _await_exec "$_daemon"
            return 1
        elif _is_past_deadline; then
            _fail "guix-daemon's socket did not answer within $_limit s:"
        else
            _pause
            continue
        fi
        tail -n 20 "$_scratch/daemon.log" >&2
        return 1
    done
}

_answers() {
    [ -S "$_socket" ] || return 1
    if ! [ -r /proc/net/unix ] || ! [ -r "/proc/$_daemon/fd" ]; then
        # Nothing to tell by: the daemon has made the file, and listens the moment after.
        _pause
        _pause
        return 0
    fi
    _find_tree "$_daemon" # Guix's programs are often wrapped in scripts
    for _pid in $_tree; do
        if _is_listening "$_pid"; then return 0; fi
    done
    return 1
}

# Whether the process has a listening socket.  The names in /proc/net/unix prove nothing:
# with the host's network, it also lists the sockets of other containers.
_is_listening() { # PID
    # Num RefCount Protocol Flags Type St Inode Path; a flag says that it listens
    _listening=$(
        sed -n 's/^\([^ ]* \)\{3\}00010000 [^ ]* [^ ]* *\([0-9]*\).*/ \2 /p' /proc/net/unix
    )
    # shellcheck disable=SC2012 # ls is everywhere, and here it prints socket:[INODE]
    _sockets=$(ls -l "/proc/$1/fd" 2>/dev/null | sed -n 's/.*-> socket:\[\([0-9]*\)]$/\1/p')
    for _inode in $_sockets; do
        case $_listening in *" $_inode "*) return 0 ;; esac
    done
    return 1
}

_log_of_database() {
    echo "${GUIX_DATABASE_DIRECTORY:-/var/guix/db}/db.sqlite-wal"
}

# A container that was killed in a build, and committed, holds a write-ahead log.  The
# daemon works it off when a client comes, which the command need not be.
_recover_database() {
    if [ -s "$(_log_of_database)" ]; then _connect; fi
    return 0
}

# TERM to the daemon ends only its main process.  The workers, one for each client, go on;
# they end when their client has gone, or with TERM, and then take their builders with
# them.  KILL would leave the builders behind.
_stop_daemon() {
    _find_tree "$_daemon"
    set -- "$_tree"
    kill "$_daemon" 2>/dev/null
    # shellcheck disable=SC2086 # a list of numbers, here and below
    _await_end 1 $1 || {
        for _pid in $1; do
            if grep -q guix-daemon "/proc/$_pid/comm"; then kill "$_pid"; fi 2>/dev/null
        done
        _await_end 3 $1
    } || {
        _find_tree $1
        kill -s KILL $_tree 2>/dev/null
        _await_end 1 $_tree
    }
    wait "$_daemon" 2>/dev/null
    _set_deadline 3
    while [ -s "$(_log_of_database)" ]; do
        if _is_past_deadline; then
            _say "warning: $(_log_of_database) is not empty; the next daemon recovers it"
            break
        fi
        _pause
    done
    rm -f "$_socket"
}

# --- what is left behind ---------------------------------------------------------------

_report_failure() {
    if [ "$_status" -eq 0 ] || [ -n "$_interrupted" ]; then return; fi
    _count=0
    # Names in the store have no white space.
    _logs=$(find "$_build_logs" -type f -name '*.drv*' -newer "$_scratch/start" 2>/dev/null)
    for _log in $_logs; do
        _derivation=${_log#"$_build_logs/"}
        _derivation=${_derivation%.gz}
        _derivation=${_derivation%.bz2}
        _derivation=/gnu/store/${_derivation%%/*}${_derivation#*/}
        _has_failed "$_derivation" || continue
        _count=$((_count + 1))
        if [ "$_count" -gt 5 ]; then break; fi
        _lines=$(_print_log "$_log" | tail -n 40)
        if [ -n "$_lines" ]; then
            _say "the last lines of the build log of $_derivation:"
            printf '%s\n' "$_lines" >&2
        fi
    done
    # The daemon also prints a line when it gets a signal that a client closed its
    # connection, and the connection is still open.
    grep -v -e '^accepted connection from' -e '^spurious SIGPOLL$' "$_scratch/daemon.log" |
        tail -n 20 >"$_scratch/messages"
    if [ -s "$_scratch/messages" ]; then
        _say 'the last lines of guix-daemon:'
        cat "$_scratch/messages" >&2
    fi
    if grep -q '^accepted connection from' "$_scratch/daemon.log" && ! _may_isolate; then
        _say 'this container has no right to build packages: run it with --privileged'
    fi
}

# Whether the daemon may start isolated builds as its build users: it needs CAP_SYS_ADMIN, bit 21.
_may_isolate() {
    if [ "$(id -u)" -ne 0 ] || [ "${GUIX_SANDBOX-}" = nochroot ]; then return 0; fi
    _rights=$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)
    [ $((0x${_rights:-0} >> 21 & 1)) -eq 1 ]
}

# Whether the first output that the derivation names is not in the store, or is what a failed build
# left there: the time of a valid item is fixed.  A derivation is one line,
# Derive([("out","/gnu/store/...","",""),...
_has_failed() { # DERIVATION
    [ -f "$1" ] || return 1
    _output=$(sed 's/^Derive(\[("[^"]*","\([^"]*\)".*/\1/' "$1")
    ! [ -e "$_output" ] || [ "$_output" -nt "$_scratch/start" ]
}

_print_log() { # FILE
    case $1 in
    *.gz) gzip -dc "$1" ;;
    *.bz2) bzip2 -dc "$1" ;;
    *) cat "$1" ;;
    esac 2>/dev/null || echo "(it is in $1)"
}

# The temporary directories of builds that were killed with their daemon.  No daemon of ours
# runs when this is called.  What `guix build --keep-failed` has kept stays: only a killed
# build also has its chroot in the store.
_remove_stale_build_folders() {
    for _stale in /tmp/guix-build-*.drv-*; do
        [ -d "$_stale" ] || continue
        _name=${_stale#/tmp/guix-build-}
        _name=${_name%-*}
        for _chroot in /gnu/store/*-"$_name".chroot; do
            if [ -d "$_chroot" ]; then rm -rf "$_stale"; fi
        done
    done
}

# A commit would contain what the engine has made for its mounts.  Without the right to unmount, and
# below another mount, it stays.
_remove_mount_points() {
    if ! [ -f "${_directory:-/}/mount-points" ]; then return 0; fi
    _points=$(cat "$_directory/mount-points") # without white space, the innermost first
    # shellcheck disable=SC2086
    [ -z "$_points" ] || _unmount $_points
    for _made in $_points; do
        if _is_mounted "$_made"; then continue; fi
        if [ -d "$_made" ]; then rmdir "$_made"; elif ! [ -s "$_made" ]; then rm -f "$_made"; fi
    done
} 2>/dev/null

# A small image has no program for this, but it has Guix.
_unmount() { # PATH...
    if command -v umount >/dev/null; then
        umount -l "$@"
        return
    fi
    _script=$_directory/unmount.scm
    echo '(use-modules (guix build syscalls))' >"$_script"
    # MNT_DETACH is 2.
    echo '(for-each (lambda (path) (false-if-exception (umount path 2))) (cdr (command-line)))' \
        >>"$_script"
    GUILE_AUTO_COMPILE=0 guix repl -- "$_script" "$@"
}

_remove_folders() {
    cd / || :
    _remove_mount_points
    rm -rf ${_scratch:+"$_scratch"} ${_git_settings:+"$_git_settings"} ${_access:+"$_access"}
    # In a step of a build the directory is a mount, which goes by itself.
    if [ -n "$_directory" ] && ! _is_mounted "$_directory"; then rm -rf "$_directory"; fi
}

# --- processes -------------------------------------------------------------------------

# Sets `_tree` to the given processes and all below them.
_find_tree() { # PID...
    _tree=" $* "
    # PID (NAME) STATE PARENT ..., a line each
    _processes=$(cat /proc/[0-9]*/stat 2>/dev/null)
    set -f
    IFS='
'
    _grown=yes
    while [ -n "$_grown" ]; do
        _grown=
        for _line in $_processes; do
            _pid=${_line%% *}
            case $_tree in *" $_pid "*) continue ;; esac
            _line=${_line##*') '} # a name can hold anything
            _line=${_line#* }
            case $_tree in *" ${_line%% *} "*)
                _tree="$_tree$_pid "
                _grown=yes
                ;;
            esac
        done
    done
    unset IFS
    set +f
}

# A process that has ended and that its parent has not waited for is a zombie: not alive,
# though `kill -0` succeeds.
_is_alive() { # PID
    _line=$(cat "/proc/$1/stat" 2>/dev/null)
    case ${_line##*') '} in '' | Z* | X*) return 1 ;; esac
}

# In the first moments of its life a child is this shell, with its traps, then setsid or env,
# and would lose a signal.
_await_exec() { # PID
    _own=$(tr '\0' ' ' </proc/$$/cmdline)
    _set_deadline 1
    until _is_past_deadline; do
        _line=$(tr '\0' ' ' 2>/dev/null <"/proc/$1/cmdline")
        case $_line in
        "$_own" | 'setsid env '* | 'env LC_ALL='* | 'env --default-signal='*) _pause ;;
        *) return ;;
        esac
    done
}

_await_end() { # SECONDS PID...
    _set_deadline "$1"
    shift
    for _pid; do
        while _is_alive "$_pid"; do
            if _is_past_deadline; then return 1; fi
            _pause
        done
    done
}

_set_deadline() { # SECONDS
    _uptime=$(cat /proc/uptime)
    _deadline=$((${_uptime%%.*} + $1 + 1))
}

_is_past_deadline() {
    _uptime=$(cat /proc/uptime)
    [ "${_uptime%%.*}" -ge "$_deadline" ]
}

_pause() {
    sleep 0.002 2>/dev/null || sleep 1
}

_say() {
    echo "entry-point: $*" >&2
}

_fail() {
    _say "error: $*"
    _status=$_unavailable
}

# The whole file is read before the first of it runs: it removes itself at its end.
_main "$@"
