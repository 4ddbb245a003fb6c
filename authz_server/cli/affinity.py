"""`authzctl tenant`, `instance`, `affinity`: which instance holds which tenant's state."""

from typing import Annotated

import typer

from authz_server.cli import inputs
from authz_server.cli.changes import AddInstance, MoveTenant, PinTenant, Wish, place_tenant
from authz_server.cli.failures import EXIT_CODES
from authz_server.cli.inputs import Reader
from authz_server.cli.output import Json, OutputFormat, print_json, print_table, record_json
from authz_server.cli.session import (
    Actor,
    ChangeId,
    Config,
    Output,
    Reason,
    RedisUrl,
    Replace,
    Wait,
    Yes,
    group_of,
    load,
    reading,
    standing,
    writing,
)
from authz_server.policy.affinity import MAX_WEIGHT, rendezvous
from authz_server.store.interface import Store

tenant_app = group_of("Tenants: each registered one is pinned to an instance.")
instance_app = group_of("Instances that tenants can be pinned to.")
affinity_app = group_of("Which instance holds which tenant's state.")

TenantId = Annotated[str, typer.Argument(metavar="TENANT")]
InstanceName = Annotated[str, typer.Argument(metavar="INSTANCE")]


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
            snapshot = await load(store)
            return place_tenant(tenant_id, snapshot.tenants, snapshot.instances.values())

        writer.prepare(placed)


@tenant_app.command("list", epilog=EXIT_CODES)
def tenant_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all registered tenants and where they are pinned."""
    with reading(output, redis_url, config) as session:
        snapshot = session.ask(load)
        tenants = [snapshot.tenants[name] for name in sorted(snapshot.tenants)]
        if output is OutputFormat.JSON:
            print_json({**standing(snapshot), "tenants": [record_json(tenant) for tenant in tenants]})
            return
        print_table(
            ("TENANT", "INSTANCE", "HELD"),
            [(tenant.id, tenant.instance or "cannot be read", "held" if tenant.held else "") for tenant in tenants],
            empty="No tenant is registered.",
        )


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
        snapshot = session.ask(load)
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


@affinity_app.command("pin", epilog=EXIT_CODES)
def affinity_pin(
    *,
    tenant: TenantId,
    instance: InstanceName,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Pin a tenant to an instance, and so register it. One that is pinned elsewhere is refused: see `affinity move`."""
    with writing(
        reason=reason,
        actor=actor,
        change_id=change_id,
        wait=wait,
        yes=yes,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:
        tenant_id = writer.reader.read(inputs.named("a tenant"), tenant) or ""
        name = writer.reader.read(inputs.named("an instance"), instance)
        writer.wish(PinTenant("affinity.pin", tenant_id, name))


@affinity_app.command("move", epilog=EXIT_CODES)
def affinity_move(
    *,
    tenant: TenantId,
    instance: InstanceName,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Move a registered tenant to another instance, at once.

    Its requests are not held back: for a moment, replicas that have not heard of the move still use the old instance.
    """
    with writing(
        reason=reason,
        actor=actor,
        change_id=change_id,
        wait=wait,
        yes=yes,
        output=output,
        redis_url=redis_url,
        config=config,
    ) as writer:
        tenant_id = writer.reader.read(inputs.named("a tenant"), tenant) or ""
        name = writer.reader.read(inputs.named("an instance"), instance) or ""
        writer.wish(MoveTenant(tenant_id, name))


@affinity_app.command("show", epilog=EXIT_CODES)
def affinity_show(
    *, tenant: TenantId, output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None
) -> None:
    """Show where a tenant is pinned, and where the rendezvous hash would put it (also if it is not registered)."""
    with reading(output, redis_url, config) as session:
        reader = Reader()
        reader.read(inputs.named("a tenant"), tenant)
        reader.done()
        snapshot = session.ask(load)
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
            [(tenant, pinned, "held" if record and record.held else "no", hashed or "no active instance")],
            empty="",
        )
