# The base stage: BASE_IMAGE, made ready for Guix to build packages in.
#
# Kept to what every builder knows, the classic one of Docker Engine included.  There is no
# syntax line, since a machine without an image registry cannot fetch a frontend; and no step
# of it needs a privilege.

ARG BASE_IMAGE=metacall/guix:latest
FROM ${BASE_IMAGE}

# For a Debian base without Guix: GNU's binary tarball, and the SHA-256 sum it must have.
ARG GUIX_BINARY_URL=
ARG GUIX_BINARY_SHA256=
COPY guix_tasks/stages/resources/prepare.sh guix_tasks/stages/resources/install-guix.sh /tmp/guix-tasks/
RUN sh /tmp/guix-tasks/prepare.sh && sh /tmp/guix-tasks/install-guix.sh && rm -r /tmp/guix-tasks

# Not by way of /root, which no other user may enter.
ENV PATH=/var/guix/profiles/per-user/root/current-guix/bin:/var/guix/profiles/per-user/root/guix-profile/bin:$PATH

COPY guix_tasks/stages/resources/entry-point.sh /entry-point.sh
ENTRYPOINT ["/entry-point.sh"]
CMD ["bash"]
