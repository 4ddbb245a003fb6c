"""`authzctl tenant` and `affinity`: which instance holds which tenant's state."""

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from authz_server.cli import inputs
from authz_server.cli.changes import MoveTenant, PinTenant, ReleaseTenant, UnpinTenant, Wish, place_tenant
from authz_server.cli.failures import EXIT_CODES, NotFoundError
from authz_server.cli.inputs import Reader
from authz_server.cli.moves import Strictly, plan_rebalance
from authz_server.cli.moving import (
    AFFINITY,
    BATCH,
    SETTLE_SECONDS,
    Apply,
    Batch,
    PairsFile,
    Settle,
    SomeInstance,
    SomeTenant,
    SomeTenants,
    Strict,
    TenantsFile,
    carry_out_many,
    hold_wait,
    move,
    names,
    pairs,
    show_plan,
)
from authz_server.cli.output import OutputFormat, print_json, print_table, record_json
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
    group_of,
    load,
    reading,
    standing,
    writing,
)
from authz_server.cli.times import show_moment, show_span
from authz_server.policy.affinity import Hold, Tenant, rendezvous
from authz_server.policy.snapshot import Snapshot
from authz_server.store.interface import Store

tenant_app = group_of("Tenants: each registered one is pinned to an instance.")
affinity_app = group_of(
    "Which instance holds which tenant's state.",
    "Many tenants at once: --file names a file (- is standard input) with a line `TENANT INSTANCE`, or `TENANT`, each.",
)

TenantId = Annotated[str, typer.Argument(metavar="TENANT")]


@tenant_app.command("add", epilog=EXIT_CODES)
def tenant_add(
    *,
    tenant: TenantId,
    reason: Reason,
    instance: Annotated[
        str | None,
        typer.Option("--instance", help="Where its state is. Without: where the rendezvous hash puts it."),
    ] = None,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register a tenant and pin it to an instance."""
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
        tenant_id = writer.reader.read(inputs.named("a tenant"), tenant) or ""
        if instance is not None:
            name = writer.reader.read(inputs.named("an instance"), instance)
            writer.wish(PinTenant("tenant.add", tenant_id, name))
            return

        async def placed(store: Store) -> Wish:
            snapshot = await load(store, AFFINITY)
            return place_tenant(tenant_id, snapshot.tenants, snapshot.instances.values())

        writer.prepare(placed)


@tenant_app.command("list", epilog=EXIT_CODES)
def tenant_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all registered tenants and where they are pinned."""
    with reading(output, redis_url, config) as session:
        snapshot = session.ask(lambda store: load(store, AFFINITY))
        tenants = [snapshot.tenants[name] for name in sorted(snapshot.tenants)]
        if output is OutputFormat.JSON:
            print_json({**standing(snapshot), "tenants": [record_json(tenant) for tenant in tenants]})
            return
        print_table(
            ("TENANT", "INSTANCE", "HELD"),
            [(tenant.id, tenant.instance or "cannot be read", _held(tenant)) for tenant in tenants],
            empty="No tenant is registered.",
        )


@affinity_app.command("pin", epilog=EXIT_CODES)
def affinity_pin(
    *,
    tenant: SomeTenant = None,
    instance: SomeInstance = None,
    reason: Reason,
    file: PairsFile = None,
    batch: Batch = BATCH,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Pin tenants to instances, and so register them. One that is pinned elsewhere is refused: see `affinity move`.

    One change if they fit into one, and then all of them or none.
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
        wanted = pairs(writer.reader, tenant, instance, file)
        carry_out_many(writer, [PinTenant("affinity.pin", *pair) for pair in wanted], batch)


@affinity_app.command("move", epilog=EXIT_CODES)
def affinity_move(
    *,
    tenant: SomeTenant = None,
    instance: SomeInstance = None,
    reason: Reason,
    file: PairsFile = None,
    strict: Strict = False,
    settle: Settle = SETTLE_SECONDS,
    batch: Batch = BATCH,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Move registered tenants to other instances.

    At once: for a moment, servers that have not heard of the move still use the old instance. Strictly: their requests
    are denied with 503 until every server has acknowledged that; no request reaches the old instance after the first on
    the new one. A strict move that is stopped leaves its tenants where they were.
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
        wanted = pairs(writer.reader, tenant, instance, file)
        moves = [MoveTenant(*pair) for pair in wanted]
        if strict:

            async def given(_: Store) -> Sequence[MoveTenant]:
                return moves

            move(writer, given, Strictly(hold_wait(writer), settle), batch)
        else:
            carry_out_many(writer, moves, batch)


@affinity_app.command("unpin", epilog=EXIT_CODES)
def affinity_unpin(
    *,
    tenants: SomeTenants = None,
    reason: Reason,
    file: TenantsFile = None,
    batch: Batch = BATCH,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Forget tenants and their pins; the servers then treat them as any that is not registered."""
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
        wanted = names(writer.reader, tenants, file)
        carry_out_many(writer, [UnpinTenant(name) for name in wanted], batch)


@affinity_app.command("release", epilog=EXIT_CODES)
def affinity_release(
    *,
    tenants: SomeTenants = None,
    reason: Reason,
    file: TenantsFile = None,
    batch: Batch = BATCH,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """End the hold of tenants; they stay where they are pinned. Somebody else's hold is asked about."""
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
        wanted = names(writer.reader, tenants, file)
        carry_out_many(writer, [ReleaseTenant(name, writer.actor) for name in wanted], batch)


@affinity_app.command("holds", epilog=EXIT_CODES)
def affinity_holds(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show the tenants that are held, so that their requests get 503: who moves them, where to, since when."""
    with reading(output, redis_url, config) as session:
        snapshot = session.ask(lambda store: load(store, AFFINITY))
        held = [tenant for name in sorted(snapshot.tenants) if (tenant := snapshot.tenants[name]).held]
        if output is OutputFormat.JSON:
            print_json({**standing(snapshot), "tenants": [record_json(tenant) for tenant in held]})
            return
        now = time.time()
        print_table(
            ("TENANT", "PINNED TO", "HELD FOR", "BY", "SINCE", "WHY"),
            [(tenant.id, tenant.instance or "cannot be read", *_hold_columns(tenant.hold, now)) for tenant in held],
            empty="No tenant is held.",
            wrapped=("SINCE", "WHY"),
        )


@affinity_app.command("rebalance", epilog=EXIT_CODES)
def affinity_rebalance(
    *,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history. Needed with --apply.")] = "",
    onto: Annotated[
        list[str] | None, typer.Option("--to", help="Only tenants that the hash places on this instance. Repeat.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Move so many, at most.")] = None,
    apply: Apply = False,
    strict: Strict = True,
    settle: Settle = SETTLE_SECONDS,
    batch: Batch = BATCH,
    actor: Actor = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show which pinned tenants the hash would place elsewhere now, and with --apply move them there.

    Nothing else ever moves a pinned tenant because instances come or get another weight.
    """
    instances = frozenset(onto or ())

    def plan(snapshot: Snapshot) -> tuple[MoveTenant, ...]:
        unknown = sorted(instances - snapshot.instances.keys())
        if unknown:
            raise NotFoundError(f"instance {name} does not exist" for name in unknown)
        return plan_rebalance(snapshot.tenants.values(), snapshot.instances.values(), onto=instances)[:limit]

    if not apply:
        with reading(output, redis_url, config) as session:
            show_plan(
                session, plan, "authzctl affinity rebalance", empty="Every pinned tenant is where the hash places it."
            )
        return
    with writing(
        reason=reason,
        actor=actor,
        change_id=None,
        wait=wait,
        durable=durable,
        yes=yes,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:

        async def moves(store: Store) -> Sequence[MoveTenant]:
            return plan(await load(store, AFFINITY))

        move(writer, moves, Strictly(hold_wait(writer), settle) if strict else None, batch)


@affinity_app.command("show", epilog=EXIT_CODES)
def affinity_show(
    *, tenant: TenantId, output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None
) -> None:
    """Show where a tenant is pinned, and where the rendezvous hash would put it (also if it is not registered)."""
    with reading(output, redis_url, config) as session:
        reader = Reader()
        reader.read(inputs.named("a tenant"), tenant)
        reader.done()
        snapshot = session.ask(lambda store: load(store, AFFINITY))
        record = snapshot.tenants.get(tenant)
        hashed = rendezvous(tenant, snapshot.instances.values())
        instance = snapshot.instances.get(record.instance or "") if record else None
        if output is OutputFormat.JSON:
            print_json(
                {
                    **standing(snapshot),
                    "tenant": tenant,
                    "registered": record is not None,
                    "instance": record.instance if record else None,
                    "instance_state": instance.state if instance else None,
                    "held": record.held if record else False,
                    "hash": hashed,
                }
            )
            return
        state = f" ({instance.state})" if instance else " (not registered)"
        pinned = "not registered" if record is None else f"{record.instance or 'cannot be read'}{state}"
        print_table(
            ("TENANT", "PINNED TO", "HELD", "BY HASH"),
            [(tenant, pinned, (record and _held(record)) or "no", hashed or "no active instance")],
            empty="",
        )


def _held(tenant: Tenant) -> str:
    if tenant.hold:
        return f"for {tenant.hold.to} by {tenant.hold.owner}"
    return "held" if tenant.held else ""


def _hold_columns(hold: Hold | None, now: float) -> tuple[str, str, str, str]:
    if hold is None:
        return "not said", "not said", "not said", "not said"
    return hold.to, hold.owner, f"{show_moment(hold.since)} ({show_span(now - hold.since)} ago)", hold.reason
