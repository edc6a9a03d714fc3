# Completes the tasks and options of guix-tasks; to be sourced by bash.
# The program that is typed is asked, so ./inv and guix-tasks need not be on PATH under one name.

_guix_tasks() {
  # What follows an equals sign is an option's value: those are left to files.
  case "${COMP_WORDS[COMP_CWORD]}${COMP_WORDS[COMP_CWORD - 1]}" in *=*) return ;; esac
  # shellcheck disable=SC2207 -- no name of a task or option has a space or a star; bash 3 runs this
  COMPREPLY=($(compgen -W \
    "$("${COMP_WORDS[0]}" --complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$2"))
}

complete -o default -F _guix_tasks inv invoke guix-tasks
