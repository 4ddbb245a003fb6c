"""`authzctl list import`: a named list is made to hold what a file says, in one change of any size."""

from pathlib import Path
from typing import Annotated

import typer

from authz_server.cli import inputs
from authz_server.cli.administration import Done, Order, telling_outcome
from authz_server.cli.changes import WIDEST_UNASKED, counted, size_text
from authz_server.cli.failures import EXIT_CODES, BadInputError, ChangedMeanwhileError, NotFoundError
from authz_server.cli.output import OutputFormat, print_concerns, print_notice
from authz_server.cli.session import (
    Actor,
    ChangeId,
    Config,
    Durable,
    Expires,
    Output,
    Owner,
    Reason,
    RedisUrl,
    Wait,
    Yes,
    writing,
)
from authz_server.policy.access import Entry
from authz_server.policy.records import Record, RecordKey, RecordKind, entry_key
from authz_server.store.interface import (
    ChangeIdUsedError,
    CollectionTouchedError,
    Difference,
    EpochChangedError,
    Event,
    Replacement,
    Store,
)
from authz_server.store.keys import collection

ACTION = "list.import"

_LARGEST_SHARE_REMOVED = 0.5
"""More of a list than this is taken out only when somebody says that it is meant: most often a feed was cut off."""


def register(list_app: typer.Typer) -> None:
    """Add the command to `authzctl list`."""
    list_app.command("import", epilog=EXIT_CODES)(list_import)


def list_import(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="One network a line; - is standard input.")],
    reason: Reason,
    expires: Expires = None,
    owner: Owner = None,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Let a file that names no network empty the list.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show how much would change.")] = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Make a list hold the networks of a file, and no others: a feed, in one change of any size.

    Empty lines, and what follows a # or a ;, do not count. The file is read as a whole first: one bad line, and nothing
    is done. Networks that are there already, with the same expiry and owner, stay as they are. Taking out more than
    half of a list needs --yes, and emptying it --allow-empty.
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
        list_name = writer.reader.read(inputs.named("a list"), name) or ""
        networks = inputs.feed(writer.reader, file)
        entries = writer.entries_of(networks, expires, owner)
        writer.reader.done()
        if not entries and not allow_empty:
            raise BadInputError([f"{file} names no network: --allow-empty lets it empty {list_name}"])
        concerns = tuple(
            f"{network} {size_text(network)}"
            for network in networks
            if network.prefix_length < WIDEST_UNASKED[network.version]
        )

        def approve(difference: Difference) -> bool:
            print_notice(f"{list_name}: {_sizes(difference)}.", output)
            dangers = concerns
            if difference.removed > difference.before * _LARGEST_SHARE_REMOVED:
                dangers += (f"{list_name} loses {difference.removed:,} of {counted(difference.before, 'network')}",)
            if dry_run:
                print_concerns(dangers)
            elif dangers:
                writer.confirm(dangers)
            return not dry_run

        wished: dict[RecordKey, Record] = {entry_key(list_name, entry): entry for entry in entries}

        async def act(store: Store, order: Order) -> Done:
            key = RecordKey(RecordKind.LIST, list_name)
            name_of_all = collection(RecordKey(RecordKind.ENTRY, "", list_name))
            if order.resent and (event := await store.find_change(order.change_id)):
                _require_same(event, name_of_all, len(wished), order)
                return Done(ACTION, order, event.position, (), changed=True, repeated=True)
            if await store.read(key) is None:
                raise NotFoundError([f"{key} does not exist: `authzctl list add {list_name}` creates it"])
            position = await store.position()
            replacement = Replacement(
                order.change_id,
                position.epoch,
                order.actor,
                order.reason,
                ACTION,
                {name_of_all: wished},
                _keeps,
            )
            try:
                async with telling_outcome(order.change_id, small=False):
                    replaced = await store.replace(replacement, approve)
            except (CollectionTouchedError, EpochChangedError) as error:
                raise ChangedMeanwhileError([str(error)]) from error
            except ChangeIdUsedError as error:
                raise BadInputError([str(error)]) from error
            if replaced.result is None:
                return Done(ACTION, order, position, (), changed=False, difference=replaced.difference)
            return Done(
                ACTION,
                order,
                replaced.result.position,
                (),
                changed=True,
                repeated=replaced.result.repeated,
                difference=replaced.difference,
            )

        writer.tell(act)


def _keeps(old: Record, new: Record) -> bool:
    return (
        isinstance(old, Entry)
        and isinstance(new, Entry)
        and old.expires_at == new.expires_at
        and new.owner in ("", old.owner)
    )


def _require_same(event: Event, name: str, size: int, order: Order) -> None:
    """Refuse a change id that was another change's, as far as its event tells."""
    if event.action != ACTION or event.counts != {name: size}:
        what = f"{event.action} by {event.actor}, revision {event.position.revision}"
        raise BadInputError([f"the change id {order.change_id!r} belongs to another change: {what}"])


def _sizes(difference: Difference) -> str:
    return (
        f"{counted(difference.before, 'network')} now; {difference.added:,} to add, {difference.changed:,} to write "
        f"anew, {difference.removed:,} to take out; {difference.unchanged:,} stay as they are"
    )
