"""What administrators type: all problems at once, each naming its text."""

import io
from pathlib import Path

import pytest

from authz_server.cli import inputs
from authz_server.cli.failures import BadInputError
from authz_server.cli.inputs import Reader
from authz_server.policy.addresses import parse_network

NOW = 1_800_000_000.0


def test_all_problems_are_told_at_once() -> None:
    reader = Reader()
    inputs.networks(reader, ["300.1.1.1", "203.0.113.0/24", "10.1.2.3/8"])
    inputs.expiry(reader, "yesterday", NOW)
    reader.read(inputs.named("a tenant"), "Acme!")
    with pytest.raises(BadInputError) as caught:
        reader.done()
    problems = caught.value.problems
    assert len(problems) == 4
    for text, problem in zip(["300.1.1.1", "10.1.2.3/8", "yesterday", "Acme!"], problems, strict=True):
        assert repr(text) in problem
    assert "write 10.0.0.0/8 for the network or 10.1.2.3 for the address" in problems[1]


def test_good_input_passes_and_a_network_given_twice_counts_once() -> None:
    reader = Reader()
    found = inputs.networks(reader, ["203.0.113.0/24", "2001:db8::1", "203.0.113.0/24", "::ffff:203.0.113.7"])
    reader.done()
    assert [str(network) for network in found] == ["203.0.113.0/24", "2001:db8::1/128", "203.0.113.7/32"]
    assert found[0] == parse_network("203.0.113.0/24")


@pytest.mark.parametrize(("text", "past"), [("2027-01-15T08:00:00Z", True), ("2027-01-15T08:00:01Z", False)])
def test_an_expiry_lies_in_the_future(text: str, past: bool) -> None:
    reader = Reader()
    inputs.expiry(reader, text, NOW)
    if not past:
        reader.done()
        return
    with pytest.raises(BadInputError, match="in the past"):
        reader.done()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\nb", "one line"),
        ("\x1b[2Jgone", "control characters"),
        ("\udcff", "control characters"),
        ("x" * 501, "at most 500"),
    ],
)
def test_a_reason_is_a_line_for_people(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        inputs.line("--reason", required=True)(text)
    assert inputs.line("--reason", required=True)(" café, büro ") == "café, büro"


@pytest.mark.parametrize("text", ["", "a b", "-x", "x" * 65, "a/b", "{x}"])
def test_what_is_no_change_id_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a change id") as caught:
        inputs.change_id(text)
    assert repr(text) in str(caught.value)


def test_a_header_has_a_name_in_lower_case_and_a_value() -> None:
    assert inputs.header("X-Tenant-Id=a=b") == ("x-tenant-id", "a=b")
    for text in ("x-tenant-id", "=acme"):
        with pytest.raises(ValueError, match="write NAME=VALUE"):
            inputs.header(text)


def test_a_host_pattern_may_be_typed_in_any_case() -> None:
    assert inputs.host_pattern("*.Example.com") == "*.example.com"
    with pytest.raises(ValueError, match="is not a host"):
        inputs.host_pattern("https://example.com")


PAIR = ("a tenant", "an instance")


def test_lines_of_a_file_are_read_each_once(tmp_path: Path) -> None:
    file = tmp_path / "moves.txt"
    file.write_text("# who goes where\nacme q1\n\n  bolt,q2  # urgent\nacme\tq1\r\n")
    reader = Reader()
    assert inputs.lines(reader, file, PAIR) == [("acme", "q1"), ("bolt", "q2")]
    reader.done()


def test_all_bad_lines_are_told_with_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("acme q1\nBolt q1\ncoop\nacme q1 q2\n"))
    reader = Reader()
    inputs.lines(reader, Path("-"), PAIR)
    with pytest.raises(BadInputError) as caught:
        reader.done()
    assert [problem.split(" is ")[0].split(" must ")[0] for problem in caught.value.problems] == [
        "standard input, line 2: 'Bolt'",
        "standard input, line 3: 'coop'",
        "standard input, line 4: 'acme q1 q2'",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [(None, "cannot be read: "), (b"\xff\xfe", "cannot be read: "), (b"# nobody\n", "names nothing")],
    ids=["missing", "not text", "empty"],
)
def test_a_file_that_says_nothing_is_refused(tmp_path: Path, text: bytes | None, problem: str) -> None:
    file = tmp_path / "moves.txt"
    if text is not None:
        file.write_bytes(text)
    reader = Reader()
    inputs.lines(reader, file, PAIR)
    with pytest.raises(BadInputError, match=problem):
        reader.done()


def test_of_very_many_bad_lines_some_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    file = tmp_path / "moves.txt"
    file.write_text("acme\n" * 60)
    reader = Reader()
    inputs.lines(reader, file, PAIR)
    with pytest.raises(BadInputError) as caught:
        reader.done()
    assert len(caught.value.problems) == 51
    assert caught.value.problems[-1] == "and 10 lines more"
