# Base stage: BASE_IMAGE with everything that Guix needs to build packages.
#
# Every builder supports this file, including the classic one of Docker Engine.  It has no syntax
# line, because a machine without access to a registry cannot fetch a frontend.  No step needs
# privileges.

ARG BASE_IMAGE=metacall/guix:latest
FROM ${BASE_IMAGE}

# For a Debian base without Guix: URL and SHA-256 of GNU's binary tarball.
ARG GUIX_BINARY_URL=
ARG GUIX_BINARY_SHA256=
COPY guix_tasks/stages/resources/prepare.sh guix_tasks/stages/resources/install-guix.sh \
     guix_tasks/stages/resources/entry-point.sh /tmp/guix-tasks/
# Every user needs the entry point, also from a checkout that was made with umask 077.
RUN sh /tmp/guix-tasks/prepare.sh && sh /tmp/guix-tasks/install-guix.sh && \
    cp /tmp/guix-tasks/entry-point.sh / && chmod 755 /entry-point.sh && rm -r /tmp/guix-tasks

# Other users cannot enter /root, so use the profiles in /var/guix.
ENV PATH=/var/guix/profiles/per-user/root/current-guix/bin:/var/guix/profiles/per-user/root/guix-profile/bin:$PATH

ENTRYPOINT ["/entry-point.sh"]
CMD ["bash"]
