# Completes the tasks and options of guix-tasks; to be sourced by zsh.
# The program that is typed is asked, so ./inv and guix-tasks need not be on PATH under one name.

_guix_tasks() {
  local -a found
  found=(${(f)"$("$words[1]" --complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)"})
  compadd -a found || _files
}

(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _guix_tasks inv invoke guix-tasks
