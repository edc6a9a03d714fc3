"""The program of ``fake_buildx``, ``buildx_stub.py FOLDER ARGUMENT...``: its state is there."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LISTING = (
    "ID  RECLAIMABLE  SIZE  LAST ACCESSED\nx  true  8.2kB\nReclaimable:\t1GB\nTotal:\t\t1.23GB\n"
)


class Stub:
    """One call."""

    def __init__(self, home: Path, argv: list[str]) -> None:
        self.home, self.argv = home, argv
        self.state: dict[str, Any] = json.loads((home / "state.json").read_text())
        words = [word.lstrip("-").split("=", 1) for word in argv if word.startswith("--")]
        self.options: dict[str, str] = {word[0]: word[-1] for word in words if len(word) > 1}

    def run(self) -> int:
        self._take_down()
        for number, rule in enumerate(self.state["rules"]):
            if all(map(self._has, rule["has"])) and not any(map(self._has, rule["without"])):
                if rule["once"]:
                    del self.state["rules"][number]
                self._save()
                time.sleep(rule["sleeps"])
                return self._fail(rule["says"])
        verb, last = self.argv[0], self.argv[-1]
        if verb in ("inspect", "rm") and last not in self.state["builders"]:
            return self._fail(f'ERROR: no builder "{last}" found')
        getattr(self, f"_{verb}")(last)
        self._save()
        return 0

    def _save(self) -> None:
        (self.home / "state.json").write_text(json.dumps(self.state))

    @staticmethod
    def _fail(says: str) -> int:
        sys.stderr.write(f"{says}\n")
        return 1

    def _has(self, word: str) -> bool:
        """Whether this is a call with a word; a verb is one of its own."""
        is_verb = word.isalpha() and word.islower()
        return word in self.argv if is_verb else word in " ".join(self.argv)

    def _take_down(self) -> None:
        config = Path(os.environ.get("DOCKER_CONFIG", "/none")) / "config.json"
        place = Path(self.options.get("file", "/none/x")).parent
        call = {
            "argv": self.argv,
            "env": dict(os.environ),
            "stdin": sys.stdin.read() if self.argv[0] == "build" else "",
            "config": config.read_text() if config.exists() else "",
            "files": {
                str(each.relative_to(place)): each.read_text(errors="replace")
                for each in sorted(place.rglob("*"))
                if each.is_file() and self.argv[0] == "bake"
            },
        }
        with (self.home / "calls").open("a") as calls:
            calls.write(json.dumps(call) + "\n")

    # --- builders ---

    def _inspect(self, name: str) -> None:
        builder = self.state["builders"][name]
        if "--bootstrap" in self.argv:
            for node in builder["nodes"]:
                node["status"] = "running"
            sys.stderr.write("#1 booting buildkit\n")
        head = f"Name:   {builder['name']}\nDriver: {builder['driver']}\n\nNodes:\n"
        sys.stdout.write(head + "".join(map(self._shown, builder["nodes"])))

    @staticmethod
    def _shown(node: dict[str, Any]) -> str:
        platforms = [f"{each}*" for each in node["fixed"]]
        platforms += [each for each in node["platforms"] if each not in node["fixed"]]
        options = " ".join(f'{name}="{value}"' for name, value in node["options"].items())
        running = node["status"] == "running"
        fields = {
            "Name": node["name"],
            "Endpoint": node["endpoint"],
            "Driver Options": options,
            "Status": node["status"],
            "BuildKit daemon flags": node["flags"],
            "BuildKit version": "v0.26.2" if running else "",
            "Platforms": ", ".join(platforms) if running else "",
        }
        lines = [f"{name}: {value}" for name, value in fields.items() if value]
        return "\n".join([*lines, "Labels:", " org.mobyproject.buildkit.worker: oci", ""])

    def _create(self, _last: str) -> None:
        given = [word.partition("=")[2] for word in self.argv if word.startswith("--driver-opt=")]
        name = self.options["name"]
        new = {"name": name, "driver": self.options["driver"], "nodes": []}
        nodes = self.state["builders"].setdefault(name, new)["nodes"]
        platforms = self.options.get("platform", "").split(",")
        dashes = "--" in self.argv
        nodes.append(
            {
                "name": self.options.get("node", f"{name}{len(nodes)}"),
                "endpoint": self.argv[self.argv.index("--") + 1] if dashes else "of-the-driver",
                "status": "inactive",
                "flags": self.options.get("buildkitd-flags", ""),
                "options": dict(next(csv.reader([each]))[0].split("=", 1) for each in given),
                "platforms": self.state["platforms"],
                "fixed": [each for each in platforms if each],
            }
        )

    def _rm(self, name: str) -> None:
        del self.state["builders"][name]

    def _use(self, name: str) -> None:
        self.state["selected"] = name

    def _du(self, _last: str) -> None:
        sys.stdout.write(LISTING)

    # --- building ---

    def _build(self, _last: str) -> None:
        pass  # a check finds nothing

    def _bake(self, target: str) -> None:
        file = Path(self.options["file"])
        wanted = json.loads(file.read_text())["target"][target]
        for output in wanted["output"]:
            words = next(csv.reader([output]))
            fields = dict(word.split("=", 1) for word in words)
            if fields["type"] == "local":
                self._report(Path(fields["dest"]), wanted, file.with_name("Dockerfile").read_text())
            elif "dest" in fields:
                Path(fields["dest"]).write_text("an archive")
        result = {target: {"containerimage.digest": self.state["digest"]}}
        Path(self.options["metadata-file"]).write_text(json.dumps(result))
        sys.stderr.write(f"#1 baking {target}\n")

    def _report(self, directory: Path, wanted: dict[str, Any], dockerfile: str) -> None:
        stages = ("pull", "install")
        names = ["created", *(each for each in stages if f" AS {each}\n" in dockerfile)]
        if wanted["target"] == "asked":
            names = ["user", "name"] + ["resolved"] * (" AS resolving\n" in dockerfile)
        answers = self.state["answers"]
        for platform in wanted["platforms"]:
            word = platform.replace("/", "_")
            own = directory / word if len(wanted["platforms"]) > 1 else directory
            own.mkdir(parents=True, exist_ok=True)
            for name in names:
                answer = answers.get(f"{word}/{name}", answers.get(name, ""))
                (own / name).write_text(f"{answer}\n")


if __name__ == "__main__":
    sys.exit(Stub(Path(sys.argv[1]), sys.argv[2:]).run())
