"""What came out: medians and spread, as tables, as charts, held against the goals."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from guix_tasks.ui.format import human_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from measure import Times

TITLES = {
    "cold": "everything cold",
    "nothing": "nothing changed",
    "added": "one package of 1 MB added",
    "removed": "that package removed",
    "channel": "new commits of the channels",
    "base": "a file of the base image changed",
    "fresh": "one package added on a fresh engine",
}
SHELL, INV, BUILDX = "shell lines", "inv", "buildx"
LIMITS = (
    ("cold", 1.1, 1.05),
    ("nothing", 0.06, None),
    ("added", 1.3, 1.3),
    ("removed", 1.3, 1.3),
    ("channel", 0.35, 1.2),
    ("base", 0.3, None),
)
"""Scenario, and the most that we may take of the seconds and of the bytes of the shell lines."""


_FETCHING_NOTHING = ("nothing", "removed", "base")
"""Scenarios for which Guix has to get nothing from a server."""

_PART_SIZE = 1 << 20
"""Size in bytes of each of these packages, whose content cannot be compressed."""

_FETCH = "POST /images/create"
"""Call of the engine's API with which ``docker pull`` pulls an image."""


@dataclass(frozen=True)
class Sample:
    """One command in one scenario."""

    scenario: str
    contestant: str
    round: int
    times: Times
    pushed: int
    """Bytes that are new in the registry."""
    fetched: int
    """Bytes that the substitute server sent."""
    size: int
    """Of the image, on the engine."""
    layers: int
    added: int
    """Number of packages of 1 MB that the change added."""

    def renamed(self, scenario: str) -> Sample:
        return replace(self, scenario=scenario)

    def __str__(self) -> str:
        times = self.times
        return (
            f"{self.contestant}: {times.seconds:.2f} s (in containers {times.guix:.2f}, "
            f"commit {times.commit:.2f}, push {times.push:.2f}, the rest {times.own:.2f}), "
            f"pushed {human_size(self.pushed)}, fetched {human_size(self.fetched)}, "
            f"{human_size(self.size)} in {self.layers} layers"
        )


@dataclass(frozen=True)
class Verdict:
    """A goal, and how near to it we are."""

    goal: str
    value: float
    limit: float | None = None
    """None for what is told without being a goal."""

    def __str__(self) -> str:
        if self.limit is None:
            return f"({self.goal}: {self.value:.3f})"
        word = "met" if self.value <= self.limit else "NOT met"
        return f"{word}: {self.goal}: {self.value:.3f}, at most {self.limit:g}"


class Samples:
    """The samples by scenario and contestant."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._found: dict[tuple[str, str], list[Sample]] = defaultdict(list)
        for sample in samples:
            self._found[sample.scenario, sample.contestant].append(sample)

    def of(self, scenario: str, contestant: str = INV) -> list[Sample]:
        return self._found.get((scenario, contestant), [])

    def keys(self) -> list[tuple[str, str]]:
        """Of the scenarios that were repeated, in their order."""
        order = list(TITLES)
        keys = [key for key in self._found if key[0] in TITLES]
        return sorted(keys, key=lambda key: order.index(key[0]))


def verdicts(samples: Sequence[Sample]) -> Iterator[Verdict]:
    """Return the goals that these samples can be held against."""
    found = Samples(samples)
    for scenario, limit, pushed in LIMITS:
        yield from _ratio(found, scenario, SHELL, limit)
        ours, theirs = found.of(scenario), found.of(scenario, SHELL)
        if pushed and ours and theirs:
            value = _pushed(ours) / _pushed(theirs)
            yield Verdict(f"{TITLES[scenario]}, bytes pushed / {SHELL}", value, pushed)
        if scenario in _FETCHING_NOTHING and ours:
            value = max(each.fetched for each in ours)
            yield Verdict(f"{TITLES[scenario]}, bytes fetched", value, 0)
        elif scenario == "added" and ours and theirs:
            value = max(each.fetched for each in ours) - max(each.fetched for each in theirs)
            yield Verdict(f"{TITLES[scenario]}, bytes fetched more than by hand", value, 0)
    yield from _ratio(found, "nothing", BUILDX, 1.5)
    ours, theirs = found.of("fresh"), found.of("fresh", SHELL)
    if ours and theirs:
        times = theirs[0].times
        fetch = times.calls[_FETCH][1]
        value = (ours[0].times.seconds - fetch) / (times.seconds - fetch)
        yield Verdict(f"{TITLES['fresh']}, seconds without the pull / {SHELL}", value, 1.5)
        value = ours[0].pushed / theirs[0].pushed
        yield Verdict(f"{TITLES['fresh']}, bytes pushed / {SHELL}", value, 1.3)
    changes, scratch = found.of("change"), found.of("scratch")
    by_hand = found.of("change", SHELL)
    if changes and scratch and by_hand:
        what = f"{len(changes)} random changes"
        pushed = sum(each.pushed for each in changes)
        value = pushed / sum(each.added * _PART_SIZE for each in changes)
        yield Verdict(f"{what}, bytes pushed in all / packages added", value, 2)
        value = pushed / sum(each.pushed for each in by_hand)
        yield Verdict(f"{what}, bytes pushed in all / by hand", value)
        yield Verdict(f"{what}, size / made at once", changes[-1].size / scratch[0].size, 1.25)
        # Made at once, pull and install have one layer each.
        base = scratch[0].layers - 2
        yield Verdict(f"{what}, layers on the base image", changes[-1].layers - base, 10)
    if found.of("cold"):
        times = [each.times for each in found.of("cold")]
        own = median(each.own / each.seconds for each in times)
        program = median(each.program / each.seconds for each in times)
        yield Verdict("cold, our own time / all of it", own, 0.05)
        yield Verdict("cold, the same without builds and other calls of the engine", program)


def _ratio(found: Samples, scenario: str, other: str, limit: float) -> Iterator[Verdict]:
    ours, theirs = found.of(scenario), found.of(scenario, other)
    if ours and theirs:
        goal = f"{TITLES[scenario]}, seconds / {other}"
        yield Verdict(goal, _seconds(ours) / _seconds(theirs), limit)


def _pushed(samples: Sequence[Sample]) -> float:
    return median(each.pushed for each in samples)


def _seconds(samples: Sequence[Sample]) -> float:
    return median(each.times.seconds for each in samples)


def write(directory: Path, samples: Sequence[Sample], notes: Sequence[str]) -> None:
    """Write results.json, README.md and the charts."""
    directory.mkdir(parents=True, exist_ok=True)
    results = {"notes": notes, "samples": [asdict(each) for each in samples]}
    (directory / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    found = Samples(samples)
    parts = ["# Benchmarks", "Made by `python benchmarks/run.py`."]
    parts += [f"Note: {note}" for note in notes]
    if found.keys():
        (directory / "seconds.svg").write_text(seconds_chart(found))
        parts += ["![Seconds by scenario](seconds.svg)", _table(found), _LEGEND]
    if found.of("change"):
        (directory / "growth.svg").write_text(growth_chart(found))
        parts += ["![Size after each change](growth.svg)", _growth_table(found)]
    parts += ["## Goals", "\n".join(f"- {verdict}" for verdict in verdicts(samples))]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n")


_LEGEND = (
    "Medians, with the least and the most in parentheses. *In containers* is what Guix and all "
    "else in the work containers took; *the rest* is neither that nor the engine's commit or "
    "push, so it holds the build of the base and the start of containers; *memory* is that of "
    "the command's first process."
)


def _table(found: Samples) -> str:
    header = (
        "scenario", "way", "seconds", "in containers", "commit", "push", "the rest", "pushed",
        "fetched", "image", "layers", "memory",
    )  # fmt: skip
    rows = [header, tuple("---" for _ in header)]
    rows += [_row(*key, found.of(*key)) for key in found.keys()]  # noqa: SIM118 -- no mapping
    return _markdown(rows)


def _row(scenario: str, contestant: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    def spread(value: Callable[[Sample], float], form: Callable[[float], str]) -> str:
        values = [value(each) for each in samples]
        least, most = form(min(values)), form(max(values))
        return form(median(values)) + (f" ({least} to {most})" if least != most else "")

    def seconds(value: float) -> str:
        return f"{value:.2f}"

    def size(value: float) -> str:
        return human_size(round(value))

    return (
        TITLES[scenario],
        contestant,
        spread(lambda each: each.times.seconds, seconds),
        spread(lambda each: each.times.guix, seconds),
        spread(lambda each: each.times.commit, seconds),
        spread(lambda each: each.times.push, seconds),
        spread(lambda each: each.times.own, seconds),
        spread(lambda each: each.pushed, size),
        spread(lambda each: each.fetched, size),
        spread(lambda each: each.size, size),
        spread(lambda each: each.layers, lambda value: f"{value:.0f}"),
        spread(lambda each: each.times.memory, size) if contestant == INV else "",
    )


def _growth_table(found: Samples) -> str:
    rows = [("way", "changes", "image", "layers", "pushed in all"), ("---",) * 5]
    for contestant in (SHELL, INV, BUILDX):
        changes, scratch = found.of("change", contestant), found.of("scratch", contestant)
        for each in changes[:1] + changes[-1:]:
            sent = human_size(sum(one.pushed for one in changes[: each.round]))
            size = human_size(each.size)
            rows.append((contestant, f"{each.round}", size, f"{each.layers}", sent))
        rows += [
            (contestant, "made at once", human_size(each.size), f"{each.layers}", "")
            for each in scratch
        ]
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- charts -----------------------------------------------------------------------------

_PARTS: dict[str, tuple[str, Callable[[Times], float]]] = {
    "in containers": ("#4e79a7", lambda times: times.guix),
    "commit": ("#f28e2b", lambda times: times.commit),
    "push": ("#59a14f", lambda times: times.push),
    "the rest": ("#bab0ac", lambda times: times.own),
}
_COLOURS = {SHELL: "#f28e2b", INV: "#4e79a7", BUILDX: "#59a14f"}
_WIDTH, _LEFT, _RIGHT, _TOP, _BAR = 900, 170, 100, 76, 18


def seconds_chart(found: Samples) -> str:
    """Bars of seconds, in their parts, with the least and the most."""
    rows: list[tuple[str, str, list[Sample]]] = []
    keys = found.keys()
    rows = [(scenario, contestant, found.of(scenario, contestant)) for scenario, contestant in keys]
    scale = Scale(0, max(each.times.seconds for _, _, group in rows for each in group), _WIDTH)
    shapes, y, last = [], _TOP, ""
    for scenario, contestant, group in rows:
        if scenario != last:
            y += 28
            shapes.append(_text(12, y, TITLES[scenario], bold=True))
            y, last = y + 10, scenario
        shapes += _stacked_bar(scale, y, contestant, group)
        y += _BAR + 6
    legend = {name: colour for name, (colour, _) in _PARTS.items()}
    axis = _vertical_axis(scale, y + 8, "seconds (median of all rounds; line: least to most)")
    title = "Seconds by scenario: the shell lines, guix-tasks and buildx"
    return _svg(title, y + 60, [*_legend(legend), *axis, *shapes])


def _stacked_bar(scale: Scale, y: float, name: str, group: Sequence[Sample]) -> list[str]:
    shapes = [_text(_LEFT - 8, y + 13, name, anchor="end")]
    x = float(_LEFT)
    for label, (colour, part) in _PARTS.items():
        width = scale(median(part(each.times) for each in group)) - _LEFT
        shapes.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}">'
            f"<title>{name}: {label}</title></rect>"
        )
        x += width
    seconds = [each.times.seconds for each in group]
    least, most, middle = scale(min(seconds)), scale(max(seconds)), y + _BAR / 2
    shapes.append(_line(least, middle, most, middle, "#333"))
    shapes += [_line(end, y + 5, end, y + _BAR - 5, "#333") for end in (least, most)]
    shapes.append(_text(max(x, most) + 6, y + 13, f"{median(seconds):.2f} s"))
    return shapes


def growth_chart(found: Samples) -> str:
    """Lines of the image's size after each change."""
    bottom, height = 360, 420
    series = {name: changes for name in _COLOURS if (changes := found.of("change", name))}
    sizes = [each.size / 1e6 for changes in series.values() for each in changes]
    across = Scale(0, max(each.round for changes in series.values() for each in changes), _WIDTH)
    room = (max(sizes) - min(sizes)) or 1
    up = Scale(min(sizes) - room * 0.2, max(sizes) + room * 0.2, bottom, start=_TOP, end=0)
    shapes = _vertical_axis(across, bottom, "random changes of up to four packages of 1 MB")
    shapes.append(_text(12, _TOP - 8, "image, MB"))
    for tick in up.ticks():
        y = bottom + _TOP - up(tick)
        shapes.append(_line(_LEFT, y, _WIDTH - _RIGHT, y, "#e5e5e5"))
        shapes.append(_text(_LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
    for name, changes in series.items():
        points = [(across(each.round), bottom + _TOP - up(each.size / 1e6)) for each in changes]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        style = f'fill="none" stroke="{_COLOURS[name]}" stroke-width="2"'
        shapes.append(f'<polyline points="{line}" {style}/>')
        x, y = points[-1]
        shapes.append(_text(x + 6, y + 4, f"{changes[-1].layers} layers"))
    legend = {name: _COLOURS[name] for name in series}
    return _svg("Size of the image after each change", height, [*_legend(legend), *shapes])


@dataclass(frozen=True)
class Scale:
    """From values to places on a chart."""

    least: float
    most: float
    size: float
    start: float = _LEFT
    end: float = _RIGHT

    def __call__(self, value: float) -> float:
        whole = self.size - self.start - self.end
        return self.start + whole * (value - self.least) / ((self.most - self.least) or 1)

    def ticks(self) -> list[float]:
        """Return some six round values."""
        rough = ((self.most - self.least) or 1) / 6
        power = 10.0 ** (len(f"{int(rough)}") - 1) if rough >= 1 else 0.1
        step = next(power * each for each in (1, 2, 5, 10, 20, 50) if power * each >= rough)
        first = int(self.least / step) * step
        values = (first + step * number for number in range(20))
        return [value for value in values if self.least <= value <= self.most]


def _vertical_axis(scale: Scale, bottom: float, label: str) -> list[str]:
    shapes = []
    for tick in scale.ticks():
        x = scale(tick)
        shapes.append(_line(x, _TOP, x, bottom, "#e5e5e5"))
        shapes.append(_text(x, bottom + 16, f"{tick:g}", anchor="middle"))
    shapes.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom + 38, label, anchor="middle"))
    return shapes


def _legend(colours: dict[str, str]) -> list[str]:
    shapes = []
    for place, (name, colour) in enumerate(colours.items()):
        x = _LEFT + place * 130
        shapes.append(f'<rect x="{x}" y="40" width="12" height="12" fill="{colour}"/>')
        shapes.append(_text(x + 18, 50, name))
    return shapes


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{text}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _svg(title: str, height: float, shapes: Sequence[str]) -> str:
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" '
        f'font-family="sans-serif" font-size="13" fill="#222" role="img">\n'
        f"<title>{title}</title>\n"
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="#fff"/>\n'
        f'<text x="12" y="24" font-size="16" font-weight="bold">{title}</text>\n{body}\n</svg>\n'
    )
