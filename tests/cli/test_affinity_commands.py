"""`authzctl instance` and `affinity` against a real Valkey: many tenants at once, plans, what is told."""

import asyncio
from pathlib import Path

import pytest
from support.authzctl import run, write

from authz_server.demo.valkey import Valkey
from authz_server.store.interface import Report
from authz_server.store.redis_store import RedisStore

pytestmark = pytest.mark.integration


@pytest.fixture
def instances(policy: str) -> str:
    """Two instances in a policy of the test's own."""
    write("instance", "add", "q1")
    write("instance", "add", "q2")
    return policy


def pins() -> dict[str, str]:
    return {row["id"]: row["instance"] for row in run("tenant", "list", "-o", "json").json["tenants"]}


def test_many_are_pinned_moved_and_unpinned_from_a_file(instances: str, tmp_path: Path) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("".join(f"t{number} q1\n" for number in range(250)))
    ran = write("affinity", "pin", "--file", str(file))
    assert "Done: affinity.pin of 250 tenants, 3 changes, revisions 4 to 6." in ran.out
    assert "200 of 250 done" in ran.err
    assert "Nothing to do" in write("affinity", "pin", "--file", str(file)).out
    assert (
        "--change-id names one change" in write("affinity", "pin", "--file", str(file), "--change-id", "c", code=2).err
    )
    file.write_text("t0 q2\nt1 q9\nnobody q2\n")
    ran = write("affinity", "move", "--file", str(file), code=1)
    assert "instance q9 does not exist" in ran.err
    assert "tenant nobody is not registered" in ran.err
    assert set(pins().values()) == {"q1"}
    file.write_text("t0 q2\nt1 q2\n")
    write("affinity", "move", "--file", str(file), "--change-id", "two")
    assert "nothing was written now" in write("affinity", "move", "--file", str(file), "--change-id", "two").out
    assert pins()["t1"] == "q2"
    file.write_text("t2\nt3\n")
    write("affinity", "unpin", "--file", str(file))
    write("affinity", "unpin", "t4", "t5")
    assert len(pins()) == 246


def test_what_names_no_tenant_is_refused(instances: str, tmp_path: Path) -> None:
    file = tmp_path / "pins.txt"
    file.write_text("t0 q1\nt0 q2\n")
    assert "tenant t0 is to go to q1 and to q2" in write("affinity", "pin", "--file", str(file), code=2).err
    assert "give TENANT and INSTANCE, or --file" in write("affinity", "move", "t0", code=2).err
    assert "give one of them" in write("affinity", "pin", "t0", "q1", "--file", str(file), code=2).err
    assert "give TENANT, or --file" in write("affinity", "unpin", code=2).err


def test_an_instance_is_drained_by_plan_and_then_removed(instances: str) -> None:
    for number in range(6):
        write("affinity", "pin", f"t{number}", "q1")
    shown = run("instance", "drain", "q1").out
    assert "6 tenants would move; nothing is done yet." in shown
    plan = run("instance", "drain", "q1", "-o", "json").json["moves"]
    assert plan == [{"tenant": f"t{number}", "from": "q1", "to": "q2"} for number in range(6)]
    assert "has 6 tenants (t0, t1, t2, t3, t4 and 1 more)" in write("instance", "remove", "q1", "--yes", code=1).err
    assert "--reason is empty" in run("instance", "drain", "q1", "--apply").err
    ran = write("instance", "drain", "q1", "--apply", "--wait", "0", code=4)
    assert "nothing was held or moved" in ran.err
    assert "no server has reported" in ran.err
    assert "active" in run("instance", "list").out
    assert "draining" not in run("instance", "list").out
    ran = write("instance", "drain", "q1", "--apply", "--at-once", "--batch", "4")
    assert "q1 is draining and has no tenant left: `authzctl instance remove q1` takes it out" in ran.out
    assert set(pins().values()) == {"q2"}
    write("instance", "remove", "q1")
    rows = run("instance", "list", "-o", "json").json["instances"]
    assert [(row["name"], row["tenants"]) for row in rows] == [("q2", 6)]
    assert "no active instance" in write("instance", "drain", "q2", "--apply", code=1).err


def test_an_instance_that_comes_moves_nobody_until_somebody_asks(instances: str) -> None:
    for number in range(12):
        write("tenant", "add", f"t{number}")
    before = pins()
    assert "every pinned tenant is where the hash places it." in run("affinity", "rebalance").out.lower()
    assert "`authzctl affinity rebalance`" in write("instance", "add", "q3", "--weight", "9").out
    write("instance", "weight", "q3", "10")
    assert pins() == before
    plan = run("affinity", "rebalance", "-o", "json").json["moves"]
    assert plan
    assert {row["to"] for row in plan} == {"q3"}
    assert pins() == before
    assert run("affinity", "rebalance", "--to", "q2", "-o", "json").json["moves"] == []
    assert "instance q9 does not exist" in run("affinity", "rebalance", "--to", "q9").err
    moved = write("affinity", "rebalance", "--apply", "--at-once", "--limit", "2", "-o", "json").json
    assert (moved["action"], moved["records"], len(moved["changes"])) == ("affinity.move", 2, 1)
    write("affinity", "rebalance", "--apply", "--at-once")
    assert pins() == before | {row["tenant"]: "q3" for row in plan}


def test_states_of_instances(instances: str) -> None:
    write("affinity", "pin", "acme", "q1")
    ran = write("instance", "down", "q1")
    assert "weight 1, down (was weight 1, active)" in ran.out
    assert "1 tenant pinned to q1" in ran.out
    assert "no other instance is active" in write("instance", "down", "q2", code=1).err
    write("instance", "activate", "q1")
    write("instance", "down", "q2")
    assert write("instance", "weight", "q1", "101", code=2)
    assert "No tenant is held." in run("affinity", "holds").out
    assert run("affinity", "holds", "-o", "json").json["tenants"] == []


@pytest.mark.parametrize("command", ["affinity move", "instance drain", "affinity rebalance", "replica forget"])
def test_every_help_names_the_exit_codes(command: str) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    assert "Exit codes" in shown.out


def test_a_drain_that_is_stopped_says_what_was_done(valkey: Valkey, instances: str) -> None:
    """A server that hangs after its last report: nothing is held, and the instance is draining."""

    async def report() -> None:
        store = RedisStore(valkey.url, prefix=instances)
        try:
            await store.report(Report("pod-a", "p", 1.0, await store.position()), take_over=True)
        finally:
            await store.close()

    write("affinity", "pin", "acme", "q1")
    asyncio.run(report())
    error = write("instance", "drain", "q1", "--apply", "--wait", "0", "-o", "json", code=4).error
    assert error["problems"] == [
        "nothing was held or moved: not every server would acknowledge a hold",
        "pod-a: it decides by revision 4",
        "q1 is draining all the same: it takes no new tenants; sent again, this command does the rest",
    ]
    assert pins() == {"acme": "q1"}
