"""What `authzctl doctor` thinks of a store: pure judgements of facts."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from authz_server.cli.times import show_span
from authz_server.store.interface import Replica, ServerFacts

OLDEST = (7, 0)
"""Of Redis; keys that users may only read, and `acl_check_cmd` in scripts, are there since."""
_WAITAOF_SINCE = (7, 2)
_MEMORY_SHARE = 0.8
_SKEW_SECONDS = 2.0
"""Entries expire by the servers' clocks; holds and reports are judged by the store's."""


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at."""

    what: str
    verdict: Verdict
    detail: str
    """What is so and, unless it is fine, how to mend it."""


def judge_server(facts: ServerFacts, local_time: float) -> Iterator[Check]:
    """Judge the server that the policy is on; `local_time` in seconds since the Unix epoch, when it was asked."""
    yield _version(facts)
    yield _eviction(facts)
    yield _memory(facts)
    yield _persistence(facts)
    yield _replication(facts)
    yield _user(facts)
    yield _clock(facts, local_time)
    yield _freeing(facts)


def judge_replicas(replicas: list[Replica], newest: int) -> Check:
    """Judge the servers that report."""
    counted = [replica for replica in replicas if not replica.vanished]
    if not counted:
        return Check("servers", Verdict.WARNING, "none has reported: does AUTHZ_REDIS_PREFIX agree?")
    silent = [replica.name for replica in counted if replica.unknown]
    behind = [
        replica.name
        for replica in counted
        if replica.report and (replica.report.position is None or replica.report.position.revision < newest)
    ]
    if silent:
        return Check("servers", Verdict.WARNING, f"not heard of: {', '.join(silent)} (`authzctl replica list`)")
    if behind:
        return Check("servers", Verdict.WARNING, f"behind: {', '.join(behind)}; look again in a second")
    return Check("servers", Verdict.OK, f"{len(counted)} report, all at the newest revision")


def judge_history(replicas: list[Replica]) -> Check:
    """Judge whether the store has kept what the servers saw there."""
    lost = {replica.name: replica.report.lost for replica in replicas if replica.report and replica.report.lost}
    if not lost:
        return Check("history", Verdict.OK, "no server knows of a change that was lost")
    told = ", ".join(f"{name} {count}" for name, count in sorted(lost.items()))
    return Check(
        "history",
        Verdict.WARNING,
        f"changes that the store had taken on and has lost since, by the servers that had applied them: {told}. Their "
        "logs name each (`change lost`), to be made again",
    )


def _version(facts: ServerFacts) -> Check:
    numbers = _numbers(facts.version)
    if numbers < OLDEST:
        return Check("version", Verdict.PROBLEM, f"{facts.version}: at least Redis 7.0, or Valkey, is needed")
    if numbers < _WAITAOF_SINCE:
        return Check("version", Verdict.WARNING, f"{facts.version}: --durable needs Redis 7.2 (WAITAOF), or Valkey")
    return Check("version", Verdict.OK, facts.version)


def _eviction(facts: ServerFacts) -> Check:
    if facts.eviction_policy != "noeviction":
        return Check(
            "eviction",
            Verdict.PROBLEM,
            f"maxmemory-policy is {facts.eviction_policy}: when its memory is full, the server throws lists away, and "
            "an allowlist or blocklist that is gone decides nothing. Set `maxmemory-policy noeviction`",
        )
    if facts.evicted_keys:
        return Check(
            "eviction",
            Verdict.PROBLEM,
            f"noeviction now, but {facts.evicted_keys} keys were evicted since the server started: run "
            "`authzctl reconcile`",
        )
    return Check("eviction", Verdict.OK, "noeviction")


def _memory(facts: ServerFacts) -> Check:
    used = f"{facts.used_memory / 2**20:,.0f} MiB used"
    if not facts.max_memory:
        return Check("memory", Verdict.OK, f"{used}, no maxmemory: the machine's memory is the limit")
    share = facts.used_memory / facts.max_memory
    told = f"{used}, {share:.0%} of maxmemory"
    if share > _MEMORY_SHARE:
        return Check("memory", Verdict.WARNING, f"{told}: when it is full, changes are refused")
    return Check("memory", Verdict.OK, told)


def _persistence(facts: ServerFacts) -> Check:
    if facts.failing_writes:
        return Check("persistence", Verdict.PROBLEM, f"the server cannot write its files: {facts.failing_writes}")
    if facts.append_only_file:
        return Check("persistence", Verdict.OK, "append-only file")
    if facts.save_points:
        return Check(
            "persistence",
            Verdict.WARNING,
            f"snapshots only (save {facts.save_points}): a restart loses the changes since the last one. "
            "Set `appendonly yes`",
        )
    return Check("persistence", Verdict.PROBLEM, "none: a restart loses the whole policy. Set `appendonly yes`")


def _replication(facts: ServerFacts) -> Check:
    if facts.role != "master":
        return Check(
            "replication",
            Verdict.PROBLEM,
            "this is a replica: changes are refused, and what is read may be old. Use the primary's address, or "
            "AUTHZ_REDIS_SENTINELS",
        )
    if not facts.replicas:
        return Check("replication", Verdict.WARNING, "no replica: when this server is lost, so is what it had")
    if not facts.min_replicas_to_write:
        return Check(
            "replication",
            Verdict.OK,
            f"{facts.replicas} connected; `min-replicas-to-write 1` would keep a cut-off primary from taking changes "
            "that are lost when it comes back",
        )
    return Check("replication", Verdict.OK, f"{facts.replicas} connected, {facts.min_replicas_to_write} required")


def _user(facts: ServerFacts) -> Check:
    if facts.user == "default":
        return Check(
            "user",
            Verdict.WARNING,
            "default, who may do everything: acl/users.acl has users with no more rights than they need",
        )
    return Check("user", Verdict.OK, facts.user)


def _clock(facts: ServerFacts, local_time: float) -> Check:
    skew = facts.time - local_time
    if abs(skew) > _SKEW_SECONDS:
        side = "ahead of" if skew > 0 else "behind"
        return Check(
            "clock", Verdict.WARNING, f"{show_span(abs(skew))} {side} this machine's: are all clocks kept (NTP)?"
        )
    return Check("clock", Verdict.OK, "agrees with this machine's")


def _freeing(facts: ServerFacts) -> Check:
    if facts.lazy_expire == "no":
        return Check(
            "freeing",
            Verdict.WARNING,
            "lazyfree-lazy-expire is no: a large import that was given up half way stops the server for a moment "
            "when it expires. Set it to yes",
        )
    return Check("freeing", Verdict.OK, "in the background" if facts.lazy_expire else "not known")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
