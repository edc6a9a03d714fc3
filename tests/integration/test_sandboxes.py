"""Access of work containers to their host."""

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

;; Write the existing content, because this changes the host.
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
;; init_module(2): a process with the capability gets another error, such as EFAULT.
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


def run_attacks(new_project: NewProject, sandbox: str) -> dict[str, str]:
    """Return the result of each attack in a work container."""
    project = new_project(*STAGES, GUIX_SANDBOX=sandbox)
    directory = project.directory / "attacks"
    directory.mkdir()
    kernel_log = os.makedev(1, 11)  # /dev/kmsg, a device that each machine has
    text = ATTACKS.replace("MODULE", str(INIT_MODULE[os.uname().machine]))
    (directory / "a.scm").write_text(text.replace("DEVICE", str(kernel_log)))
    project.set(MOUNTS=f"{directory}:/attacks:ro")
    output = project.ok("run", "--", "guix", "repl", "/attacks/a.scm").stdout
    return dict(line.split(": ") for line in output.splitlines() if ": " in line)


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
def test_builds_that_download_have_a_network_except_with_capabilities(
    new_project: NewProject, sandbox: str
) -> None:
    if sandbox == "rootless":
        tun = Path("/dev/net/tun")
        if not tun.exists() or tun.stat().st_mode & 0o006 != 0o006:
            pytest.skip("only some users of this machine can open /dev/net/tun")
    project = new_project(*STAGES, GUIX_SANDBOX=sandbox, NETWORK="host")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (project.directory / "fetched.scm").write_text(FETCHED.replace("PORT", str(port)))
        project.set(MOUNTS=f"{project.directory}:/fetched:ro")
        result = project.inv("run", "--", "guix", "repl", "/fetched/fetched.scm")
    assert (result.returncode == 0) == (sandbox != "capabilities")
    assert ("network access disabled" in result.stderr) == (sandbox == "capabilities")


@pytest.mark.parametrize("sandbox", ["rootless", "nochroot"])
def test_unprivileged_container_has_no_access_to_the_host(
    new_project: NewProject, sandbox: str
) -> None:
    results = run_attacks(new_project, sandbox)
    assert len(results) == 6
    assert set(results.values()) == {"refused"}


@pytest.mark.parametrize("sandbox", ["capabilities", "auto"])
def test_container_with_capabilities_can_mount_but_not_use_devices_or_modules(
    new_project: NewProject, sandbox: str
) -> None:
    assert run_attacks(new_project, sandbox) == {
        "core_pattern": "refused",
        "mount": "possible",
        "core_pattern by a fresh /proc": "possible",
        "core_pattern by a user namespace": "refused",
        "module": "refused",
        "device": "refused",
    }


def test_attacks_succeed_in_a_privileged_container(new_project: NewProject) -> None:
    """This shows that the attacks of the other tests are real."""
    results = run_attacks(new_project, "privileged")
    names = ("core_pattern", "mount", "core_pattern by a user namespace", "device")
    assert [results[name] for name in names] == ["possible"] * 4
