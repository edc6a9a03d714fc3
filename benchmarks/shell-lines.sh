#!/bin/bash
# shell-lines.sh STEP...: the well-known lines, as everyone writes them who needs such an image.
#
# Steps are build, pull, install, push and fetch.  From the environment:
#   IMAGE, BASE_IMAGE, DOCKERFILE, CONTEXT   as for guix-tasks
#   MATERIAL                                 a folder with channels and substitutes
#   CHANNELS                                 a channels file in it
#   SUBSTITUTE_URLS                          the address of a server of these substitutes
#   OPTIONS                                  options of `guix package`
#   WORK                                     a name for the containers
set -euo pipefail

in_container() { # COMMAND [ARGUMENT]...
  docker run --name "$WORK" --privileged --network host --volume "$MATERIAL:/offline:ro" \
    --env "GUIX_SUBSTITUTE_URLS=$SUBSTITUTE_URLS" "$IMAGE" "$@"
  docker commit "$WORK" "$IMAGE"
  docker rm "$WORK"
}

build() {
  docker build --network none --build-arg "BASE_IMAGE=$BASE_IMAGE" --file "$DOCKERFILE" \
    --tag "$IMAGE" "$CONTEXT"
}

pull() {
  in_container sh -c "guix archive --authorize </offline/substitutes.pub &&
    guix pull --channels=/offline/$CHANNELS"
}

install() {
  # shellcheck disable=SC2086 # a list
  in_container guix package $OPTIONS
}

push() {
  docker push "$IMAGE"
}

fetch() {
  docker pull "$IMAGE"
}

for step; do "$step"; done
