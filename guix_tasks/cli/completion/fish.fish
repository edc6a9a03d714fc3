# Completes the tasks and options of guix-tasks; to be sourced by fish.
# The program that is typed is asked, so ./inv and guix-tasks need not be on PATH under one name.

function __guix_tasks
    set -l words (commandline --tokenize --current-process --cut-at-cursor)
    set -l last (commandline --current-token --cut-at-cursor)
    set -l found ($words[1] --complete -- $words[2..] $last 2>/dev/null)
    string join \n -- $found; or __fish_complete_path $last
end

for program in inv invoke guix-tasks
    complete --command $program --no-files --arguments '(__guix_tasks)'
end
