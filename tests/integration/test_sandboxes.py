"""What a work container may do to its host."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import NewProject

pytestmark = pytest.mark.engine

STAGES = ("base", "pull", "install")

ATTACKS = r"""
(use-modules (guix build syscalls) (ice-9 textual-ports) (system foreign))

(define (attempt name thunk)
  (format #t "~a: ~a~%" name
          (catch #t (lambda () (if (thunk) "possible" "refused")) (lambda _ "refused"))))

;; What is there is written again: it is another's machine.
(define (write-again file)
  (let ((old (call-with-input-file file get-string-all)))
    (call-with-output-file file (lambda (port) (display old port)))
    #t))

(define syscall
  (pointer->procedure int (dynamic-func "syscall" (dynamic-link)) (list long long long long)
                      #:return-errno? #t))

(attempt "core_pattern" (lambda () (write-again "/proc/sys/kernel/core_pattern")))
(attempt "mount" (lambda () (mkdir "/mnt/t") (mount "t" "/mnt/t" "tmpfs") #t))
(attempt "core_pattern by a fresh /proc"
         (lambda ()
           (mkdir "/mnt/p")
           (mount "p" "/mnt/p" "proc")
           (write-again "/mnt/p/sys/kernel/core_pattern")))
;; init_module(2): whoever may call it is told that there is no module at this address, or that
;; the kernel takes none.
(attempt "module"
         (lambda ()
           (call-with-values (lambda () (syscall MODULE 0 0 0))
             (lambda (_ error) (not (memv error (list EPERM ENOSYS)))))))
(attempt "core_pattern by a user namespace"
         (lambda ()
           (zero? (system* "unshare" "--user" "--map-root-user" "--pid" "--fork" "--mount-proc"
                           "sh" "-c"
                           "p=/proc/sys/kernel/core_pattern; was=$(cat $p) && echo $was >$p"))))
(attempt "device"
         (lambda ()
           (mknod "/tmp/device" 'char-special #o600 DEVICE)
           (close (open "/tmp/device" O_RDONLY))
           #t))
"""

INIT_MODULE = {"x86_64": 175, "aarch64": 105}


def attempts(project: NewProject, sandbox: str) -> dict[str, str]:
    """What of these is possible in a work container."""
    made = project(*STAGES, GUIX_SANDBOX=sandbox)
    directory = made.directory / "attacks"
    directory.mkdir()
    kernel_log = os.makedev(1, 11)  # /dev/kmsg, a device that every machine has
    text = ATTACKS.replace("MODULE", str(INIT_MODULE[os.uname().machine]))
    (directory / "a.scm").write_text(text.replace("DEVICE", str(kernel_log)))
    made.set(MOUNTS=f"{directory}:/attacks:ro")
    said = made.ok("run", "--", "guix", "repl", "/attacks/a.scm").stdout
    return dict(line.split(": ") for line in said.splitlines() if ": " in line)


FETCHED = r"""
(use-modules (guix) (gcrypt hash) (rnrs bytevectors))
(with-store store
  (run-with-store store
    (mlet %store-monad ((drv (gexp->derivation "fetched"
                               #~(let ((socket (socket PF_INET SOCK_STREAM 0)))
                                   ;; The address of the host in slirp4netns.
                                   (connect socket AF_INET (inet-pton AF_INET "10.0.2.2") PORT)
                                   (call-with-output-file #$output
                                     (lambda (port) (display "ok" port))))
                               #:hash-algo 'sha256 #:hash (sha256 (string->utf8 "ok")))))
      (built-derivations (list drv)))))
"""


@pytest.mark.parametrize("sandbox", ["rootless", "privileged", "capabilities"])
def test_a_build_that_downloads_has_a_network(new_project: NewProject, sandbox: str) -> None:
    if sandbox == "rootless":
        tun = Path("/dev/net/tun")
        if not tun.exists() or tun.stat().st_mode & 0o006 != 0o006:
            pytest.skip("not every user of this machine may open /dev/net/tun")
    project = new_project(*STAGES, GUIX_SANDBOX=sandbox, NETWORK="host")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (project.directory / "fetched.scm").write_text(FETCHED.replace("PORT", str(port)))
        project.set(MOUNTS=f"{project.directory}:/fetched:ro")
        result = project.inv("run", "--", "guix", "repl", "/fetched/fetched.scm")
    assert (result.returncode == 0) == (sandbox != "capabilities")
    assert ("network access disabled" in result.stderr) == (sandbox == "capabilities")


def test_rootless(new_project: NewProject) -> None:
    """Nothing: not even what root of a user namespace could do is done to the host."""
    found = attempts(new_project, "rootless")
    assert len(found) == 6
    assert [name for name, what in found.items() if what != "refused"] == []


@pytest.mark.parametrize("sandbox", ["capabilities", "auto"])
def test_with_the_capabilities_of_the_daemon(new_project: NewProject, sandbox: str) -> None:
    """No wall against a root that means harm, which can mount; but no device, and no module."""
    assert attempts(new_project, sandbox) == {
        "core_pattern": "refused",
        "mount": "possible",
        "core_pattern by a fresh /proc": "possible",
        "core_pattern by a user namespace": "refused",
        "module": "refused",
        "device": "refused",
    }


def test_without_isolation(new_project: NewProject) -> None:
    found = attempts(new_project, "nochroot")
    assert len(found) == 6
    assert [name for name, what in found.items() if what != "refused"] == []


def test_privileged(new_project: NewProject) -> None:
    """What the others are measured by: these are real attempts."""
    found = attempts(new_project, "privileged")
    names = ("core_pattern", "mount", "core_pattern by a user namespace", "device")
    wanted = dict.fromkeys(names, "possible")
    assert {name: found[name] for name in wanted} == wanted
