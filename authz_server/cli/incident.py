"""`authzctl reconcile`, `confirm`, `reload`: what to do when the store is not what its changes have made of it."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import typer

from authz_server.cli.administration import Done, Order, telling_outcome
from authz_server.cli.changes import counted
from authz_server.cli.failures import EXIT_CODES, BadInputError, ChangedMeanwhileError, NotSoundError, RefusedError
from authz_server.cli.output import Json, OutputFormat, print_json, print_lines
from authz_server.cli.session import (
    Actor,
    ChangeId,
    Config,
    Durable,
    Output,
    Reason,
    RedisUrl,
    Wait,
    Yes,
    reading,
    writing,
)
from authz_server.policy.records import RecordKey
from authz_server.store.interface import (
    ChangeIdUsedError,
    EpochChangedError,
    Examination,
    Finding,
    InconsistentStateError,
    Store,
)
from authz_server.store.keys import collection

_PAGE = 200
_SHOWN = 20
"""So many edited or unreadable records are named for people; JSON names all that are known."""

_REMEDY = (
    "what is right and was edited by hand is made official by `authzctl confirm`; what is wrong is written anew with "
    "--replace, or comes back from a backup, and is then confirmed"
)


@dataclass(frozen=True, slots=True)
class Edited:
    """A record that is not what its last change has left."""

    key: RecordKey
    written: str | None
    """By the change."""
    found: str | None
    """There now."""
    revision: int
    """Of the change."""
    actor: str


def register(app: typer.Typer) -> None:
    """Add the commands to `authzctl`."""
    app.command("reconcile", epilog=EXIT_CODES)(reconcile)
    app.command("confirm", epilog=EXIT_CODES)(confirm)
    app.command("reload", epilog=EXIT_CODES)(reload)


def reconcile(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Read everything and say what was written, lost or edited behind the back of the changes; mends nothing.

    Exit code 1 if anything is not as the changes have left it: meant for a scheduled job that somebody hears of.
    """
    with reading(output, redis_url, config) as session:
        examined, edited = session.ask(_look)
        if output is OutputFormat.JSON:
            print_json(_json(examined, edited))
        else:
            print_lines(*_sentences(examined, edited))
        if not examined.sound:
            raise NotSoundError(
                ["the store is not as its changes have left it"],
                [_REMEDY],
            )


def confirm(
    *,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """End an incident: make what is in the store now the policy, under a new epoch. Every server loads it in full.

    Look first (`reconcile`): what was lost stays lost, what was edited counts. Nobody may write meanwhile.
    """
    with writing(
        reason=reason,
        actor=actor,
        change_id=change_id,
        wait=wait,
        durable=durable,
        yes=yes,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:

        async def act(store: Store, order: Order) -> Done:
            examined, edited = await _look(store)
            if examined.sound:
                concern = "nothing is wrong with the store: this only makes every server load it in full (`reload`)"
                writer.confirm((concern,))
            else:
                writer.confirm((*_sentences(examined, edited), "all of that becomes the policy"))
            return await _confirm(store, order, examined, "confirm")

        writer.tell(act)


def reload(
    *,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Make every server load the policy in full, by a new epoch. The policy must be sound, and stays as it is."""
    with writing(
        reason=reason,
        actor=actor,
        change_id=change_id,
        wait=wait,
        durable=durable,
        yes=True,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:

        async def act(store: Store, order: Order) -> Done:
            examined, edited = await _look(store)
            if not examined.sound:
                raise RefusedError(
                    _sentences(examined, edited),
                    ["`authzctl confirm` makes what is there the policy, if that is meant"],
                )
            return await _confirm(store, order, examined, "reload")

        writer.tell(act)


async def _confirm(store: Store, order: Order, examined: Examination, action: str) -> Done:
    try:
        async with telling_outcome(order.change_id):
            result = await store.confirm(
                examined, actor=order.actor, reason=order.reason, change_id=order.change_id, action=action
            )
    except EpochChangedError as error:
        raise ChangedMeanwhileError([str(error)]) from error
    except ChangeIdUsedError as error:
        raise BadInputError([str(error)]) from error
    notes = (f"every server loads {counted(examined.records, 'record')} anew, of epoch {result.position.epoch}",)
    return Done(action, order, result.position, (), changed=True, repeated=result.repeated, notes=notes)


async def _look(store: Store) -> tuple[Examination, list[Edited]]:
    examined = await store.examine()
    suspects = {finding.collection for finding in examined.findings if finding.found or finding.expected}
    edited: list[Edited] = []
    with suppress(InconsistentStateError):  # without its bookkeeping the store tells no history
        edited = await _edited(store, suspects) if suspects else []
    return examined, edited


async def _edited(store: Store, suspects: set[str]) -> list[Edited]:
    """Compare the records of some collections with the last change that touched each, as far as history goes."""
    seen: dict[RecordKey, tuple[str | None, int, str]] = {}
    before = None
    while events := await store.history(count=_PAGE, before=before):
        for event in events:
            parts = [event.records]
            if event.parts and not suspects.isdisjoint(event.counts):
                parts = [part async for part in store.difference(event)]
            for record in (record for part in parts for record in part):
                if collection(record.key) in suspects:
                    seen.setdefault(record.key, (record.new, event.position.revision, event.actor))
        before = events[-1].position.revision
    found = await store.read_many(seen)
    edited = []
    for key, (written, revision, actor) in sorted(seen.items()):
        stored = found[key]
        text = stored.text if stored else None
        if text != written:
            edited.append(Edited(key, written, text, revision, actor))
    return edited


def _sentences(examined: Examination, edited: list[Edited]) -> Iterable[str]:
    yield from (f"not as it must be: {problem}" for problem in examined.problems)
    yield from (f"{finding.collection}: {_finding(finding)}" for finding in examined.findings)
    for one in edited[:_SHOWN]:
        yield (
            f"{one.key} is {one.found or 'gone'}; {one.actor} had written {one.written or 'that it be removed'} "
            f"(revision {one.revision})"
        )
    if len(edited) > _SHOWN:
        yield f"and {len(edited) - _SHOWN} more edited records"
    yield from (f"cannot be read: {problem}" for problem in examined.unreadable[:_SHOWN])
    if len(examined.unreadable) > _SHOWN:
        yield f"and {len(examined.unreadable) - _SHOWN} more that cannot be read"
    if examined.sound:
        position = examined.position
        where = f" at revision {position.revision} of epoch {position.epoch}" if position else ""
        yield f"{counted(examined.records, 'record')}{where}: all as the changes have left them."


def _finding(finding: Finding) -> str:
    there = counted(finding.found, "record")
    if finding.expected is None:
        return f"{there}, and nobody knows how many there should be"
    if finding.expected == finding.found:
        return f"{there}, as there should be, and not with the texts that the changes have written"
    return f"{there} instead of {finding.expected}"


def _json(examined: Examination, edited: list[Edited]) -> dict[str, Json]:
    position = examined.position
    return {
        "epoch": position.epoch if position else None,
        "revision": position.revision if position else None,
        "sound": examined.sound,
        "records": examined.records,
        "problems": examined.problems,
        "collections": [
            {"collection": finding.collection, "expected": finding.expected, "found": finding.found}
            for finding in examined.findings
        ],
        "edited": [
            {
                "record": str(one.key),
                "written": one.written,
                "found": one.found,
                "revision": one.revision,
                "actor": one.actor,
            }
            for one in edited
        ],
        "unreadable": examined.unreadable,
    }
