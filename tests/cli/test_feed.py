"""`authzctl list import` against a real Valkey: what it reads, refuses, shows and leaves in the store."""

from pathlib import Path
from typing import Any

import pytest
from support.authzctl import Ran, run, write
from typer.testing import CliRunner

from authz_server.cli.authzctl import app

pytestmark = pytest.mark.integration


@pytest.fixture
def feed(policy: str, tmp_path: Path) -> Path:
    """A file for a list that exists."""
    write("list", "add", "feed")
    return tmp_path / "feed.txt"


def imported(feed: Path, text: str, *options: str, code: int = 0) -> Ran:
    feed.write_text(text)
    return write("list", "import", "feed", str(feed), *options, code=code)


def networks() -> dict[str, Any]:
    return {row["network"]: row for row in run("list", "show", "feed", "-o", "json").json["entries"]}


def addresses(count: int) -> str:
    return "".join(f"10.0.{number // 256}.{number % 256}\n" for number in range(count))


def test_a_list_holds_what_the_file_says_and_nothing_else(feed: Path) -> None:
    write("list", "add", "feed", "192.0.2.0/24", "198.51.100.0/24")
    text = "# a feed\n\n192.0.2.0/24 ; SBL1\n2001:db8::/32#documentation\n  203.0.113.7\n192.0.2.0/24\n"
    ran = imported(feed, text)
    assert set(networks()) == {"192.0.2.0/24", "2001:db8::/32", "203.0.113.7/32"}
    assert "feed: 2 networks now; 2 to add, 0 to write anew, 1 to take out; 1 stay as they are." in ran.err
    assert "Done: list.import is revision 4" in ran.out


def test_a_file_of_thousands_is_one_change_and_is_told_as_numbers(feed: Path) -> None:
    ran = imported(feed, addresses(3000), "-o", "json")
    assert ran.json["difference"] == {"added": 3000, "changed": 0, "removed": 0, "unchanged": 0}
    assert (ran.json["revision"], ran.json["records"], len(networks())) == (3, [], 3000)
    history = run("history", "show", "-n", "1").out
    assert "list.import" in history
    assert "3,000 records" in history
    again = imported(feed, addresses(3000), "-o", "json")
    assert (again.json["changed"], again.json["difference"]["unchanged"]) == (False, 3000)


def test_entries_that_are_there_keep_who_and_why(feed: Path) -> None:
    run("list", "add", "feed", "192.0.2.0/24", "--reason", "by hand", "--owner", "bob")
    imported(feed, "192.0.2.0/24\n198.51.100.1\n")
    assert {name: row["reason"] for name, row in networks().items()} == {
        "192.0.2.0/24": "by hand",
        "198.51.100.1/32": "a test",
    }
    assert networks()["192.0.2.0/24"]["owner"] == "bob"


def test_another_expiry_or_owner_writes_entries_anew(feed: Path) -> None:
    imported(feed, "192.0.2.0/24\n")
    ran = imported(feed, "192.0.2.0/24\n", "--expires", "7d", "--owner", "soc", "-o", "json")
    assert ran.json["difference"]["changed"] == 1
    assert networks()["192.0.2.0/24"]["owner"] == "soc"
    assert networks()["192.0.2.0/24"]["expires_at"]


def test_one_bad_line_refuses_the_file_and_every_bad_line_is_told(feed: Path) -> None:
    bad = ["10.0.0.1/8", "example.com", "10.0.0.0/33", "::ffff:0.0.0.0/96", "10.0.0.0 - 10.0.0.255", "2001:db8::1%eth0"]
    lines = [line for number, text in enumerate(bad) for line in (f"192.0.2.{number}", text)]
    ran = imported(feed, "\n".join(lines), "-o", "json", code=2)
    assert ran.error["error"] == "bad_input"
    for number, (problem, text) in enumerate(zip(ran.error["problems"], bad, strict=True)):
        assert problem.startswith(f"{feed}, line {2 * number + 2}: {text!r}")
    assert "write 10.0.0.0/8 for the network or 10.0.0.1 for the address" in ran.error["problems"][0]
    assert networks() == {}


def test_of_many_bad_lines_none_is_left_out(feed: Path) -> None:
    ran = imported(feed, "192.0.2.1\n" + "nonsense\n" * 200, "-o", "json", code=2)
    assert len(ran.error["problems"]) == 200


def test_a_file_of_something_else_is_told_in_one_line(feed: Path) -> None:
    ran = imported(feed, "<html>\n<body>\n404\n" * 50, "-o", "json", code=2)
    (problem,) = ran.error["problems"]
    assert "none of 150 lines" in problem
    assert "'<html>'" in problem


@pytest.mark.parametrize("text", ["", "# nothing today\n\n;\n"], ids=["empty", "comments"])
def test_a_list_is_not_emptied_by_mistake(feed: Path, text: str) -> None:
    imported(feed, "192.0.2.0/24\n")
    ran = imported(feed, text, "--yes", code=2)
    assert "--allow-empty" in ran.err
    assert set(networks()) == {"192.0.2.0/24"}
    ran = imported(feed, text, "--allow-empty", code=1)
    assert "feed loses 1 of 1 network" in ran.err
    imported(feed, text, "--allow-empty", "--yes")
    assert networks() == {}


def test_losing_more_than_half_of_a_list_has_to_be_confirmed(feed: Path) -> None:
    imported(feed, addresses(3000))
    ran = imported(feed, addresses(1499), code=1)
    assert "feed loses 1,501 of 3,000 networks" in ran.err
    assert len(networks()) == 3000
    imported(feed, addresses(1500))
    assert len(networks()) == 1500
    imported(feed, addresses(10), "--yes")
    assert len(networks()) == 10


def test_a_very_wide_network_has_to_be_confirmed(feed: Path) -> None:
    ran = imported(feed, "0.0.0.0/0\n", code=1)
    assert "0.0.0.0/0 covers every address there is of IPv4" in ran.err
    imported(feed, "0.0.0.0/0\n", "--yes")
    assert set(networks()) == {"0.0.0.0/0"}


def test_a_dry_run_shows_sizes_and_dangers_and_writes_nothing(feed: Path) -> None:
    imported(feed, addresses(3000))
    ran = imported(feed, addresses(10), "--dry-run")
    assert "3,000 networks now; 0 to add, 0 to write anew, 2,990 to take out; 10 stay" in ran.err
    assert "careful: feed loses 2,990 of 3,000 networks" in ran.err
    assert "nothing was written" in ran.out
    assert len(networks()) == 3000
    told = imported(feed, addresses(10), "--dry-run", "-o", "json").json
    assert (told["changed"], told["difference"]["removed"]) == (False, 2990)


def test_a_list_that_does_not_exist_is_not_made_by_a_misspelling(feed: Path) -> None:
    feed.write_text("192.0.2.1\n")
    ran = write("list", "import", "fede", str(feed), code=1)
    assert "`authzctl list add fede` creates it" in ran.err


@pytest.mark.parametrize("size", [3, 2000], ids=["small", "large"])
def test_sent_again_it_is_applied_once(feed: Path, size: int) -> None:
    first = imported(feed, addresses(size), "--change-id", "feed-1", "-o", "json").json
    write("list", "remove", "feed", "10.0.0.1")
    again = imported(feed, addresses(size), "--change-id", "feed-1", "-o", "json").json
    assert (again["revision"], again["repeated"]) == (first["revision"], True)
    assert "10.0.0.1/32" not in networks()
    ran = imported(feed, addresses(size + 1), "--change-id", "feed-1", code=2)
    assert "belongs to another change" in ran.err


def test_standard_input_is_a_file_too(feed: Path) -> None:
    ran = CliRunner().invoke(app, ["list", "import", "feed", "-", "--reason", "r"], input="192.0.2.1\nnonsense\n")
    assert "standard input, line 2: 'nonsense'" in ran.stderr
    ran = CliRunner().invoke(app, ["list", "import", "feed", "-", "--reason", "r"], input="192.0.2.1\n")
    assert (ran.exit_code, set(networks())) == (0, {"192.0.2.1/32"})


def test_a_file_that_cannot_be_read_is_named(feed: Path) -> None:
    ran = write("list", "import", "feed", str(feed), code=2)
    assert f"{feed} cannot be read" in ran.err
    feed.write_bytes(b"\xff\xfe1\x00")
    assert "cannot be read" in write("list", "import", "feed", str(feed), code=2).err
