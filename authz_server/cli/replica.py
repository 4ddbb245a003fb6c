"""`authzctl replica`: the servers that have reported, and what they decide by."""

from typing import Annotated

import typer

from authz_server.cli.failures import EXIT_CODES, NotFoundError, RefusedError, StoreNotUsableError
from authz_server.cli.output import Json, OutputFormat, print_json, print_table
from authz_server.cli.session import Config, Output, RedisUrl, Yes, group_of, reading
from authz_server.cli.times import show_moment, show_span
from authz_server.replicas import Registry, counting_replicas
from authz_server.store.interface import InconsistentStateError, Replica, Store

replica_app = group_of(
    "Servers that have reported to the store.",
    "A server reports whenever it has applied a change, and at least every ten seconds. One that was not shut down "
    "cleanly stays here, unknown, for an hour: it may be cut off, and still decide by what was before.",
)


@replica_app.command("list", epilog=EXIT_CODES)
def replica_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all servers, what they decide by, and since when nothing was heard of them.

    If the policy in the store is damaged, they are shown all the same, and the exit code is 3.
    """
    with reading(output, redis_url, config) as session:
        registry, damage = session.ask(_look)
        position = registry.position
        if output is OutputFormat.JSON:
            rows: list[Json] = [_replica_json(replica, registry) for replica in registry.replicas]
            standing: dict[str, Json] = {
                "epoch": position.epoch if position else None,
                "revision": position.revision if position else None,
            }
            print_json({**standing, "servers": rows})
        else:
            print_table(
                ("SERVER", "STATE", "DECIDES BY", "HEARD OF", "SINCE"),
                [
                    (
                        replica.name,
                        registry.state(replica),
                        _reported(replica) if damage else registry.decides_by(replica),
                        f"{show_span(replica.silent_seconds)} ago" if replica.report else "not known",
                        show_moment(replica.report.started_at) if replica.report else "not known",
                    )
                    for replica in registry.replicas
                ],
                empty="No server has reported.",
                wrapped=("DECIDES BY",),
            )
        if damage:
            raise StoreNotUsableError([damage])


@replica_app.command("forget", epilog=EXIT_CODES)
def replica_forget(
    *,
    name: Annotated[str, typer.Argument(metavar="SERVER")],
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Remove a server that is gone for good, so that nobody waits for it. One that still reports needs --yes.

    A server that is cut off and not gone goes on deciding by what it has; with --wait, nobody will hear of it.
    """
    with reading(output, redis_url, config) as session:

        async def forget(store: Store) -> None:
            replica = next((replica for replica in await store.replicas() if replica.name == name), None)
            if replica is None:
                raise NotFoundError([f"server {name} has not reported: `authzctl replica list` shows those that have"])
            if not replica.unknown and not yes:
                ago = show_span(replica.silent_seconds)
                raise RefusedError(
                    [f"server {name} reported {ago} ago, and may run: --yes forgets it until it reports again"]
                )
            await store.forget(name)

        session.ask(forget)
        if output is OutputFormat.JSON:
            print_json({"forgotten": name})
        else:
            typer.echo(f"Forgotten: {name}.")


async def _look(store: Store) -> tuple[Registry, str]:
    """Return the servers, and what is wrong with the policy that they are compared with."""
    try:
        return await Registry.read(store), ""
    except InconsistentStateError as error:
        return Registry(await counting_replicas(store), None), str(error)


def _reported(replica: Replica) -> str:
    if replica.report is None:
        return replica.problem
    applied = replica.report.position
    return f"revision {applied.revision} of epoch {applied.epoch}" if applied else "no policy yet"


def _replica_json(replica: Replica, registry: Registry) -> dict[str, Json]:
    report = replica.report
    applied = report.position if report else None
    return {
        "server": replica.name,
        "state": registry.state(replica),
        "epoch": applied.epoch if applied else None,
        "revision": applied.revision if applied else None,
        "newest": registry.is_newest(replica),
        "silent_seconds": round(replica.silent_seconds, 3) if report else None,
        "started_at": show_moment(report.started_at) if report else None,
        "problem": replica.problem or None,
        "changes_lost": report.lost if report else None,
    }
