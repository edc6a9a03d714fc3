"""Progress of Guix, parsed from logs of real stages with Guix 1.5 and ``--verbosity=3``."""

from __future__ import annotations

from pathlib import Path

import pytest

from guix_tasks.guix.progress import Activity, BuildSteps, Noise

LOGS = Path(__file__).parent / "guix-logs"


def activity_texts(name: str) -> list[str]:
    """Return the texts of all activities of a log in order."""
    activity, texts = Activity(), [""]
    for line in (LOGS / f"{name}.log").read_text().splitlines():
        activity.look(line)
        if activity.text != texts[-1]:
            texts.append(activity.text)
    assert not activity.is_building
    return texts[1:]


def test_activities_of_a_pull_are_in_order() -> None:
    texts = activity_texts("pull")
    assert texts[:3] == [
        "updating the channel guix",
        "updating the channel offline",
        "computing what is to be built",
    ]
    assert "substitute 1 of 7: guile-3.0.9" in texts
    assert any(text.endswith("substitute 7 of 7: guile-3.0.9") for text in texts)
    assert any(text.startswith("building module-import-compiled (1 of 17)") for text in texts)
    assert "building package cache (16 of 17)" in texts
    assert texts[-1] == "building profile with 2 packages (17 of 17)"


def test_activities_of_an_installation_include_hooks() -> None:
    assert activity_texts("install") == [
        "substitute 1 of 1: hello-2.12.2",
        "building greet-1.0 (1 of 6); substitute 1 of 1: hello-2.12.2",
        "building greet-1.0 (1 of 6)",
        "building CA certificate bundle (2 of 6)",
        "listing Emacs sub-directories (3 of 6)",
        "building fonts directory (4 of 6)",
        "building directory of Info manuals (5 of 6)",
        "building profile with 2 packages (6 of 6)",
    ]


def observe(*lines: str) -> Activity:
    activity = Activity()
    for line in lines:
        activity.look(line)
    return activity


STORE = f"/gnu/store/{'a' * 32}"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "Updating channel 'guix' from Git repository at 'https://git.guix.gnu.org/guix.git'...",
            "updating the channel guix",
        ),
        (
            "Authenticating channel 'guix', commits bab8f04 to 934182c (1 new commit)...",
            "authenticating the channel guix",
        ),
        (
            "substitute: updating substitutes from 'https://ci.guix.gnu.org'... 100.0%",
            "asking https://ci.guix.gnu.org for substitutes",
        ),
        ("Computing Guix derivation for 'x86_64-linux'... ", "computing Guix for x86_64-linux"),
        (f"building {STORE}-a.drv...", "building a (1 of 1)"),
        (f".substituting {STORE}-b-1...", "substitute 1 of 1: b-1"),
        ("applying 2 grafts for git-2.46.0 ...", "applying 2 grafts for git-2.46.0 (1 of 1)"),
        (f"checking {STORE}-a.drv...", ""),
        ("building...", ""),
        ("", ""),
        ("\0 The following derivations will be built:", ""),
    ],
)
def test_activity_is_parsed_from_a_line(line: str, text: str) -> None:
    assert observe(line).text == text


PLAN = (
    "12.5 MB will be downloaded:",
    f"  {STORE}-a-1",
    f"  {STORE}-b-1",
    "The following graft will be made:",
    f"   {STORE}-c-1.drv",
)


def test_substitute_is_shown_with_number_size_and_rate() -> None:
    activity = observe(*PLAN)
    for second in range(3):
        activity.receive(1_000_000, second)
    activity.look(f"substituting {STORE}-a-1...")
    assert activity.text == "substitute 1 of 2: a-1, 0 B of 12.5 MB"
    for second in range(3, 8):
        activity.receive(1_000_000 + (second - 2) * 500_000, second)
    assert activity.text == "substitute 1 of 2: a-1, 2.5 MB of 12.5 MB, 500 kB/s"
    # Other downloads use the same network.
    activity.receive(30_000_000, 8)
    assert ", 12.5 MB of 12.5 MB, " in activity.text


def test_size_is_shown_without_counted_bytes() -> None:
    assert observe(*PLAN, f"substituting {STORE}-a-1...").text == "substitute 1 of 2: a-1, 12.5 MB"


def test_channel_update_is_shown_with_a_rate() -> None:
    activity = observe("Updating channel 'guix' from Git repository at 'https://x'...")
    activity.receive(0, 0)
    activity.receive(3_000_000, 2)
    assert activity.text == "updating the channel guix, 1.5 MB/s"


def test_later_plan_adds_to_the_first() -> None:
    activity = observe(*PLAN, "1,234 items will be downloaded", f"substituting {STORE}-a-1...")
    assert "substitute 1 of 1236: " in activity.text


@pytest.mark.parametrize("number", ["1.2.3", "9" * 5000, ".", ","])
def test_malformed_number_is_not_a_plan(number: str) -> None:
    lines = (f"{number} items will be downloaded", f"{number} MB will be downloaded:")
    assert observe(*lines, f"substituting {STORE}-a-1...").text == "substitute 1 of 1: a-1"


def test_failed_build_is_no_longer_active() -> None:
    activity = observe(f"building {STORE}-a.drv...")
    assert activity.is_building
    activity.look(f"build of {STORE}-a.drv failed")
    assert not activity.is_building


def test_build_steps_are_parsed() -> None:
    steps = BuildSteps()
    assert steps.text == ""
    for line, text in (
        (b"#7 [3/4] RUN sh /tmp/x && rm -r /tmp/x", "step 3 of 4: RUN sh /tmp/x && rm -r /tmp/x"),
        (b"#7 0.123 #8 [1/2] FROM x", "step 3 of 4: RUN sh /tmp/x && rm -r /tmp/x"),
        (b"#8 [base 2/4] COPY a b", "step 2 of 4: COPY a b"),
        (b"#9 [internal] load .dockerignore", "step 2 of 4: COPY a b"),
        (b"Step 1/3 : FROM debian", "step 1 of 3: FROM debian"),
    ):
        steps.look([line])
        assert steps.text == text


def without_noise(name: str) -> list[bytes]:
    return Noise().without((LOGS / f"{name}.log").read_bytes().splitlines())


@pytest.mark.parametrize("name", ["pull", "install"])
def test_only_noise_is_removed(name: str) -> None:
    log, output = (LOGS / f"{name}.log").read_bytes().splitlines(), without_noise(name)
    assert not [line for line in output if not line.strip(b".") or b"hint: " in line]
    assert not [line for line in output if b"still in progress" in line or b"GUIX_PROFILE" in line]
    prefixes = (b"building ", b"substitut", b"The following derivation", b"guix ", b"collected")
    lines = [line for line in log if line.startswith(prefixes)]
    assert [line for line in output if line.startswith(prefixes)] == lines


@pytest.mark.parametrize("noise", [b"hint: Consider setting the necessary environment x", b"."])
def test_lines_after_noise_remain(noise: bytes) -> None:
    error = b"guix package: error: x: unknown package"
    assert Noise().without([noise, b"", error, b"  /gnu/store/x.drv"])[0] == error
