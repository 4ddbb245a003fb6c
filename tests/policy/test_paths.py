"""No spelling of a path slips past a resource."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracle import readings as readings_by_oracle

from authz_server.policy.paths import (
    MAX_ODD_PATH_LENGTH,
    RequestPath,
    first_name,
    fold_case,
    fold_text,
    is_odd,
    parse_path_pattern,
    read_path,
)

WITHIN_DOCS = {
    "plain": "/docs",
    "below": "/docs/a/b",
    "trailing-slash": "/docs/",
    "doubled-slash": "//docs",
    "many-slashes": "////docs//a",
    "dot": "/./docs",
    "dot-dot": "/a/../docs",
    "dot-dot-at-the-root": "/../../docs",
    "and-out-again": "/docs/../a",
    "parameter": "/docs;x=1",
    "parameter-before": "/;x=1/docs",
    "parameter-hides-dots": "/a/..;x/docs",
    "escaped-letter": "/%64ocs",
    "escaped-twice": "/%2564ocs",
    "escaped-slash": "/x%2f..%2fdocs",
    "escaped-slash-upper-case": "/x%2F..%2Fdocs",
    "slash-escaped-twice": "/x%252f..%252fdocs",
    "slash-behind": "/docs%2fa",
    "slash-must-stay-escaped": "/a/../do%63s/x%2f..%2f..%2f..",
    "backslash": "/a\\..\\docs",
    "escaped-backslash": "/a%5c..%5cdocs",
    "backslash-escaped-twice": "/a%255c..%255cdocs",
    "escaped-dots": "/a/%2e%2e/docs",
    "dots-escaped-twice": "/a/%252e%252e/docs",
    "escaped-parameter": "/docs%3bx",
    "escaped-query": "/docs%3fx",
    "query-escaped-twice": "/docs%253fx",
    "suffix": "/docs.json",
    "suffix-and-more": "/docs.tar.gz/x",
    "escaped-suffix": "/docs%2ejson",
    "dots-at-the-end": "/docs../x",
    "spaces-and-dots-at-the-end": "/docs%20.%20",
    "fragment": "/docs#x",
    "escaped-fragment": "/docs%23x",
    "escaped-end-of-a-c-string": "/docs%00x",
    "url-parser-takes-a-host": "//x/docs",
    "url-parser-skips-slashes": "////x/docs",
    "url-parser-and-backslashes": "/\\x\\docs",
    "url-parser-then-dots": "//x/a/../docs",
    "dots-resolved-between-two-decodings": "/a%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "backslashes-resolved-between-two-decodings": "/a%5c..%5cdo%2563s%5c%252e%252e%5c..%5cx",
    "slashes-merged-between-two-decodings": "/a%2f%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "slashes-kept-between-two-decodings": "/a%2f..%2fdo%2563s%2f%2f..%2f%252e%252e%2f..%2fx",
}
ELSEWHERE = {
    "other": "/other",
    "prefix-of-a-segment": "/docsx",
    "prefix-of-a-name-with-a-suffix": "/docsx.json",
    "words": "/docs%20of%20mine",
    "space-before-a-suffix-that-is-none": "/docs%20json",
    "below-something": "/a/docs",
    "escaped-thrice": "/%252564ocs",
    "truncated-escape": "/doc%7",
    "no-escape": "/%zzdocs",
    "case": "/DOCS",
    "root": "/",
    "asterisk": "*",
}


@pytest.mark.parametrize("path", WITHIN_DOCS.values(), ids=WITHIN_DOCS)
def test_a_reading_lies_within_the_pattern(path: str) -> None:
    assert any(parse_path_pattern("/docs").matches(reading) for reading in read_path(path, fold_case=False))


@pytest.mark.parametrize("path", ELSEWHERE.values(), ids=ELSEWHERE)
def test_no_reading_lies_within_the_pattern(path: str) -> None:
    assert not any(parse_path_pattern("/docs").matches(reading) for reading in read_path(path, fold_case=False))


SAME_CASE = {
    "upper": ("/docs", "/DOCS"),
    "pattern-upper": ("/Docs", "/docs"),
    "escaped": ("/docs", "/%44ocs"),
    "accent": ("/caf\u00e9", "/CAF%C3%89"),
    "bytes-of-a-letter-decoded-apart": ("/caf\u00e9", "/caf%C3%25A9"),
    "turkish-dotless-small": ("/admin", "/adm%C4%B1n"),
    "turkish-dotted-capital": ("/admin", "/adm%C4%B0n"),
    "kelvin-sign": ("/keys", "/%E2%84%AAeys"),
    "long-s": ("/docs", "/doc%C5%BF"),
    "sharp-s": ("/stra\u00dfe", "/STRASSE"),
    "star-stays-a-star": ("/*/docs", "/A/DOCS"),
}


@pytest.mark.parametrize(("pattern", "path"), SAME_CASE.values(), ids=SAME_CASE)
def test_folded_readings_lie_within_the_folded_pattern(pattern: str, path: str) -> None:
    folded = fold_case(parse_path_pattern(pattern))
    assert any(folded.matches(reading) for reading in read_path(path, fold_case=True))
    assert not any(folded.matches(reading) for reading in read_path("/other", fold_case=True))


def test_folding_makes_no_sign_that_has_a_meaning_in_paths_or_queries() -> None:
    """So it does not matter whether a text is folded before it is cut or after."""
    signs = set("/\\.;?#%&=+[]*{}_ \0")
    assert not [letter for letter in map(chr, range(0x110000)) if letter not in signs and signs & {*fold_text(letter)}]


@given(st.lists(st.sampled_from(["/", "%", "2e", "\u0130", "S", "\u017f", ".", ";", "\u00df"])).map("".join))
def test_readings_of_a_request_path_do_not_depend_on_which_are_asked_for_first(text: str) -> None:
    path = RequestPath(f"/{text}")
    exact = path.readings(fold_case=False)
    assert path.readings(fold_case=True) == RequestPath(path.text).readings(fold_case=True)
    for folded, readings in ((True, path.readings(fold_case=True)), (False, exact)):
        assert len(readings) == len(set(readings))
        assert set(readings) == read_path(path.text, fold_case=folded)
    if is_odd(path.text):
        assert path.readings(fold_case=False) is exact


def test_a_plain_path_has_one_reading() -> None:
    assert read_path("/a/b-c/D.e", fold_case=False) == {"/a/b-c/D.e"}
    assert read_path("/a/b-c/D.e", fold_case=True) == {"/a/b-c/d.e"}
    assert read_path("/", fold_case=True) == {"/"}
    assert read_path("*", fold_case=True) == {"/"}


@pytest.mark.parametrize("path", ["/a%", "/\\", "/a;", "/#", "/\0", "//", "/.", "/a/.b", "/a/.."])
def test_odd_paths(path: str) -> None:
    assert is_odd(path)


@pytest.mark.parametrize("path", ["/", "/a.b/c..", "/a/", "*", "/Caf\u00e9/~x:@!$&'()*+,=-_"])
def test_paths_that_are_not_odd(path: str) -> None:
    assert not is_odd(path)


def test_readings_of_an_odd_path() -> None:
    assert read_path("/a/./b", fold_case=False) == {"/a/./b", "/a/b"}
    assert read_path("/A;x//../b/", fold_case=True) == {
        *("/a;x//../b/", "/a//../b/", "/a;x/../b/", "/a/../b/"),
        *("/a;x/b/", "/a/b/", "/b/"),
    }


PIECES = [
    *(
        "/",
        "\\",
        "%2f",
        "%252F",
        "%5c",
        ".",
        "..",
        "%2e",
        "%252e",
        ";",
        ";a",
        "%3b",
        "#",
        "%23",
        "%3f",
        "%25",
        "%",
        "%0",
    ),
    *("docs", "a", "%61", "%2561", "\u00e9", "%C3", "%A9", "%25A9", "%ff", "\0", "%00"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map(lambda pieces: "/" + "".join(pieces)))
def test_readings_are_those_of_every_make_of_backend(path: str) -> None:
    assert read_path(path, fold_case=False) == {"/" + "/".join(reading) for reading in readings_by_oracle(path)}


@given(st.text(st.characters() | st.sampled_from("%/\\;.")))
def test_every_text_can_be_read(text: str) -> None:
    assert all(reading.startswith("/") for reading in read_path("/" + text, fold_case=True))


@pytest.mark.parametrize("unit", ["/", "/.", "../", "%25", "%252f", "\\", ";/", "/a;x%5c%23", "%"])
def test_the_number_of_readings_is_bounded(unit: str) -> None:
    tail = "/x%2f;%5c%23/..//%252f%255c"
    path = ("/" + unit * MAX_ODD_PATH_LENGTH)[: MAX_ODD_PATH_LENGTH - len(tail)] + tail
    assert len(read_path(path, fold_case=True)) < 700


def test_patterns_match_themselves_and_what_is_beneath() -> None:
    pattern = parse_path_pattern("/api/*/docs")
    assert pattern.matches("/api/v1/docs")
    assert pattern.matches("/api//docs/")
    assert pattern.matches("/api/v2/docs/x")
    assert not pattern.matches("/api/docs")
    assert not pattern.matches("/api/v1/v2/docs")
    assert not pattern.matches("/api/v1/other")
    assert not pattern.matches("/api/v1/docsx")
    assert not pattern.matches("/api/v1/docs\n")
    assert pattern.matches("/api/v1.json/docs.json")
    assert pattern.matches("/api. /v1/docs")
    assert not pattern.matches("/api.json/v1/docs")
    assert not parse_path_pattern("/a.b").matches("/axb")
    assert parse_path_pattern("/").matches("/")
    assert parse_path_pattern("/").matches("/x")
    assert parse_path_pattern("/*").matches("/")
    assert parse_path_pattern("/docs/").segments == ("docs",)


BAD_PATTERNS = {
    "": "must begin with '/'",
    "docs": "must begin with '/'",
    "*": "must begin with '/'",
    "/a//b": "empty segments",
    "//": "empty segments",
    "/docs//": "empty segments",
    "/a/../b": "write the segment '..' plainly",
    "/.": "write the segment '.' plainly",
    "/do%63s": "write the segment 'do%63s' plainly",
    "/a\\b": "plainly",
    "/a;b": "plainly",
    "/a?b": "plainly",
    "/a#b": "plainly",
    "/a*": "'*' stands for one whole segment only",
    "/**": "'*' stands for one whole segment only",
}


@pytest.mark.parametrize(("text", "advice"), BAD_PATTERNS.items())
def test_patterns_that_are_not_plain_are_refused(text: str, advice: str) -> None:
    with pytest.raises(ValueError, match="is not a path pattern") as caught:
        parse_path_pattern(text)
    assert advice in str(caught.value)
    assert str(caught.value).startswith(repr(text))


@pytest.mark.parametrize(
    ("path", "text", "query"),
    [("/a?b?c", "/a", "b?c"), ("/a", "/a", ""), ("/a?", "/a", ""), ("?", "", ""), ("", "", ""), ("/%3fb", "/%3fb", "")],
)
def test_a_request_path_ends_at_its_first_question_mark(path: str, text: str, query: str) -> None:
    request_path = RequestPath(path)
    assert (request_path.text, request_path.query) == (text, query)


NAME_PIECES = st.sampled_from(["docs", "v1", "DOCS", ".", " ", "..", "json", "/", "/x", "\u0130", "a", "Caf\u00e9"])


@given(st.lists(NAME_PIECES, max_size=5).map("".join), st.lists(NAME_PIECES, max_size=6).map("".join), st.booleans())
def test_what_lies_within_a_pattern_has_its_first_name(segment: str, rest: str, fold: bool) -> None:
    segment = segment.replace("/", "").strip(".") or "docs"
    pattern = fold_case(parse_path_pattern(f"/{segment}")) if fold else parse_path_pattern(f"/{segment}")
    path = RequestPath(f"/{segment}{rest}")
    if any(pattern.matches(reading) for reading in path.readings(fold_case=fold)):
        assert path.may_begin_with({first_name(f"/{pattern.segments[0]}")}, fold_case=fold)
