"""`authzctl` on a store that is not as its changes have left it, through a real Valkey."""

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from redis import Redis
from support.policies import Writer
from typer.testing import CliRunner

from authz_server.cli import session
from authz_server.cli.authzctl import app
from authz_server.cli.diagnosis import Verdict, judge_server
from authz_server.demo.valkey import Valkey
from authz_server.policy.affinity import Instance
from authz_server.policy.records import RecordKey, RecordKind
from authz_server.store.interface import ServerFacts
from authz_server.store.redis_store import RedisStore

Call = Callable[..., Result]

FINE = ServerFacts("7.2.4", "master", 1, 1, "noeviction", 0, 1 << 20, 0, True, "", "", "authz-admin", 100.0, "yes")


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def call(valkey: Valkey, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("AUTHZ_REDIS_URL", valkey.url)
    monkeypatch.setenv("AUTHZ_REDIS_PREFIX", prefix)
    monkeypatch.setenv("AUTHZCTL_ACTOR", "alice")

    def run(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def client(valkey: Valkey) -> Iterator[Any]:
    with Redis.from_url(valkey.url, decode_responses=True) as client:
        yield client


@pytest.fixture
def policy(call: Call) -> None:
    call("init", "--reason", "new")
    call("block", "add", "203.0.113.0/24", "--reason", "scraper")
    call("instance", "add", "q1", "--reason", "new")


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_a_sound_store_is_reconciled_and_reloaded(call: Call) -> None:
    told = json.loads(call("reconcile", "-o", "json").stdout)
    assert (told["sound"], told["records"], told["edited"]) == (True, 2, [])
    reloaded = json.loads(call("reload", "--reason", "to be sure", "-o", "json").stdout)
    assert reloaded["revision"] == told["revision"] + 1
    assert reloaded["epoch"] != told["epoch"]
    assert json.loads(call("history", "show", "-n", "1", "-o", "json").stdout)["changes"][0]["action"] == "reload"


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("command", ["confirm --yes", "reload"])
def test_a_change_id_of_another_change_is_bad_input(call: Call, command: str) -> None:
    call("block", "add", "198.51.100.0/24", "--reason", "r", "--change-id", "c-1")
    told = call(*command.split(), "--reason", "r", "--change-id", "c-1", code=2).output
    assert "the change id 'c-1' was applied as revision 4" in told


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_an_edited_record_is_named_and_can_be_confirmed(call: Call, client: Any, prefix: str) -> None:
    client.hset(f"{{{prefix}}}:instances", "q1", '{"state":"active","weight":7}')
    result = call("reconcile", "-o", "json", code=1)
    (edited,) = json.JSONDecoder().raw_decode(result.stdout)[0]["edited"]
    assert (edited["record"], edited["found"]) == ("instance q1", '{"state":"active","weight":7}')
    assert "reconcile" not in call("reload", "--reason", "r", code=1).stdout
    assert "--yes" in call("confirm", "--reason", "it is right", code=1).output
    call("confirm", "--reason", "it is right", "--yes")
    call("reconcile")


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_a_block_that_cannot_be_read_is_explained(call: Call, client: Any, prefix: str) -> None:
    client.hset(f"{{{prefix}}}:entries:global/block", "203.0.113.0/24", "{}")
    shown = " ".join(call("explain", "203.0.113.9", code=0).output.split())
    assert "'reason' is missing; its network blocks all the same" in shown
    told = json.loads(call("explain", "203.0.113.9", "-o", "json").stdout)
    assert "'reason' is missing" in json.dumps(told["scopes"][0]["entry"])


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_what_no_change_has_written_is_named(call: Call, client: Any, prefix: str) -> None:
    written = client.hget(f"{{{prefix}}}:entries:global/block", "203.0.113.0/24")
    client.hset(f"{{{prefix}}}:entries:global/allow", "198.51.100.0/24", written)
    told = json.JSONDecoder().raw_decode(call("reconcile", "-o", "json", code=1).stdout)[0]
    assert told["unwritten"] == [{"record": "entry 198.51.100.0/24 in list global/allow", "found": written}]
    assert (told["more_unwritten"], told["known_since_revision"], told["edited"]) == (False, 1, [])
    accusation = f"entry 198.51.100.0/24 in list global/allow is {written}; no change has written it"
    assert accusation in call("confirm", "--reason", "r", code=1).output
    confirmed = call("confirm", "--reason", "r", "--yes").output
    assert f"confirmed: {accusation}" in " ".join(confirmed.split())

    # From then on it is policy; who finds another one is told that this one may be.
    client.hset(f"{{{prefix}}}:entries:global/allow", "192.0.2.0/24", written)
    client.hset(f"{{{prefix}}}:entries:global/block", "203.0.113.0/24", "{}")
    told = json.JSONDecoder().raw_decode(call("reconcile", "-o", "json", code=1).stdout)[0]
    assert [one["record"] for one in told["unwritten"]] == [
        "entry 198.51.100.0/24 in list global/allow",
        "entry 192.0.2.0/24 in list global/allow",
    ]
    assert (told["confirmed_by_revision"], told["edited"][0]["confirmed_by_revision"]) == (4, 4)
    shown = call("reconcile", code=1).output
    assert "what revision 4 confirmed is among these too" in shown
    assert "(revision 2, before revision 4 confirmed what was there)" in shown


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_changes_that_are_no_longer_kept_are_told(call: Call, client: Any, prefix: str, tmp_path: Path) -> None:
    feed = tmp_path / "feed"
    feed.write_text("\n".join(f"10.0.{n // 256}.{n % 256}" for n in range(1005)))
    call("list", "add", "feed", "--reason", "r")
    call("list", "import", "feed", str(feed), "--reason", "r", "--change-id", "c-1", "--yes")
    call("list", "add", "feed", "10.1.0.0/24", "--reason", "r")
    assert client.delete(f"{{{prefix}}}:difference:c-1") == 1
    client.hset(f"{{{prefix}}}:entries:feed", "10.1.0.0/24", "{}")
    shown = call("reconcile", code=1).output
    assert "entry 10.1.0.0/24 in list feed is {}; alice had written" in shown

    assert "and more than 980 others that no change has written" in shown
    assert "changes before revision 6 are no longer known: what they wrote is among these too" in shown


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("words", ["reconcile", "reload --reason r", "confirm --yes --reason r", "doctor"])
def test_a_key_of_something_else_is_told_with_the_remedy(call: Call, client: Any, prefix: str, words: str) -> None:
    client.delete(f"{{{prefix}}}:instances")
    client.set(f"{{{prefix}}}:instances", "sessions")
    told = " ".join(call(*words.split(), code=1).output.split())
    assert "instances" in told
    assert "take that key away (RENAME), then restore a backup" in told
    client.delete(f"{{{prefix}}}:instances")
    call("confirm", "--reason", "r", "--yes")


class Busy(RedisStore):
    """A store that others change whenever somebody has a look at it."""

    weights = count(1)

    async def _examine_collection(self, name: str) -> tuple[tuple[int, int], list[str]]:
        await Writer(self).set((RecordKey(RecordKind.INSTANCE, "q1"), Instance("q1", next(self.weights))))
        return await super()._examine_collection(name)


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("words", ["reconcile", "reload --reason r", "confirm --yes --reason r"])
def test_a_store_that_never_rests_is_no_incident_and_confirms_nothing(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(session, "RedisStore", Busy)
    assert "others keep changing the policy" in call(*words.split(), code=1).output
    assert "confirm" not in call("history", "export").stdout


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("key", ["instances", "meta", "counts", "changes"])
def test_a_lost_key_is_an_incident_until_it_is_confirmed(call: Call, client: Any, prefix: str, key: str) -> None:
    client.delete(f"{{{prefix}}}:{key}")
    call("reconcile", code=1)
    call("doctor", code=1)
    call("confirm", "--reason", "we know", "--yes")
    call("reconcile")
    call("block", "add", "198.51.100.0/24", "--reason", "goes on")


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_history_is_shown_and_exported(call: Call, tmp_path: Path) -> None:
    shown = json.loads(call("history", "show", "-n", "2", "-o", "json").stdout)["changes"]
    assert [change["action"] for change in shown] == ["instance.add", "block.add"]
    path = tmp_path / "history.jsonl"
    call("history", "export", "--after", "1", "--file", str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == shown[::-1]
    assert path.stat().st_mode & 0o777 == 0o600
    call("history", "export", "--file", str(path), code=2)
    assert len(call("history", "export").stdout.splitlines()) == 3


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_an_export_that_cannot_follow_on_the_one_before_says_so(call: Call, client: Any, prefix: str) -> None:
    lines = [json.loads(line) for line in call("history", "export").stdout.splitlines()]
    ids = [line["change_id"] for line in lines]
    for after, follows in ((3, ids[2]), (2, ids[1])):
        result = call("history", "export", "--after", str(after), "--follows", follows)
        assert [json.loads(line) for line in result.stdout.splitlines()] == lines[after:]
    result = call("history", "export", "--after", "2", "--follows", "lost", code=1)
    assert json.loads(result.stdout.splitlines()[0]) == lines[2]
    assert f"revision 2 is of the change {ids[1]}, not of lost: the store has gone back" in result.stderr
    assert "the newest revision is 3, not yet 9" in call("history", "export", "--after", "9", code=1).stderr
    assert "give both" in call("history", "export", "--follows", "lost", code=2).stderr

    client.xtrim(f"{{{prefix}}}:changes", maxlen=1, approximate=False)
    assert "revisions 1 to 2 are no longer kept" in call("history", "export").stderr
    assert "revisions 2 to 2 are no longer kept" in call("history", "export", "--after", "1", code=1).stderr
    call("history", "export", "--after", "2", "--follows", ids[1])
    assert "not of lost" in call("history", "export", "--after", "2", "--follows", "lost", code=1).stderr


@pytest.mark.integration
@pytest.mark.usefixtures("policy")
def test_durable_is_refused_where_nothing_lasts(call: Call) -> None:
    assert "no append-only file" in call("instance", "add", "q2", "--reason", "r", "--durable", code=1).output
    assert "q2" not in call("instance", "list").stdout


@pytest.mark.integration
def test_durable_where_there_is_an_append_only_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with Valkey(append_only=True) as server:
        monkeypatch.setenv("AUTHZ_REDIS_URL", server.url)
        result = CliRunner().invoke(app, ["init", "--reason", "new", "--durable"])
        assert result.exit_code == 0, result.output
        assert "durable: in the append-only file" in result.output


def test_a_fit_server_has_no_problem() -> None:
    assert {check.verdict for check in judge_server(FINE, 100.5)} == {Verdict.OK}


@pytest.mark.parametrize(
    ("field", "value", "what", "verdict"),
    [
        ("eviction_policy", "allkeys-lru", "eviction", Verdict.PROBLEM),
        ("evicted_keys", 3, "eviction", Verdict.PROBLEM),
        ("version", "6.2.1", "version", Verdict.PROBLEM),
        ("version", "7.0.15", "version", Verdict.WARNING),
        ("append_only_file", False, "persistence", Verdict.PROBLEM),
        ("failing_writes", "aof_last_write_status is err", "persistence", Verdict.PROBLEM),
        ("role", "slave", "replication", Verdict.PROBLEM),
        ("replicas", 0, "replication", Verdict.WARNING),
        ("user", "default", "user", Verdict.WARNING),
        ("time", 90.0, "clock", Verdict.WARNING),
        ("max_memory", 1 << 20, "memory", Verdict.WARNING),
        ("lazy_expire", "no", "freeing", Verdict.WARNING),
    ],
)
def test_what_is_wrong_is_said(field: str, value: Any, what: str, verdict: Verdict) -> None:
    facts = replace(FINE, **{field: value})
    assert [(check.what, check.verdict) for check in judge_server(facts, 100.0) if check.verdict is not Verdict.OK] == [
        (what, verdict)
    ]
