"""What the commands that move tenants share: their options, what they read, the plan that they show."""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from authz_server.cli import inputs
from authz_server.cli.changes import HoldTenant, MoveTenant, Together, Wish, counted
from authz_server.cli.failures import AuthzctlError
from authz_server.cli.inputs import Reader
from authz_server.cli.moves import LARGEST_BATCH, Moved, Mover, OnProgress, Strictly, require_sound
from authz_server.cli.output import OutputFormat, print_json, print_lines, print_table
from authz_server.cli.session import Session, Writer, load, standing
from authz_server.policy.affinity import Hold
from authz_server.policy.snapshot import Snapshot
from authz_server.store.interface import Store

AFFINITY = frozenset({"tenants", "instances"})
"""The collections that these commands look at."""

BATCH = 100
SETTLE_SECONDS = 1.0
_HOLD_WAIT_SECONDS = 10.0

SomeTenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", show_default=False)]
SomeInstance = Annotated[str | None, typer.Argument(metavar="[INSTANCE]", show_default=False)]
SomeTenants = Annotated[list[str] | None, typer.Argument(metavar="[TENANT]...", show_default=False)]
PairsFile = Annotated[
    Path | None, typer.Option("--file", help="Many: a line `TENANT INSTANCE` each; - is standard input.")
]
TenantsFile = Annotated[Path | None, typer.Option("--file", help="Many: a line `TENANT` each; - is standard input.")]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--at-once",
        help="Deny the tenants' requests (503) until every server knows, then switch; or just switch.",
    ),
]
Settle = Annotated[
    float,
    typer.Option(
        "--settle",
        metavar="SECONDS",
        min=0,
        max=600,
        help="With --strict: how long requests that were let through before may still be on their way.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", min=1, max=LARGEST_BATCH, help="Tenants in one change.")]
Apply = Annotated[bool, typer.Option("--apply", help="Do it. Without: only show what would be done.")]


def pairs(reader: Reader, tenant: str | None, instance: str | None, file: Path | None) -> list[tuple[str, str]]:
    """Read which tenants go where, from the command line or a file; a tenant that is to go to two places is refused."""
    if file is not None:
        if tenant is not None:
            reader.refuse("--file and TENANT INSTANCE: give one of them")
        rows = inputs.lines(reader, file, ("a tenant", "an instance"))
    elif tenant is None or instance is None:
        reader.refuse("give TENANT and INSTANCE, or --file")
        rows = []
    else:
        reader.read(inputs.named("a tenant"), tenant)
        reader.read(inputs.named("an instance"), instance)
        rows = [(tenant, instance)]
    wanted: dict[str, str] = {}
    for name, where in rows:
        if wanted.setdefault(name, where) != where:
            reader.refuse(f"tenant {name} is to go to {wanted[name]} and to {where}")
    return list(wanted.items())


def names(reader: Reader, tenants: list[str] | None, file: Path | None) -> list[str]:
    """Read tenants, from the command line or a file."""
    if file is not None:
        if tenants:
            reader.refuse("--file and TENANT: give one of them")
        return [name for (name,) in inputs.lines(reader, file, ("a tenant",))]
    if not tenants:
        reader.refuse("give TENANT, or --file")
    return list(reader.read_all(inputs.named("a tenant"), tenants or ()))


def hold_wait(writer: Writer) -> float:
    """Return how long the servers have for acknowledging the hold of a batch."""
    return _HOLD_WAIT_SECONDS if writer.wait is None else writer.wait


def carry_out_many(writer: Writer, wishes: Sequence[Wish], batch: int) -> None:
    """Carry out wishes of one action: as one change if they fit into one, else in batches."""
    writer.reader.done()
    if len(wishes) <= batch:
        writer.wish(wishes[0] if len(wishes) == 1 else Together(tuple(wishes)))
        return

    async def act(store: Store, show: OnProgress) -> Moved:
        await require_sound(store, writer.order, wishes, writer.confirm)
        return await Mover(store, writer.order, batch=batch, on_progress=show).at_once(wishes)

    writer.tell_many(act)


def move(
    writer: Writer,
    prepare: Callable[[Store], Awaitable[Sequence[MoveTenant]]],
    strictly: Strictly | None,
    batch: int,
    *,
    before: Callable[[Store], Awaitable[str]] | None = None,
    afterwards: Callable[[Store], Awaitable[str]] | None = None,
) -> None:
    """Move tenants in batches, once all problems and dangers were told.

    `before` is done between that and the moves, and what it says is told should they fail; what `afterwards` says is
    told when they have not.
    """

    async def act(store: Store, show: OnProgress) -> Moved:
        moves = await prepare(store)
        order = writer.order
        wishes: Sequence[Wish] = moves
        if strictly:
            wishes = [
                HoldTenant(each, Hold(order.actor, each.instance, int(order.now), order.reason)) for each in moves
            ]
        if wishes:
            await require_sound(store, order, wishes, writer.confirm)
        mover = Mover(store, order, batch=batch, on_progress=show)
        if strictly and moves:
            await mover.require_servers(strictly)
        done = await before(store) if before else ""
        moved = Moved("affinity.move", 0, ())
        try:
            if moves:
                moved = await (mover.strictly(moves, strictly) if strictly else mover.at_once(moves))
        except AuthzctlError as error:
            error.problems += (done,) if done else ()
            raise
        return replace(moved, notes=(*moved.notes, await afterwards(store))) if afterwards else moved

    writer.tell_many(act)


def show_plan(session: Session, plan: Callable[[Snapshot], Sequence[MoveTenant]], command: str, *, empty: str) -> None:
    """Print what moves would be made; nothing is written."""
    snapshot = session.ask(lambda store: load(store, AFFINITY))
    moves = plan(snapshot)
    if session.output is OutputFormat.JSON:
        rows = [{"tenant": each.tenant, "from": each.origin, "to": each.instance} for each in moves]
        print_json({**standing(snapshot), "moves": rows})
        return
    ways = Counter((each.origin or "", each.instance) for each in moves)
    examples: dict[tuple[str, str], list[str]] = {}
    for each in moves:
        examples.setdefault((each.origin or "", each.instance), []).append(each.tenant)
    print_table(
        ("FROM", "TO", "TENANTS", "SUCH AS"),
        [
            (*way, f"{count:,}", ", ".join(examples[way][:3]) + (" ..." if count > 3 else ""))
            for way, count in sorted(ways.items())
        ],
        empty=empty,
        wrapped=("SUCH AS",),
    )
    if moves:
        held = sum(snapshot.tenants[each.tenant].held for each in moves)
        also = f" {counted(held, 'tenant')} of them held: see `authzctl affinity holds`." if held else ""
        print_lines(
            f"{counted(len(moves), 'tenant')} would move; nothing is done yet.{also}",
            f"`{command} --apply --reason WHY` does it.",
        )
