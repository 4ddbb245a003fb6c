"""The command line against a real Valkey: what it prints, what it refuses, what it leaves in the store."""

import asyncio
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from support.authzctl import run, write
from support.policies import network_key

from authz_server.cli import administration, session
from authz_server.demo.processes import free_port
from authz_server.demo.valkey import Valkey
from authz_server.explanation import Explanation, describe_request
from authz_server.policy.access import Entry
from authz_server.policy.addresses import parse_network
from authz_server.policy.decision import Allowed, decide
from authz_server.policy.snapshot import Snapshot, build_snapshot
from authz_server.settings import load_settings
from authz_server.store.interface import Change, Position, Report, StoreUnavailableError, Write, WriteResult
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration

PASSWORD = "s3cret-in-url"


def with_store(valkey: Valkey, prefix: str, act: Callable[[RedisStore], Awaitable[Any]]) -> Any:
    async def acting() -> Any:
        store = RedisStore(valkey.url, prefix=prefix)
        try:
            return await act(store)
        finally:
            await store.close()

    return asyncio.run(acting())


def entries(*words: str) -> list[tuple[str | None, str, str]]:
    return [(row["scope"], row["list"], row["network"]) for row in run(*words, "-o", "json").json["entries"]]


# Before there is a policy


READS = ["allow list", "block list", "list show", "tenant list", "instance list", "affinity show acme", "explain ::1"]
WRITES = ["block add 203.0.113.0/24", "list add office", "tenant add acme", "scope set global --mode open"]


@pytest.mark.parametrize("command", READS)
def test_reading_without_a_policy_says_how_to_make_one(prefix: str, command: str) -> None:
    ran = run(*command.split())
    assert (ran.code, ran.out) == (3, "")
    assert "authzctl init" in ran.err


@pytest.mark.parametrize("command", WRITES)
def test_writing_without_a_policy_says_how_to_make_one(prefix: str, command: str) -> None:
    ran = write(*command.split(), "-o", "json", code=3)
    assert (ran.out, ran.error["error"]) == ("", "not_initialised")


def test_init_makes_a_policy_once(prefix: str) -> None:
    ran = write("init", "-o", "json", "--change-id", "first")
    assert {key: ran.json[key] for key in ("action", "changed", "repeated", "revision", "change_id")} == {
        "action": "init",
        "changed": True,
        "repeated": False,
        "revision": 1,
        "change_id": "first",
    }
    assert write("init", "-o", "json", "--change-id", "first").json["repeated"] is True
    assert "already" in write("init", code=1).err
    found = write("init", "--if-missing", "-o", "json").json
    assert {key: found[key] for key in ("changed", "revision")} == {"changed": False, "revision": 1}


# Allow and block


def test_a_block_is_added_listed_and_removed(policy: str) -> None:
    ran = write("block", "add", "203.0.113.0/24", "2001:db8::1", "--expires", "2h", "--owner", "soc")
    assert "added  203.0.113.0/24 in global/block, expires " in ran.out
    assert "(in 1h 59m)" in ran.out
    assert "Done: block.add is revision 2, change id " in ran.out
    assert entries("block", "list") == [
        ("global", "global/block", "203.0.113.0/24"),
        ("global", "global/block", "2001:db8::1/128"),
    ]
    assert entries("allow", "list") == []
    shown = run("block", "list").out
    assert "203.0.113.0/24" in shown
    assert "a test (alice, " in shown
    ran = write("block", "remove", "203.0.113.0/24")
    assert "removed  203.0.113.0/24 in global/block" in ran.out
    assert entries("block", "list") == [("global", "global/block", "2001:db8::1/128")]


def test_the_json_of_a_write_has_stable_keys(policy: str) -> None:
    shown = write("allow", "add", "203.0.113.7", "--expires", "2099-12-31T00:00:00Z", "-o", "json").json
    assert set(shown) == {
        "action", "changed", "repeated", "epoch", "revision", "change_id", "actor", "reason", "records", "notes",
        "servers", "difference",
    }  # fmt: skip
    assert (shown["action"], shown["revision"], shown["actor"], shown["reason"]) == ("allow.add", 2, "alice", "a test")
    (record,) = shown["records"]
    created_at = record["value"].pop("created_at")
    assert created_at.endswith("Z")
    assert record == {
        "kind": "entry",
        "name": "203.0.113.7/32",
        "list": "global/allow",
        "effect": "added",
        "value": {
            "network": "203.0.113.7/32",
            "reason": "a test",
            "author": "alice",
            "owner": "",
            "expires_at": "2099-12-31T00:00:00Z",
        },
        "previous": None,
    }


def test_what_is_there_already_is_no_failure_and_no_change(policy: str) -> None:
    write("block", "add", "203.0.113.0/24")
    ran = write("block", "add", "203.0.113.0/24")
    assert "put there by alice" in ran.out
    assert "Nothing to do" in ran.out
    shown = write("block", "add", "203.0.113.0/24", "-o", "json").json
    assert (shown["changed"], shown["revision"], shown["change_id"]) == (False, 2, None)
    assert "--replace" in write("block", "add", "203.0.113.0/24", "--expires", "2h", code=1).err
    write("block", "add", "203.0.113.0/24", "--expires", "2h", "--replace")


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(policy: str) -> None:
    bad = ["300.1.1.1", "10.1.2.3/8", "nonsense/9"]
    ran = run("block", "add", "198.51.100.0/24", *bad, "--scope", "tenat:x", "--expires", "soon", "--reason", " ")
    assert ran.code == 2
    for text in (*bad, "tenat:x", "soon"):
        assert repr(text) in ran.err
    assert "--reason is empty" in ran.err
    assert "write 10.0.0.0/8" in ran.err
    error = run("block", "add", *bad, "--reason", "x", "-o", "json").error
    assert (error["error"], len(error["problems"])) == ("bad_input", 3)
    assert entries("block", "list") == []


def test_removing_what_is_not_there_names_what_covers_it(policy: str) -> None:
    write("block", "add", "203.0.113.0/24")
    ran = write("block", "remove", "203.0.113.128/25", code=1)
    assert "error: 203.0.113.128/25 is not in list global/block" in ran.err
    assert "hint: 203.0.113.128/25 is covered by 203.0.113.0/24 (a test; by alice" in ran.err
    assert write("block", "remove", "203.0.113.128/25", "-o", "json", code=1).error["error"] == "not_found"


def test_scopes_have_lists_of_their_own(policy: str) -> None:
    write("resource", "add", "docs", "--path", "/docs")
    write("allow", "add", "203.0.113.0/24", "--scope", "resource:docs")
    write("allow", "add", "198.51.100.0/24", "--scope", "tenant:acme")
    assert entries("allow", "list") == [
        ("resource:docs", "resource:docs/allow", "203.0.113.0/24"),
        ("tenant:acme", "tenant:acme/allow", "198.51.100.0/24"),
    ]
    assert entries("allow", "list", "--scope", "tenant:acme") == [
        ("tenant:acme", "tenant:acme/allow", "198.51.100.0/24")
    ]
    assert "No scope blocks any network" in run("block", "list").out
    assert run("block", "list", "--scope", "everywhere").code == 2


def test_a_wide_block_needs_yes_without_a_terminal(policy: str) -> None:
    ran = write("block", "add", "0.0.0.0/0", code=1)
    assert "every address there is of IPv4" in ran.err
    assert "--yes" in ran.err
    assert entries("block", "list") == []
    error = write("block", "add", "0.0.0.0/0", "-o", "json", code=1).error
    assert error["error"] == "confirmation_needed"
    write("block", "add", "0.0.0.0/0", "--yes")
    assert len(entries("block", "list")) == 1


@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1)])
def test_on_a_terminal_a_wide_block_is_asked_about(policy: str, answer: bytes, code: int) -> None:
    ours, theirs = pty.openpty()
    try:
        command = "from authz_server.cli.authzctl import app; app(prog_name='authzctl')"
        words = ["block", "add", "0.0.0.0/0", "--reason", "a test"]
        with subprocess.Popen(
            [sys.executable, "-c", command, *words], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
        ) as asked:
            os.write(ours, answer)
            out, _ = asked.communicate(timeout=60)
        assert asked.returncode == code, out
        assert b"Is that meant?" in os.read(ours, 65_536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert len(entries("block", "list")) == (code == 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_question_ends_with_the_command(policy: str, number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-m", "authz_server.cli.authzctl", "block", "add", "0.0.0.0/0", "--reason", "a test"]
        with subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs) as asked:
            told = b""
            while b"Is that meant?" not in told:
                told += os.read(ours, 65_536)
            # One that comes before the question waits for the answer may be seen with the answer only.
            for _ in range(10):
                asked.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    asked.wait(3)
                    break
            asked.kill()
        assert asked.returncode == 130
        assert b"interrupted: nothing was changed" in os.read(ours, 65_536)
    finally:
        os.close(ours)
        os.close(theirs)
    assert entries("block", "list") == []


def test_control_characters_in_the_store_do_not_reach_the_terminal(valkey: Valkey, policy: str) -> None:
    async def put(store: RedisStore) -> None:
        position = await store.position()
        key = network_key("203.0.113.0/24", "global/block")
        new = Entry(parse_network("203.0.113.0/24"), "\x1b[2J[bold]gone", "mallory", 1)
        await store.apply(Change("c", position.epoch, "m", "r", "test", (Write(key, None, new),)))

    with_store(valkey, policy, put)
    shown = run("block", "list").out
    assert "\x1b" not in shown
    assert "\\x1b[2J[bold]gone" in shown


# Lists, tenants, instances, resources, scopes


def test_a_named_list_allows_where_a_scope_names_it(policy: str) -> None:
    write("list", "add", "office", "198.51.100.0/24", "--description", "our offices")
    write("list", "add", "office", "192.0.2.0/24")
    write("resource", "add", "docs", "--path", "/docs", "--restricted", "--allow-list", "office")
    (shown,) = run("list", "show", "-o", "json").json["lists"]
    assert shown == {
        "name": "office",
        "description": "our offices",
        "owner": "",
        "entries": 2,
        "used_by": ["resource:docs (allows)"],
    }
    assert "our offices" in run("list", "show").out
    assert entries("list", "show", "office") == [(None, "office", "192.0.2.0/24"), (None, "office", "198.51.100.0/24")]
    assert entries("allow", "list") == [
        ("resource:docs", "office", "192.0.2.0/24"),
        ("resource:docs", "office", "198.51.100.0/24"),
    ]
    assert "resource:docs by office" in run("allow", "list").out
    write("list", "remove", "office", "192.0.2.0/24")
    assert entries("list", "show", "office") == [(None, "office", "198.51.100.0/24")]
    assert run("list", "show", "offices").code == 1


def test_tenants_are_placed_pinned_moved_and_shown(policy: str) -> None:
    assert "no active instance" in write("tenant", "add", "acme", code=1).err
    write("instance", "add", "q1", "--weight", "3")
    write("instance", "add", "q2")
    write("tenant", "add", "acme")
    write("tenant", "add", "bolt", "--instance", "q2")
    write("affinity", "pin", "coop", "q2")
    by_hash = run("affinity", "show", "acme", "-o", "json").json
    assert by_hash["instance"] == by_hash["hash"]
    assert (by_hash["registered"], by_hash["held"], by_hash["instance_state"]) == (True, False, "active")
    assert "authzctl affinity move bolt q1" in write("affinity", "pin", "bolt", "q1", code=1).err
    assert "tenant bolt, pinned to q1 (was q2)" in write("affinity", "move", "bolt", "q1").out
    assert "is not registered" in write("affinity", "move", "nobody", "q1", code=1).err
    assert "instance q9 does not exist" in write("affinity", "move", "bolt", "q9", code=1).err
    tenants = {row["id"]: row["instance"] for row in run("tenant", "list", "-o", "json").json["tenants"]}
    assert tenants == {"acme": by_hash["hash"], "bolt": "q1", "coop": "q2"}
    counts = {row["name"]: row["tenants"] for row in run("instance", "list", "-o", "json").json["instances"]}
    assert sum(counts.values()) == 3
    for command in ("tenant list", "instance list", "affinity show bolt"):
        assert "q1" in run(*command.split()).out
    nobody = run("affinity", "show", "nobody", "-o", "json").json
    assert (nobody["registered"], nobody["instance"], nobody["hash"] in counts) == (False, None, True)


def test_a_scope_is_set(policy: str) -> None:
    ran = write("scope", "set", "global", "--mode", "restricted", code=1)
    assert "every request is denied" in ran.err
    write("allow", "add", "203.0.113.0/24")
    write("list", "add", "bad")
    ran = write("scope", "set", "global", "--mode", "restricted", "--enforcement", "shadow", "--block-list", "bad")
    assert "scope global, restricted, shadow, block lists bad" in ran.out
    (record,) = write("scope", "set", "global", "--no-block-lists", "-o", "json").json["records"]
    assert record["previous"]["block_lists"] == ["bad"]
    assert record["value"] == {
        "name": "global",
        "mode": "restricted",
        "enforcement": "shadow",
        "allow_lists": [],
        "block_lists": [],
    }
    assert "nothing to set" in write("scope", "set", "global", code=2).err
    assert "give one of them" in write("scope", "set", "global", "--allow-list", "a", "--no-allow-lists", code=2).err
    assert write("scope", "set", "global", "--mode", "ajar", code=2)


# Explain


REQUESTS = {
    "blocked": "203.0.113.9",
    "carved_out": "203.0.113.7",
    "docs_from_elsewhere": "192.0.2.1 --path /docs",
    "docs_from_the_office": "198.51.100.1 --path //docs;x=1",
    "shadow_blocked_tenant": "192.0.2.1 --tenant acme",
    "tenant_in_a_header": "192.0.2.1 --header X-Tenant-Id=acme",
    "unknown_tenant": "192.0.2.1 --tenant nobody",
    "two_tenants": "192.0.2.1 --header x-tenant-id=acme --header x-tenant-id=bolt",
    "no_address": "localhost",
    "after_the_block": "203.0.113.9 --at 3h",
}


@pytest.fixture
def furnished(policy: str) -> str:
    """A policy in which something of everything happens."""
    write("block", "add", "203.0.113.0/24", "--expires", "2h", "--owner", "soc")
    write("allow", "add", "203.0.113.7")
    write("list", "add", "office", "198.51.100.0/24")
    write("resource", "add", "docs", "--path", "/docs", "--restricted", "--allow-list", "office")
    write("instance", "add", "q1")
    write("tenant", "add", "acme")
    write("block", "add", "192.0.2.0/24", "--scope", "tenant:acme")
    write("scope", "set", "tenant:acme", "--enforcement", "shadow")
    return policy


@pytest.mark.parametrize("request_words", REQUESTS.values(), ids=REQUESTS)
def test_explain_says_what_the_server_decides(valkey: Valkey, furnished: str, request_words: str) -> None:
    words = request_words.split()
    shown = run("explain", *words, "-o", "json")
    assert shown.code == 0

    options = load_settings().decision_options()
    given = dict(zip(words[1::2], words[2::2], strict=True))
    headers = [tuple(word.lower().split("=")) for word in words if "=" in word and word.lower().startswith("x-")]
    attributes = describe_request(
        words[0],
        method="GET",
        host="",
        path=given.get("--path", "/"),
        headers=headers,  # type: ignore[arg-type]
        tenant=given.get("--tenant"),
        options=options,
    )
    loaded = with_store(valkey, furnished, lambda store: store.load())
    snapshot: Snapshot = build_snapshot(
        loaded.records, epoch=loaded.position.epoch, revision=loaded.position.revision, options=options
    )
    decision = decide(attributes, snapshot, time.time() + 3 * 3600 * ("--at" in given))
    found = shown.json
    assert found["decision"] == ("allowed" if isinstance(decision, Allowed) else "denied")
    assert found["reason"] == decision.reason
    assert found["tenant"] == decision.tenant
    assert found["instance"] == (decision.instance if isinstance(decision, Allowed) else None)
    assert [(one["scope"], one["reason"], one["list"]) for one in found["scopes"]] == [
        (one.scope, one.reason, one.match.list_name if one.match else None)
        for one in Explanation(attributes, 0, decision, snapshot).scopes
    ]
    assert (found["epoch"], found["revision"]) == (snapshot.epoch, snapshot.revision)
    assert decision.reason in run("explain", *words).out


def test_explain_names_the_entry_and_who_put_it_there(furnished: str) -> None:
    shown = run("explain", "203.0.113.9", "--tenant", "acme").out
    assert shown.startswith("DENIED  blocked")
    assert "acme (pinned to q1)" in shown
    assert "global (open, enforce): blocked  <- decides" in shown
    assert "203.0.113.0/24 in global/block: a test (by alice at " in shown
    assert ", owner soc, expires " in shown
    shown = run("explain", "192.0.2.1", "--tenant", "acme").out
    assert shown.startswith("ALLOWED  allowed")
    assert "q1 (pinned)" in shown
    assert "tenant:acme (open, shadow): blocked  (recorded, not enforced)" in shown


@pytest.mark.parametrize("words", [["--path", "http://x/"], ["--path", "/?" + "a" * 100_000]], ids=["bad", "too_large"])
def test_explain_does_not_speak_of_an_address_that_was_not_read(furnished: str, words: list[str]) -> None:
    shown = run("explain", "1.2.3.4", *words).out
    assert "not looked at: the request is refused before that (1.2.3.4)" in shown
    assert "none that can be read (localhost)" in run("explain", "localhost").out


def test_explain_decides_with_the_servers_settings(furnished: str, tmp_path: Path) -> None:
    config = tmp_path / "authz.yaml"
    config.write_text("tenant_from: [query:t]\nunknown_tenant: deny\n")
    shown = run("explain", "192.0.2.1", "--path", "/?t=nobody", "--config", str(config), "-o", "json").json
    assert shown["reason"] == "unknown_tenant"
    config.write_text("tenant_form: [query:t]\nlisten: nowhere\n")
    ran = run("explain", "192.0.2.1", "--config", str(config))
    assert ran.code == 2
    assert "tenant_form" in ran.err
    assert "nowhere" in ran.err


# Administrators who act at once, change ids, a store that is away


class Meeting(RedisStore):
    """A store in which another administrator's change arrives just before ours."""

    async def apply(self, change: Change) -> WriteResult:
        rival = Change("rival", change.epoch, "bob", "first", change.action, change.writes)
        await super().apply(rival)
        return await super().apply(change)


def test_of_two_administrators_at_once_one_is_told(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(session, "RedisStore", Meeting)
        ran = write("block", "add", "203.0.113.0/24", code=1)
        assert "was changed by somebody else" in ran.err
    assert entries("block", "list") == [("global", "global/block", "203.0.113.0/24")]


def test_a_change_sent_again_is_applied_once(policy: str) -> None:
    first = write("block", "add", "203.0.113.0/24", "--expires", "2h", "--change-id", "c-1", "-o", "json").json
    again = write("block", "add", "203.0.113.0/24", "--expires", "2h", "--change-id", "c-1", "-o", "json").json
    assert (first["repeated"], again["repeated"]) == (False, True)
    assert {**first, "repeated": True} == again
    assert "nothing was written now" in write("block", "add", "203.0.113.0/24", "--change-id", "c-1").out
    ran = write("allow", "add", "203.0.113.0/24", "--change-id", "c-1", code=2)
    assert "'c-1' belongs to another change" in ran.err


class Cut(RedisStore):
    """A store whose connection breaks after a change has arrived, before the answer."""

    async def apply(self, change: Change) -> WriteResult:
        await super().apply(change)
        raise StoreUnavailableError("the connection broke")


def test_a_broken_connection_tells_the_command_that_settles_it(
    valkey: Valkey, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{valkey.port}/0"
    words = ["block", "add", "203.0.113.0/24", "--reason", "it's here"]
    with monkeypatch.context() as patched:
        patched.setattr(session, "RedisStore", Cut)
        patched.setattr(sys, "argv", ["/usr/bin/authzctl", *words])
        ran = run(*words)
        assert ran.code == 3
        assert "not known whether the change was applied" in ran.err
        patched.setattr(sys, "argv", ["/usr/bin/authzctl", *words, f"--redis-url={url}"])
        command = session._command_again("x")
        assert PASSWORD not in command
    (line,) = [line.strip() for line in ran.err.splitlines() if line.strip().startswith("authzctl ")]
    program, *again = shlex.split(line)
    assert (program, again[:-1]) == ("authzctl", words)
    assert again[-1].startswith("--change-id=")
    assert "nothing was written now" in run(*again).out
    assert entries("block", "list") == [("global", "global/block", "203.0.113.0/24")]


class Interrupted(RedisStore):
    """A store during whose answer somebody presses Ctrl-C."""

    async def apply(self, change: Change) -> WriteResult:
        await super().apply(change)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
        raise AssertionError


def test_a_write_interrupted_by_ctrl_c_tells_the_command_that_settles_it(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["block", "add", "203.0.113.0/24", "--reason", "a test", "--change-id", "c-1"]
    with monkeypatch.context() as patched:
        patched.setattr(session, "RedisStore", Interrupted)
        patched.setattr(sys, "argv", ["/usr/bin/authzctl", *words])
        ran = run(*words)
    assert (ran.code, ran.out) == (130, "")
    assert "not known whether the change was applied" in ran.err
    assert shlex.join(["authzctl", *words]) in ran.err
    assert "nothing was written now" in run(*words).out


def test_a_store_that_takes_connections_and_says_nothing_is_told_soon(
    prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(administration, "FIRST_LOOK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        for words in (["block", "list"], ["init", "--reason", "r"], ["block", "add", "203.0.113.1", "--reason", "r"]):
            began = time.monotonic()
            ran = run(*words, "--redis-url", url)
            assert (ran.code, ran.out) == (3, "")
            assert "the store does not answer: nothing came back within 0.2 seconds" in ran.err
            assert time.monotonic() - began < 4  # the store alone would go on for much longer


def run_into(out: int | str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard output goes to a file."""
    command = "from authz_server.cli.authzctl import app; app(prog_name='authzctl')"
    with open(out, "w") as file:  # noqa: PTH123 - it may be a descriptor
        return subprocess.run(
            [sys.executable, "-c", command, *words],
            stdout=file, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip


def broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("output", ["table", "json"])
@pytest.mark.parametrize("full", [lambda: "/dev/full", broken_pipe], ids=["full_disk", "reader_left"])
def test_output_that_cannot_be_written_is_one_line_and_hides_no_write(
    policy: str, full: Callable[[], int | str], output: str
) -> None:
    ran = run_into(full(), "block", "add", "203.0.113.0/24", "--reason", "r", "--change-id", "c-1", "-o", output)
    assert ran.returncode == 1, ran.stderr
    assert "the output could not be written: " in ran.stderr
    assert "Done: block.add is revision 2, change id c-1." in ran.stderr
    assert "Traceback" not in ran.stderr
    for words in (f"block list -o {output}", f"explain 203.0.113.1 -o {output}", "history export"):
        ran = run_into(full(), *words.split())
        assert ran.returncode == 1, ran.stderr
        assert "the output could not be written: " in ran.stderr
        assert "Traceback" not in ran.stderr
        assert words.endswith("json") or ran.stderr.count("\n") == 1


def test_a_store_that_is_away_is_told(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0"
    ran = run("block", "list", "--redis-url", url)
    assert (ran.code, ran.out) == (3, "")
    assert PASSWORD not in ran.err
    error = write("block", "add", "203.0.113.0/24", "--redis-url", url, "-o", "json", code=3).error
    assert error["error"] == "store_unavailable"
    assert write("init", "--redis-url", url, "-o", "json", code=3).error["error"] == "store_unavailable"


@pytest.mark.parametrize("url", ["http://127.0.0.1", "redis://127.0.0.1:port/0", "127.0.0.1:6379"])
def test_a_url_that_is_none_is_refused(prefix: str, url: str) -> None:
    assert run("block", "list", "--redis-url", url).code == 2


# Who


def test_the_actor_is_named_or_the_systems_user(valkey: Valkey, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write("block", "add", "203.0.113.1")
    write("block", "add", "203.0.113.2", "--actor", "bob")
    monkeypatch.delenv("AUTHZCTL_ACTOR")
    monkeypatch.setenv("USER", "mallory")
    monkeypatch.setenv("LOGNAME", "mallory")
    write("block", "add", "203.0.113.3")
    events = with_store(valkey, policy, lambda store: store.history(count=3))
    assert [event.actor for event in events][1:] == ["bob", "alice"]
    assert events[0].actor not in ("", "mallory")


def test_a_write_needs_a_reason(policy: str) -> None:
    ran = run("block", "add", "203.0.113.0/24")
    assert ran.code == 2
    assert "--reason" in ran.err


HELP = [
    "",
    "init",
    "explain",
    "allow",
    "allow add",
    "block remove",
    "list add",
    "tenant add",
    "scope set",
    "replica list",
]


@pytest.mark.parametrize("command", HELP)
def test_every_help_names_the_exit_codes(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    assert "Exit codes" in shown.out


# Servers, and waiting for them


def put_report(valkey: Valkey, policy: str, name: str, position: Position | None, lost: int = 0) -> None:
    report = Report(name, "p", 1_700_000_000.0, position, lost)
    with_store(valkey, policy, lambda store: store.report(report, take_over=True))


def test_servers_are_listed_and_forgotten(valkey: Valkey, policy: str) -> None:
    assert "No server has reported." in run("replica", "list").out
    now = with_store(valkey, policy, lambda store: store.position())
    put_report(valkey, policy, "pod-a", now)
    put_report(valkey, policy, "pod-b", None)
    shown = run("replica", "list").out
    assert "revision 1, the newest" in shown
    assert "no policy yet" in shown
    first, second = run("replica", "list", "-o", "json").json["servers"]
    assert (first["server"], first["state"], first["newest"], first["revision"]) == ("pod-a", "reporting", True, 1)
    assert (second["server"], second["newest"], second["revision"]) == ("pod-b", False, None)
    assert "may run" in run("replica", "forget", "pod-a").err
    assert run("replica", "forget", "pod-c").code == 1
    assert run("replica", "forget", "pod-a", "--yes").out == "Forgotten: pod-a.\n"
    assert len(run("replica", "list", "-o", "json").json["servers"]) == 1


def test_changes_that_servers_know_to_be_lost_are_told(valkey: Valkey, policy: str) -> None:
    def told() -> tuple[str, str]:
        checks = {
            row["check"]: row for row in json.JSONDecoder().raw_decode(run("doctor", "-o", "json").out)[0]["checks"]
        }
        return checks["history"]["verdict"], checks["history"]["detail"]

    now = with_store(valkey, policy, lambda store: store.position())
    put_report(valkey, policy, "pod-a", now)
    assert told() == ("ok", "no server knows of a change that was lost")
    put_report(valkey, policy, "pod-b", now, 2)
    verdict, detail = told()
    assert verdict == "warning"
    assert "by the servers that had applied them: pod-b 2." in detail
    assert [row["changes_lost"] for row in run("replica", "list", "-o", "json").json["servers"]] == [0, 2]


@pytest.mark.parametrize("output", ["table", "json"])
def test_servers_are_listed_also_when_the_policy_is_damaged(valkey: Valkey, policy: str, output: str) -> None:
    put_report(valkey, policy, "pod-a", with_store(valkey, policy, lambda store: store.position()))
    put_report(valkey, policy, "pod-b", None)
    with Redis.from_url(valkey.url) as client:
        assert client.delete(f"{{{policy}}}:meta") == 1
    ran = run("replica", "list", "-o", output)
    assert ran.code == 3
    assert "the meta key, which is gone" in ran.err
    if output == "json":
        assert [(row["revision"], row["newest"]) for row in ran.json["servers"]] == [(1, False), (None, False)]
    else:
        assert "revision 1 of epoch" in ran.out
        assert "no policy yet" in ran.out


def test_wait_is_a_yes_only_when_all_have_it(valkey: Valkey, policy: str) -> None:
    ran = write("block", "add", "203.0.113.1", "--wait", "1", code=4)
    assert "Done: block.add is revision 2" in ran.out
    assert "no server has reported" in ran.err
    put_report(valkey, policy, "pod-a", with_store(valkey, policy, lambda store: store.position()))
    ran = write("block", "add", "203.0.113.1", "--wait", "0")
    assert "Nothing to do" in ran.out
    assert "The only server decides by it." in ran.out

    ran = write("block", "add", "203.0.113.2", "--wait", "0.1", "-o", "json", code=4)
    assert ran.json["servers"] == {
        "complete": False,
        "acknowledged": [],
        "lagging": [{"server": "pod-a", "why": "it decides by revision 2"}],
        "problem": None,
    }
    assert ran.error["error"] == "not_acknowledged"
    ran = write("block", "add", "203.0.113.3", "--wait", "0.1", code=4)
    assert "pod-a does not have revision 4: it decides by revision 2" in ran.err
    assert "authzctl replica forget" in ran.err
