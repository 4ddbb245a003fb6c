"""`authzctl history`: who changed what and why, shown or exported before the store forgets it."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, TextIO, cast

import typer

from authz_server.cli.changes import counted
from authz_server.cli.failures import EXIT_CODES, BadInputError, NotSoundError
from authz_server.cli.output import Json, OutputFormat, key_json, lines_printed, print_concerns, print_json, print_table
from authz_server.cli.session import Config, Output, RedisUrl, group_of, reading
from authz_server.cli.times import show_moment
from authz_server.store.interface import Event, EventRecord, PositionLostError, Store

_PAGE = 200

history_app = group_of(
    "Who changed what, when and why.",
    "The store keeps as many changes as AUTHZ_HISTORY_EVENTS says, and all of the last AUTHZ_HISTORY_DAYS; servers log "
    "each one that they apply, too.",
)


@history_app.command("show", epilog=EXIT_CODES)
def history_show(
    *,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many changes.")] = 20,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show the newest changes, newest first."""
    with reading(output, redis_url, config) as session:
        events = session.ask(lambda store: store.history(count=count))
        if output is OutputFormat.JSON:
            print_json({"changes": [event_json(event) for event in events]})
            return
        print_table(
            ("REVISION", "WHEN", "WHO", "WHAT", "RECORDS", "WHY"),
            [
                (
                    str(event.position.revision),
                    show_moment(event.at),
                    event.actor,
                    event.action,
                    _records_text(event),
                    event.reason,
                )
                for event in events
            ],
            empty="There is no history.",
            wrapped=("RECORDS", "WHY"),
        )


@history_app.command("export", epilog=EXIT_CODES)
def history_export(
    *,
    after: Annotated[int, typer.Option("--after", min=0, help="Only changes after this revision.")] = 0,
    follows: Annotated[
        str | None, typer.Option("--follows", metavar="CHANGE_ID", help="The change id that revision --after had.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="Where to write; must not exist. Without: standard output.")
    ] = None,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Write the changes as lines of JSON, oldest first, to be kept elsewhere.

    A change of many records has the others in lines of their own (`part`). Run regularly with the last revision of the
    run before (--after) and its change id (--follows), it loses nothing unseen: if changes in between are no longer
    kept, or the store has gone back in its history, it writes what there is, says so, and ends with exit code 1.
    """
    with reading(OutputFormat.TABLE, redis_url, config) as session:
        if follows is not None and not after:
            raise BadInputError(["--follows names the change of the revision --after: give both"])
        with lines_printed() if file is None else _new_file(file) as stream:
            missing = session.ask(lambda store: _export(store, after, follows, stream))
        if missing and after:
            raise NotSoundError(missing)
        print_concerns(missing)


@contextmanager
def _new_file(path: Path) -> Iterator[TextIO]:
    """Write a whole file or none; only its owner may read it (BadInputError: it cannot be written, or is there)."""
    if path.exists():
        raise BadInputError([f"--file {str(path)!r} is there already"])
    try:
        with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as part:
            try:
                yield cast(TextIO, part)
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).rename(path)
            except BaseException:
                with suppress(OSError):
                    Path(part.name).unlink()
                raise
    except OSError as error:
        raise BadInputError([f"--file {str(path)!r} cannot be written: {error.strerror}"]) from error


async def _export(store: Store, after: int, follows: str | None, stream: TextIO) -> list[str]:
    """Write the changes and return what could not be written, for people."""
    missing = await _gone_back(store, after, follows) if after else []
    while events := await store.history_after(after, count=_PAGE):
        for event in events:
            if event.position.revision > after + 1:
                missing.append(f"revisions {after + 1} to {event.position.revision - 1} are no longer kept")
            after = event.position.revision
            _write(stream, event_json(event))
            try:
                async for number, records in _parts(store, event):
                    rows: list[Json] = [_record_json(record) for record in records]
                    _write(stream, {"revision": event.position.revision, "part": number, "records": rows})
            except PositionLostError as error:
                missing.append(str(error))
    return missing


async def _gone_back(store: Store, after: int, follows: str | None) -> list[str]:
    """Say for people whether the store's history is another than the one that led to a revision."""
    what = "the store has gone back in its history (a failover, a restored backup), and what it lost is only in earlier"
    remedy = f"{what} exports; export what took its place with --after of a revision that both have"
    events = await store.history_after(after - 1, count=1)
    if not events:
        newest = await store.history(count=1)
        return [f"the newest revision is {newest[0].position.revision if newest else 0}, not yet {after}: {remedy}"]
    revision, change_id = events[0].position.revision, events[0].position.change_id
    if revision == after + 1:
        change_id = events[0].previous_change_id
    if follows is None or revision > after + 1 or change_id == follows:
        return []
    return [f"revision {after} is of the change {change_id}, not of {follows}: {remedy}"]


async def _parts(store: Store, event: Event) -> AsyncIterator[tuple[int, tuple[EventRecord, ...]]]:
    if event.parts:
        number = 0
        async for records in store.difference(event):
            yield number, records
            number += 1


def _write(stream: TextIO, line: Json) -> None:
    stream.write(json.dumps(line, ensure_ascii=False))
    stream.write("\n")


def event_json(event: Event) -> dict[str, Json]:
    """Return a change as JSON, with what each record was and is."""
    return {
        "epoch": event.position.epoch,
        "revision": event.position.revision,
        "change_id": event.position.change_id,
        "previous_change_id": event.previous_change_id,
        "at": show_moment(event.at),
        "actor": event.actor,
        "action": event.action,
        "reason": event.reason,
        "records": [_record_json(record) for record in event.records],
        "parts": event.parts,
        "size": event.size or len(event.records),
        "counts": event.counts,
    }


def _record_json(record: EventRecord) -> dict[str, Json]:
    return {**key_json(record.key), "previous": record.previous, "new": record.new}


def _records_text(event: Event) -> str:
    if event.size:
        return counted(event.size, "record")
    named = [str(record.key) for record in event.records[:3]]
    more = len(event.records) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
