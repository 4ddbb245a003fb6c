"""`authzctl cleanup`: takes out what no longer counts. A request never does that: it only looks at the clock."""

from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from authz_server.cli.changes import RemoveExpired
from authz_server.cli.moves import Moved, Mover, OnProgress
from authz_server.cli.output import Json, OutputFormat, print_json, print_table, record_json
from authz_server.cli.session import Actor, Config, Durable, Output, Reason, RedisUrl, Wait, writing
from authz_server.cli.times import parse_span, show_expiry
from authz_server.policy.access import Entry
from authz_server.policy.records import RecordKey
from authz_server.store.interface import Store
from authz_server.store.keys import ENTRIES

_DEFAULT_SPAN = "1h"
_RECORDS_AT_ONCE = 20_000
_ENTRIES_AT_ONCE = 100
"""In one change: each may be in a list of its own, and a list costs Redis more time than an entry."""


def cleanup(
    *,
    reason: Reason = "cleanup of what has expired",
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="SPAN",
            help="Only entries that ended so long ago: each server goes by its own clock, and those may differ.",
        ),
    ] = _DEFAULT_SPAN,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be taken out.")] = False,
    actor: Actor = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Take out entries that have expired, and servers that have been silent for more than an hour.

    It changes no decision, and is made for a CronJob.
    """
    with writing(
        reason=reason,
        actor=actor,
        change_id=None,
        wait=wait,
        durable=durable,
        yes=False,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:
        span = writer.reader.read(parse_span, older_than) or 0
        writer.reader.done()
        ended_before = writer.now - span
        if dry_run:
            _show(writer.session.ask(lambda store: _expired(store, ended_before)), writer.now, output)
            return

        async def act(store: Store, show: OnProgress) -> Moved:
            for replica in await store.replicas():
                if replica.vanished:
                    await store.forget(replica.name)
            wishes = [RemoveExpired(key, ended_before) for key, _ in await _expired(store, ended_before)]
            if not wishes:
                return Moved("cleanup", 0, ())
            mover = Mover(store, writer.order, batch=_ENTRIES_AT_ONCE, on_progress=show, noun="network")
            return await mover.at_once(wishes)

        writer.tell_many(act)


async def _expired(store: Store, ended_before: float) -> list[tuple[RecordKey, Entry]]:
    """Return the entries that ended before a moment, by list and network."""
    found = []
    for names in _some_at_a_time(await store.record_counts()):
        found += [
            (key, record)
            for key, record in (await store.load(names)).records
            if isinstance(record, Entry) and not record.counts_at(ended_before)
        ]
    return sorted(found, key=lambda pair: (pair[0].list_name, pair[1].network))


def _some_at_a_time(counts: Mapping[str, int]) -> Iterator[set[str]]:
    """Yield lists that are read together: tenants may have many small ones, and not everything fits into memory."""
    names: set[str] = set()
    records = 0
    for name, count in counts.items():
        if not name.startswith(ENTRIES):
            continue
        if names and records + count > _RECORDS_AT_ONCE:
            yield names
            names, records = set(), 0
        names.add(name)
        records += count
    if names:
        yield names


def _show(expired: list[tuple[RecordKey, Entry]], now: float, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        rows: list[Json] = [{"list": key.list_name, **(record_json(entry) or {})} for key, entry in expired]
        print_json({"expired": rows})
        return
    print_table(
        ("LIST", "NETWORK", "ENDED", "WHY"),
        [
            (key.list_name, str(entry.network), show_expiry(entry.expires_at, now), f"{entry.reason} ({entry.author})")
            for key, entry in expired
        ],
        empty="Nothing has expired for so long.",
        wrapped=("ENDED", "WHY"),
    )
