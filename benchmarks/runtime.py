"""Measure the runtime image against ``guix pack``, ``docker load`` and ``docker push``.

    python benchmarks/runtime.py

The image has a package of 500 MB in 20,000 files.  Both contestants start from an install image
with all packages, so that Guix has built everything.  Each makes and pushes an image with the
package, then one with another package of 1 MB, then makes and pushes that again.  It needs skopeo.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contestants import OLD_CHANNELS, Goal, Inv, Registry, Testbed, testbed
from measure import Command, blobs

from guix_tasks.errors import GuixTasksError
from guix_tasks.ui.console import Console
from guix_tasks.ui.format import human_size

PACKAGES = ("hello", "large")
MORE = (*PACKAGES, "part-1")
SCENARIOS = (("first image", PACKAGES), ("1 MB added", MORE), ("nothing changed", MORE))

BY_HAND = """
set -eu
docker run --name "$WORK" --privileged --network host --volume "$MATERIAL:/offline:ro" \
    --env "GUIX_SUBSTITUTE_URLS=$SUBSTITUTE_URLS" "$BUILT" \
    sh -c 'cp "$(guix pack --format=docker --max-layers=60 '"$PACKAGES"')" /image.tar.gz'
docker cp "$WORK:/image.tar.gz" "$WORK.tar.gz"
docker rm "$WORK"
loaded=$(docker load --input "$WORK.tar.gz")
docker tag "${loaded##*: }" "$IMAGE"
docker push "$IMAGE"
"""


@dataclass(frozen=True)
class Sample:
    """Time and bytes of one contestant in one scenario."""

    seconds: float
    pushed: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, {human_size(self.pushed)} pushed"


def measure(bed: Testbed, registry: Registry, command: Command) -> Sample:
    before = blobs(registry.data)
    times = bed.meter.run(command)
    new = [size for name, size in blobs(registry.data).items() if name not in before]
    return Sample(times.seconds, sum(new))


def by_hand(bed: Testbed, registry: Registry, built: str, packages: tuple[str, ...]) -> Command:
    environment = {
        **bed.environment,
        "BUILT": built,
        "IMAGE": f"{registry.image}-runtime",
        "MATERIAL": str(bed.material),
        "PACKAGES": " ".join(packages),
        "SUBSTITUTE_URLS": bed.substitutes.url,
        "WORK": f"{bed.directory.name}-pack",
    }
    return Command(("bash", "-c", BY_HAND), bed.directory, environment)


def runtime_push(inv: Inv, packages: tuple[str, ...]) -> Command:
    """Return the command, after the install stage has these packages."""
    settings = {"RUNTIME_IMAGE": f"{inv.registry.image}-runtime", "RUNTIME_ENTRYPOINT": "hello"}
    install = inv.command("nothing", Goal(packages, OLD_CHANNELS))
    install = replace(
        install,
        argv=(*install.argv[:3], "base", "pull", "install"),
        environment={**install.environment, **settings},
    )
    inv.bed.meter.run(install)
    return replace(install, argv=(*install.argv[:3], "runtime.push"))


def main() -> int:
    """Measure and print a table."""
    console = Console()
    if shutil.which("skopeo") is None:
        console.error("skopeo is not installed")
        return 1
    try:
        with ExitStack() as stack:
            bed = stack.enter_context(testbed(console))
            registries = [Registry(bed, name) for name in ("pack", "inv")]
            for registry in registries:
                stack.enter_context(registry.running(console))
            inv = Inv(bed, registries[1])
            stack.callback(inv.clear)
            inv.clear()
            runtime_push(inv, MORE)  # Guix builds everything
            built = f"{inv.registry.image}:latest-install"
            bed.call("tag", built, f"{registries[0].image}:built")
            rows = []
            for scenario, packages in SCENARIOS:
                command = by_hand(bed, registries[0], f"{registries[0].image}:built", packages)
                hand = measure(bed, registries[0], command)
                own = measure(bed, registries[1], runtime_push(inv, packages))
                ratio = f"{own.seconds / hand.seconds:.2f}"
                rows.append((scenario, str(hand), str(own), ratio))
            for registry in registries:
                bed.forget(registry.image)
                bed.forget(f"{registry.image}-runtime")
    except (GuixTasksError, RuntimeError) as error:
        console.error(str(error))
        return 1
    console.table(("change", "guix pack, load, push", "inv runtime.push", "seconds"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
