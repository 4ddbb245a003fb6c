"""`authzctl instance`: the instances that tenants can be pinned to, and how they are taken out of use."""

from collections.abc import Sequence
from typing import Annotated

import typer

from authz_server.cli import inputs
from authz_server.cli.administration import carry_out
from authz_server.cli.changes import AddInstance, MoveTenant, RemoveInstance, SetInstance, Wish, counted
from authz_server.cli.failures import EXIT_CODES, NotFoundError
from authz_server.cli.moves import Strictly, plan_drain
from authz_server.cli.moving import (
    AFFINITY,
    BATCH,
    SETTLE_SECONDS,
    Apply,
    Batch,
    Settle,
    Strict,
    hold_wait,
    move,
    show_plan,
)
from authz_server.cli.output import Json, OutputFormat, print_json, print_table, record_json
from authz_server.cli.session import (
    Actor,
    ChangeId,
    Config,
    Durable,
    Output,
    Reason,
    RedisUrl,
    Replace,
    Wait,
    Writer,
    Yes,
    group_of,
    load,
    reading,
    standing,
    writing,
)
from authz_server.policy.affinity import MAX_WEIGHT, InstanceState
from authz_server.policy.snapshot import Snapshot
from authz_server.store.interface import Store

instance_app = group_of(
    "Instances that tenants can be pinned to.",
    "An active instance takes new tenants, in proportion to its weight. A pinned tenant stays where it is whatever "
    "becomes of the instances, until somebody moves it: `instance drain`, `affinity move`, `affinity rebalance`.",
)

InstanceName = Annotated[str, typer.Argument(metavar="INSTANCE")]
Weight = Annotated[int, typer.Argument(metavar="WEIGHT", min=1, max=MAX_WEIGHT)]


@instance_app.command("add", epilog=EXIT_CODES)
def instance_add(
    *,
    name: InstanceName,
    reason: Reason,
    weight: Annotated[
        int, typer.Option("--weight", min=1, max=MAX_WEIGHT, help="Its share of new tenants, relative to the others'.")
    ] = 1,
    replace: Replace = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register an instance; it is active at once. With --replace, give one that is there another weight."""
    with writing(
        reason=reason,
        actor=actor,
        change_id=change_id,
        wait=wait,
        durable=durable,
        yes=False,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:
        instance_name = writer.reader.read(inputs.named("an instance"), name) or ""
        writer.wish(AddInstance(instance_name, weight, replace))


@instance_app.command("list", epilog=EXIT_CODES)
def instance_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all instances and how many tenants are pinned to each."""
    with reading(output, redis_url, config) as session:
        snapshot = session.ask(lambda store: load(store, AFFINITY))
        pinned = dict.fromkeys(sorted(snapshot.instances), 0)
        for tenant in snapshot.tenants.values():
            if tenant.instance in pinned:
                pinned[tenant.instance] += 1
        if output is OutputFormat.JSON:
            instances: list[Json] = [
                {**(record_json(snapshot.instances[name]) or {}), "tenants": count} for name, count in pinned.items()
            ]
            print_json({**standing(snapshot), "instances": instances})
            return
        print_table(
            ("INSTANCE", "STATE", "WEIGHT", "TENANTS"),
            [
                (name, snapshot.instances[name].state, str(snapshot.instances[name].weight), str(count))
                for name, count in pinned.items()
            ],
            empty="No instance is registered.",
        )


@instance_app.command("weight", epilog=EXIT_CODES)
def instance_weight(
    *,
    name: InstanceName,
    weight: Weight,
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
    """Set an instance's share of new tenants, 1 to 100, relative to the others'."""
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
        _set(writer, "instance.weight", name, weight=weight)


@instance_app.command("activate", epilog=EXIT_CODES)
def instance_activate(
    *,
    name: InstanceName,
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
    """Let an instance take new tenants (again)."""
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
        _set(writer, "instance.activate", name, state=InstanceState.ACTIVE)


@instance_app.command("down", epilog=EXIT_CODES)
def instance_down(
    *,
    name: InstanceName,
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
    """Note that an instance is away: it takes no new tenants. Those that are pinned to it stay pinned to it."""
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
        _set(writer, "instance.down", name, state=InstanceState.DOWN)


@instance_app.command("drain", epilog=EXIT_CODES)
def instance_drain(
    *,
    name: InstanceName,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the history. Needed with --apply.")] = "",
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
    """Show where an instance's tenants would go, and with --apply take it out of use and move them there.

    It takes no new tenants from then on; its own go where the hash places them among the other active instances, a
    batch at a time. Stopped half-way, the same command does the rest.
    """

    def plan(snapshot: Snapshot) -> tuple[MoveTenant, ...]:
        if name not in snapshot.instances:
            raise NotFoundError([f"instance {name} does not exist: `authzctl instance list` shows those that do"])
        return plan_drain(name, snapshot.tenants.values(), snapshot.instances.values())

    if not apply:
        with reading(output, redis_url, config) as session:
            show_plan(session, plan, f"authzctl instance drain {name}", empty=f"No tenant is pinned to {name}.")
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
        writer.reader.read(inputs.named("an instance"), name)

        async def moves(store: Store) -> Sequence[MoveTenant]:
            return plan(await load(store, AFFINITY))

        async def draining(_: Store) -> Wish:
            return SetInstance("instance.drain", name, state=InstanceState.DRAINING)

        async def take_out_of_use(store: Store) -> str:
            await carry_out(store, writer.order, draining, writer.confirm)
            return f"{name} is draining all the same: it takes no new tenants; sent again, this command does the rest"

        async def what_is_left(store: Store) -> str:
            left = len(plan(await load(store, AFFINITY)))
            if left:
                return f"{counted(left, 'tenant')} still pinned to {name}, which is draining: the same command goes on"
            return f"{name} is draining and has no tenant left: `authzctl instance remove {name}` takes it out"

        how = Strictly(hold_wait(writer), settle) if strict else None
        move(writer, moves, how, batch, before=take_out_of_use, afterwards=what_is_left)


@instance_app.command("remove", epilog=EXIT_CODES)
def instance_remove(
    *,
    name: InstanceName,
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
    """Take an instance out of the policy. One that tenants are pinned to is kept: `instance drain` comes first."""
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
        writer.reader.read(inputs.named("an instance"), name)

        async def removal(store: Store) -> Wish:
            tenants = (await load(store, {"tenants"})).tenants.values()
            there = (each.id for each in tenants if name == each.instance or (each.hold and each.hold.to == name))
            return RemoveInstance(name, tuple(sorted(there)))

        writer.prepare(removal)


def _set(
    writer: Writer, action: str, name: str, *, weight: int | None = None, state: InstanceState | None = None
) -> None:
    writer.reader.read(inputs.named("an instance"), name)

    async def setting(store: Store) -> Wish:
        snapshot = await load(store, AFFINITY)
        return SetInstance(
            action,
            name,
            weight,
            state,
            sum(tenant.instance == name for tenant in snapshot.tenants.values()),
            any(
                instance.state is InstanceState.ACTIVE and instance.name != name
                for instance in snapshot.instances.values()
            ),
        )

    writer.prepare(setting)
