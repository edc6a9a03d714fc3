"""Ignore files: the test tables of moby/patternmatcher, and further behaviour of its code."""

from __future__ import annotations

import pytest

from guix_tasks.oci.dockerignore import MAX_LINE, Matcher, Matches, PatternError, read_patterns

FACTS: dict[str, tuple[str, str]] = {
    "*": ("fileutils.go abc", ""),
    "*.go": ("fileutils.go", "."),
    "**": ("file file/ / dir/file dir/file/", ""),
    "**/": ("file file/ / dir/file dir/file/", ""),
    "**/**": ("dir/file dir/file/", ""),
    "dir/**": ("dir/file dir/file/ dir/dir2/file dir/dir2/file/", ""),
    "**/dir": ("dir dir/file", ""),
    "**/dir2/*": ("dir/dir2/file dir/dir2/file/", ""),
    "**/dir2/**": ("dir/dir2/dir3/file dir/dir2/dir3/file/", ""),
    "**file": ("file dir/file dir/dir/file", ""),
    "**/file": ("dir/file dir/dir/file", ""),
    "**/file*": ("dir/dir/file dir/dir/file.txt", ""),
    "**/file*txt": ("dir/dir/file.txt", ""),
    "**/file*.txt": ("dir/dir/file.txt", ""),
    "**/file*.txt*": ("dir/dir/file.txt", ""),
    "**/**/*.txt": ("dir/dir/file.txt file.txt", ""),
    "**/**/*.txt2": ("", "dir/dir/file.txt"),
    "**/*.txt": ("file.txt", ""),
    "a**/*.txt": ("a/file.txt a/dir/file.txt a/dir/dir/file.txt", ""),
    "a/*.txt": ("a/file.txt", "a/dir/file.txt"),
    "a/*.txt**": ("a/file.txt", ""),
    "a[b-d]e": ("ace", "ae aae"),
    "a[^b-d]e": ("aze", ""),
    ".*": (".foo", "foo"),
    "abc.def": ("abc.def", "abcdef abcZdef"),
    "abc?def": ("abcZdef", "abcdef"),
    r"a\\": ("a\\", ""),
    "**/foo/bar": ("foo/bar dir/foo/bar dir/dir2/foo/bar", ""),
    "abc/**": ("abc/def abc/def/ghi", "abc"),
    "**/.foo": (".foo", "bar.foo"),
    "a(b)c/def": ("a(b)c/def", "a(b)c/xyz"),
    "a.|)$(}+{bc": ("a.|)$(}+{bc", ""),
    "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl": (
        "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl",
        "",
    ),
    "dist/*.whl": ("dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", ""),
    r"a\*b": ("a*b", "ab"),
    "abc": ("abc", ""),
    "*c": ("abc", ""),
    "a*": ("a abc ab/c", ""),
    "a*/b": ("abc/b", "a/c/b"),
    "a*b*c*d*e*/f": ("axbxcxdxe/f axbxcxdxexxx/f", "axbxcxdxe/xxx/f axbxcxdxexxx/fff"),
    "a*b?c*x": ("abxbbxdbxebxczzx", "abxbbxdbxebxczzy"),
    "ab[c]": ("abc", ""),
    "ab[b-d]": ("abc", ""),
    "ab[e-g]": ("", "abc"),
    "ab[^c]": ("", "abc"),
    "ab[^b-d]": ("", "abc"),
    "ab[^e-g]": ("abc", ""),
    "a?b": ("a☺b", "a/b"),
    "a[^a]b": ("a☺b", ""),
    "a???b": ("", "a☺b"),
    "a[^a][^a][^a]b": ("", "a☺b"),
    "[a-ζ]*": ("\u03b1", ""),
    "*[a-ζ]": ("", "A"),
    "a*b": ("", "a/b"),
    r"[\]a]": ("]", ""),
    r"[\-]": ("-", ""),
    r"[x\-]": ("x -", "z"),
    r"[\-x]": ("x -", "a"),
    "*x": ("xxx", ""),
}
"""Patterns with matching and other paths, from the tables of upstream."""

TRIPLES = [
    (pattern, text, expected)
    for pattern, texts in FACTS.items()
    for expected, words in zip((True, False), texts, strict=True)
    for text in words.split()
]

LISTS = [
    ("!fileutils.go *.go", "fileutils.go", True),
    ("*.go !fileutils.go", "fileutils.go", False),
    ("docs !docs/README.md", "docs/README.md", False),
    ("docs/ !docs/README.md", "docs/README.md", False),
    ("docs/* !docs/README.md", "docs/README.md", False),
    ("** !util/docker/web", "util/docker/web/foo", False),
    ("** !util/docker/web util/docker/web/foo", "util/docker/web/foo", True),
    ("** !dist/*.whl", "dist/proxy.py-2.4.0rc3.dev36+g08acad9-py3-none-any.whl", False),
]

MALFORMED = ["[]a]", "[-]", "[x-]", "[-x]", "\\", "[a-b-c]", "[", "[^", "[^bc", "a[", "a[b", "[\\"]


def matcher(*lines: str) -> Matcher:
    return Matcher(read_patterns("\n".join(lines).encode("utf-8", "surrogateescape")))


def ignored_by_walk(patterns: Matcher, path: str) -> bool:
    """Whether a walk from the root ignores a path, by the matches of its parents."""
    parts = path.split("/")
    matches: Matches | None = None
    for index in range(1, len(parts)):
        matches = patterns.ignores_below("/".join(parts[:index]), matches)[1]
    return patterns.ignores_below(path, matches)[0]


@pytest.mark.parametrize(("pattern", "text", "expected"), TRIPLES)
def test_pattern_matches_as_in_upstream_tables(pattern: str, text: str, expected: bool) -> None:
    assert matcher(pattern).ignores(text) is expected
    assert ignored_by_walk(matcher(pattern), text) is expected


@pytest.mark.parametrize(("lines", "text", "expected"), LISTS)
def test_last_matching_pattern_decides(lines: str, text: str, expected: bool) -> None:
    assert matcher(*lines.split()).ignores(text) is expected
    assert ignored_by_walk(matcher(*lines.split()), text) is expected


@pytest.mark.parametrize("pattern", MALFORMED)
def test_malformed_pattern_is_an_error_with_its_line(pattern: str) -> None:
    with pytest.raises(PatternError, match="malformed pattern") as error:
        matcher("# one", "two", pattern)
    assert error.value.line == 3


@pytest.mark.parametrize("pattern", ["[Local-Only]", r"\d*", "a{3,2}*", "a{1001}*", "a{2}{3}*"])
def test_pattern_invalid_in_go_is_an_error_when_used(pattern: str) -> None:
    patterns = matcher("*", pattern)
    assert patterns.ignores("x")
    for _ in range(2):  # upstream panicked the second time
        with pytest.raises(PatternError, match="1: malformed pattern"):
            matcher(pattern).ignores("x")


@pytest.mark.parametrize("pattern", ["**/a" * 7, "[ab]" + "*a" * 7, "*|*" + "a{0,9}" * 7])
def test_pattern_with_many_wildcards_is_an_error(pattern: str) -> None:
    with pytest.raises(PatternError, match="it has more than 6 wildcards"):
        matcher(pattern).ignores("a" * 50)


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (f"{'[' * 60_000}]*", "[x", True),
        ("*a" * 30 + "c", "a" * 200, False),
        ("*a" * 30, "a" * 200, True),
        ("*a*b/*c?*d", "xaxb/abcacdd", True),
        ("*a*b/*c?*d", "xaxb/abcd", False),
        ("build", "Build", False),
        ("a|b*", "xb", True),  # upstream's table of what to escape ends before "|"
        ("a|b", "b", False),
        ("a{2}*", "aa", True),
        ("a{2}*", "a{2}", False),
        ("a{x}*", "a{x}", True),
        ("[*]", "[", False),
        ("x*", "x\n", True),
        ("x", "x\n", False),
        ("\udcff*", "\udcffa", True),
        ("\udcfe[^/]", "\udcffa", True),
        ("\udcff", "\udcfe", False),
        ("?", "\udcff", True),
        ("^a*", "a", True),
        ("a^*", "a^", False),
        ("a$*", "a$b", True),
    ],
)
def test_pattern_matches_as_in_upstream_code(pattern: str, text: str, expected: bool) -> None:
    assert matcher(pattern).ignores(text) is expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"a\n\xef\xbb\xbfb", ["a", "\ufeffb"]),
        (b"a\r\n b \r\n\t\r\n", ["a", "b"]),
        (b"# no\n #yes\n#", ["#yes"]),
        (b"/a/b/\n//c\na//d/./e/../f", ["a/b", "c", "a/d/f"]),
        (b"../a\n/../b\n.\n/", ["../a", "b", ".", "/"]),
        (b"! a\n!/b/\n! /c\n!!d", ["!a", "!b", "!c", "!!d"]),
        (b"/!a", ["!a"]),
        (b"\xc2\xa0a\xe3\x80\x80\n\x1cb", ["a", "\x1cb"]),
        (b"a\x0bb\nc\x0cd", ["a\x0bb", "c\x0cd"]),
        (b"\xff\n", ["\udcff"]),
        (b"x" * (MAX_LINE - 1), ["x" * (MAX_LINE - 1)]),
        (
            b"test1\n/test2\n/a/file/here\n\nlastfile\n# comment\n! /inverted/abs/path\n",
            ["test1", "test2", "a/file/here", "lastfile", "!inverted/abs/path"],
        ),
    ],
)
def test_file_is_parsed_as_by_upstream(content: bytes, expected: list[str]) -> None:
    patterns = [f"{'!' * p.is_exception}{p.text}" for p in read_patterns(content)]
    assert patterns == expected


@pytest.mark.parametrize("line", ["!", "! ", " !\r", "!/", "!//", "!/./"])
def test_exclamation_mark_alone_is_an_error(line: str) -> None:
    with pytest.raises(PatternError, match="2: an exclamation mark without a pattern"):
        matcher("a", line)


def test_long_line_is_an_error() -> None:
    with pytest.raises(PatternError, match="2: the line has 65536 bytes"):
        read_patterns(b"a\n" + b"x" * MAX_LINE)


def test_walk_differs_from_a_lookup_as_in_upstream() -> None:
    """A walk does not apply a pattern to a directory that is ignored already."""
    patterns = matcher("d*", "!d1/x", "d1")
    assert patterns.ignores("d1/x")
    assert not ignored_by_walk(patterns, "d1/x")


@pytest.mark.parametrize(
    ("lines", "directory", "expected"),
    [
        ("a", "a", True),
        ("a !a/b", "a", False),
        ("a !a", "a", False),
        ("a !b", "a", True),
        ("a !a/b", "ab", True),
        ("a !a/b/**", "a/b", False),
        ("a !a/b/*", "a/b/c", True),
        ("a !**/b", "a", False),
        ("a !b?", "a", False),
    ],
)
def test_directory_with_a_possible_exception_is_walked(
    lines: str, directory: str, expected: bool
) -> None:
    assert matcher(*lines.split()).skips(directory) is expected
