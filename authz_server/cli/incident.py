"""`authzctl reconcile`, `confirm`, `reload`: what to do when the store is not what its changes have made of it."""

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

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
    PositionLostError,
    RevisionChangedError,
    Store,
)
from authz_server.store.keys import collection

_PAGE = 200
_SHOWN = 20
"""So many edited or unreadable records are named for people; JSON names all that are known."""
_UNWRITTEN = 1000
"""So many records without a change are named at most: a history that was trimmed knows nothing of most."""

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
    confirmed: int | None
    """The revision of a later `confirm`, which may have made official what is there."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the store found out."""

    examined: Examination
    edited: Sequence[Edited] = ()
    unwritten: Mapping[RecordKey, str] = field(default_factory=dict)
    """Records that no known change has written, with their texts; at most _UNWRITTEN."""
    more_unwritten: bool = False
    since: int = 1
    """The changes before this revision are not known any more, or not all of them."""
    confirmed: int | None = None
    """The revision of the last `confirm`, which may have made official what no change has written."""

    @property
    def sound(self) -> bool:
        """Whether everything is as changes have left it."""
        return self.examined.sound


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
        look = session.ask(_look)
        if output is OutputFormat.JSON:
            print_json(_json(look))
        else:
            print_lines(*_sentences(look))
        if not look.sound:
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
            look = await _look(store)
            if look.sound:
                concern = "nothing is wrong with the store: this only makes every server load it in full (`reload`)"
                writer.confirm((concern,))
                return await _confirm(store, order, look.examined, "confirm")
            found = tuple(_sentences(look))
            writer.confirm((*found, "all of that becomes the policy"))
            return await _confirm(store, order, look.examined, "confirm", *(f"confirmed: {each}" for each in found))

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
            look = await _look(store)
            if not look.sound:
                raise RefusedError(
                    _sentences(look),
                    ["`authzctl confirm` makes what is there the policy, if that is meant"],
                )
            return await _confirm(store, order, look.examined, "reload")

        writer.tell(act)


async def _confirm(store: Store, order: Order, examined: Examination, action: str, *confirmed: str) -> Done:
    try:
        async with telling_outcome(order.change_id):
            result = await store.confirm(
                examined, actor=order.actor, reason=order.reason, change_id=order.change_id, action=action
            )
    except EpochChangedError as error:
        raise ChangedMeanwhileError([str(error)]) from error
    except ChangeIdUsedError as error:
        raise BadInputError([str(error)]) from error
    loading = f"every server loads {counted(examined.records, 'record')} anew, of epoch {result.position.epoch}"
    notes = () if result.repeated else (*confirmed, loading)
    return Done(action, order, result.position, (), changed=True, repeated=result.repeated, notes=notes)


async def _look(store: Store) -> Look:
    try:
        examined = await store.examine()
    except InconsistentStateError as error:  # not even that can be read
        raise NotSoundError([str(error)]) from error
    except RevisionChangedError as error:
        raise ChangedMeanwhileError([str(error)]) from error
    suspects = {finding.collection for finding in examined.findings if finding.found or finding.expected}
    if suspects:
        with suppress(InconsistentStateError):  # without its bookkeeping the store tells no history
            return await _compare(store, examined, suspects)
    return Look(examined)


async def _compare(store: Store, examined: Examination, suspects: set[str]) -> Look:
    """Compare the records of some collections with the last change that touched each, as far as history goes."""
    seen: dict[RecordKey, Edited] = {}
    before = None
    since = 1
    confirmed = None
    while events := await store.history(count=_PAGE, before=before):
        for event in events:
            revision = event.position.revision
            if event.action == "confirm":
                confirmed = confirmed or revision
            parts = [event.records]
            if event.parts and not suspects.isdisjoint(event.counts):
                try:
                    parts = [part async for part in store.difference(event)]
                except PositionLostError:
                    since = max(since, revision + 1)
            for record in (record for part in parts for record in part):
                if collection(record.key) in suspects and record.key not in seen:
                    seen[record.key] = Edited(record.key, record.new, None, revision, event.actor, confirmed)
        before = events[-1].position.revision
    found = await store.read_many(seen)
    texts = {key: stored.text if stored else None for key, stored in found.items()}
    edited = [replace(last, found=texts[key]) for key, last in sorted(seen.items()) if texts[key] != last.written]
    unwritten = await _unwritten(store, suspects, seen)
    more = len(unwritten) > _UNWRITTEN
    if more:
        unwritten.popitem()
    return Look(examined, edited, unwritten, more, max(since, before or 1), confirmed)


async def _unwritten(store: Store, names: Iterable[str], seen: Container[RecordKey]) -> dict[RecordKey, str]:
    """Return the records of some collections that are not among those seen, and stop when they are too many."""
    unwritten: dict[RecordKey, str] = {}
    for name in sorted(names):
        async for key, text in store.records(name):
            if key not in seen:
                unwritten[key] = text
            if len(unwritten) > _UNWRITTEN:
                return unwritten
    return unwritten


def _sentences(look: Look) -> Iterable[str]:
    examined = look.examined
    yield from (f"not as it must be: {problem}" for problem in examined.problems)
    yield from (f"{finding.collection}: {_finding(finding)}" for finding in examined.findings)
    for one in look.edited[:_SHOWN]:
        later = f", before revision {one.confirmed} confirmed what was there" if one.confirmed else ""
        yield (
            f"{one.key} is {one.found or 'gone'}; {one.actor} had written {one.written or 'that it be removed'} "
            f"(revision {one.revision}{later})"
        )
    if len(look.edited) > _SHOWN:
        yield f"and {len(look.edited) - _SHOWN} more edited records"
    yield from (f"{key} is {text}; no change has written it" for key, text in list(look.unwritten.items())[:_SHOWN])
    if len(look.unwritten) > _SHOWN:
        more = f"more than {_UNWRITTEN - _SHOWN:,}" if look.more_unwritten else f"{len(look.unwritten) - _SHOWN:,}"
        yield f"and {more} others that no change has written"
    if look.unwritten and look.since > 1:
        yield f"changes before revision {look.since} are no longer known: what they wrote is among these too"
    if look.unwritten and look.confirmed:
        yield f"what revision {look.confirmed} confirmed is among these too"
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


def _json(look: Look) -> dict[str, Json]:
    examined = look.examined
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
                "confirmed_by_revision": one.confirmed,
            }
            for one in look.edited
        ],
        "unwritten": [{"record": str(key), "found": text} for key, text in look.unwritten.items()],
        "more_unwritten": look.more_unwritten,
        "known_since_revision": look.since,
        "confirmed_by_revision": look.confirmed,
        "unreadable": examined.unreadable,
    }
