"""`authzctl`: the security team's command line. Every write names who and why, and is one change in the history."""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated

import typer

from authz_server.cli import doctor, feed, incident, inputs
from authz_server.cli.administration import initialise, load_snapshot
from authz_server.cli.affinity import affinity_app, tenant_app
from authz_server.cli.changes import (
    AddResource,
    AddToList,
    AddToScope,
    RemoveFromList,
    RemoveFromScope,
    SetScope,
)
from authz_server.cli.cleanup import cleanup
from authz_server.cli.failures import (
    EXIT_CODES,
    BadInputError,
    NotFoundError,
)
from authz_server.cli.history import history_app
from authz_server.cli.inputs import Reader
from authz_server.cli.instance import instance_app
from authz_server.cli.output import (
    Json,
    OutputFormat,
    print_concerns,
    print_explanation,
    print_json,
    print_table,
    record_json,
)
from authz_server.cli.replica import replica_app
from authz_server.cli.session import (
    NAME,
    Actor,
    ChangeId,
    Config,
    Durable,
    Expires,
    Networks,
    Output,
    Owner,
    Reason,
    RedisUrl,
    Replace,
    ScopeName,
    Wait,
    Yes,
    group_of,
    load,
    reading,
    standing,
    writing,
)
from authz_server.cli.times import parse_moment, show_expiry, show_moment
from authz_server.explanation import CannotDescribeError, describe_request, explain
from authz_server.policy.access import Enforcement, Entry, Mode, Resource, Scope, Side, own_list
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import RecordKey, RecordKind
from authz_server.policy.snapshot import Snapshot
from authz_server.store.interface import Store
from authz_server.store.keys import ENTRIES, collection, parse_scope_name

app = typer.Typer(
    name=NAME,
    help="Administer the policy that authz-server decides by: who may in, and which instance holds which tenant.\n\n"
    "A write needs --reason. Sent again with the same --change-id, it is applied once.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its frames would print the store's URL, which may hold a password
)
list_app = group_of(
    "Named lists, such as `office`, that several scopes can share.",
    "A list allows or blocks nothing by itself: that is up to the scopes that name it (`scope set`, `resource add`). "
    "Its networks are edited here; `allow` and `block` edit the scopes' own lists.",
)
resource_app = group_of("Parts of the site that have rules of their own, such as the API documentation.")
scope_app = group_of("What a scope does with addresses: global, tenant:ID or resource:NAME.")


@app.command("init", epilog=EXIT_CODES)
def init(
    *,
    reason: Reason,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Exit code 0 also when a policy is there.")] = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Create an empty policy; one that is there already is left as it is (exit code 1)."""
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
        writer.tell(partial(initialise, if_missing=if_missing))


def _side_group(side: Side) -> typer.Typer:
    """Return the commands on one side of the scopes' own lists."""
    group = group_of(
        f"Networks that a scope {side}s by its own {side} list.",
        "Within a scope the longest prefix wins, and a block wins a tie: so an allow carves a hole into a wider block "
        "of the same scope, and of no other. For networks that several scopes share, see `list`.",
    )

    @group.command("add", help=f"{side.title()} networks in a scope.", epilog=EXIT_CODES)
    def add(
        *,
        networks: Networks,
        reason: Reason,
        scope: ScopeName = "global",
        expires: Expires = None,
        owner: Owner = None,
        replace: Replace = False,
        actor: Actor = None,
        change_id: ChangeId = None,
        wait: Wait = None,
        durable: Durable = False,
        yes: Yes = False,
        output: Output = OutputFormat.TABLE,
        redis_url: RedisUrl = None,
        config: Config = None,
    ) -> None:
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
            entries = writer.entries(networks, expires, owner)
            scope_name = writer.reader.read(parse_scope_name, scope) or ""
            writer.wish(AddToScope(side, scope_name, entries, replace))

    @group.command("remove", help=f"Take networks out of a scope's own {side} list.", epilog=EXIT_CODES)
    def remove(
        *,
        networks: Networks,
        reason: Reason,
        scope: ScopeName = "global",
        actor: Actor = None,
        change_id: ChangeId = None,
        wait: Wait = None,
        durable: Durable = False,
        output: Output = OutputFormat.TABLE,
        redis_url: RedisUrl = None,
        config: Config = None,
    ) -> None:
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
            parsed = inputs.networks(writer.reader, networks)
            scope_name = writer.reader.read(parse_scope_name, scope) or ""
            writer.wish(RemoveFromScope(side, scope_name, parsed))

    @group.command(
        "list", help=f"Show what scopes {side}: their own {side} lists and the lists they name.", epilog=EXIT_CODES
    )
    def show(
        *,
        scope: Annotated[str | None, typer.Option("--scope", help="Only this scope. Without: all.")] = None,
        output: Output = OutputFormat.TABLE,
        redis_url: RedisUrl = None,
        config: Config = None,
    ) -> None:
        with reading(output, redis_url, config) as session:
            reader = Reader()
            if scope is not None:
                reader.read(parse_scope_name, scope)
            reader.done()
            snapshot = session.ask(load)
            rows = [
                (name, list_name, entry)
                for name, list_name in _lists_of_scopes(snapshot, snapshot.tables, side)
                if scope in (None, name)
                for entry in _sorted_entries(snapshot, list_name)
            ]
            _print_entries(rows, snapshot, output, empty=f"No scope {side}s any network.")

    return group


app.add_typer(_side_group(Side.ALLOW), name="allow")
app.add_typer(_side_group(Side.BLOCK), name="block")


@list_app.command("add", epilog=EXIT_CODES)
def list_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    reason: Reason,
    networks: Annotated[list[str] | None, typer.Argument(metavar="CIDR", help="Networks to put into the list.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="What the list holds.")] = None,
    expires: Expires = None,
    owner: Owner = None,
    replace: Replace = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Create a named list, put networks into one, or both: `list add office 198.51.100.0/24`.

    --owner is of the networks if there are any, and else of the list.
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
        entries = writer.entries(networks or (), expires, owner)
        said = None if description is None else writer.reader.read(inputs.line("--description"), description)
        list_owner = owner.strip() if owner is not None and not networks else None
        if expires is not None and not networks:
            writer.reader.refuse("--expires is of networks, and none is given: a list itself does not end")
        writer.wish(AddToList(list_name, entries, said, list_owner, replace))


@list_app.command("remove", epilog=EXIT_CODES)
def list_remove(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    networks: Networks,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Take networks out of a named list; the list stays."""
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
        list_name = writer.reader.read(inputs.named("a list"), name) or ""
        writer.wish(RemoveFromList(list_name, inputs.networks(writer.reader, networks)))


@list_app.command("show", epilog=EXIT_CODES)
def list_show(
    *,
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Show the networks of one named list, or all named lists and who uses them."""
    with reading(output, redis_url, config) as session:
        if name is None:
            _print_lists(*session.ask(_load_lists), output)
            return
        only = {"lists", collection(RecordKey(RecordKind.ENTRY, "", name))}
        snapshot = session.ask(lambda store: load(store, only))
        if name not in snapshot.named_lists:
            raise NotFoundError([f"list {name} does not exist: `authzctl list show` names those that do"])
        rows = [("", name, entry) for entry in _sorted_entries(snapshot, name)]
        _print_entries(rows, snapshot, output, empty=f"List {name} is empty.")


@resource_app.command("add", epilog=EXIT_CODES)
def resource_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    reason: Reason,
    path: Annotated[
        list[str],
        typer.Option("--path", help="/docs is also /docs.json and all beneath; * is any one segment. Repeat."),
    ],
    host: Annotated[
        list[str] | None, typer.Option("--host", help="Only on this host, or *.example.com. Repeat. Without: any.")
    ] = None,
    restricted: Annotated[
        bool, typer.Option("--restricted", help="Only the addresses that its scope allows may in.")
    ] = False,
    allow_list: Annotated[
        list[str] | None, typer.Option("--allow-list", help="A named list whose networks may in. Repeat.")
    ] = None,
    replace: Replace = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register a part of the site; its scope is resource:NAME. --restricted closes it in the same change."""
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
        reader = writer.reader
        resource = Resource(
            reader.read(inputs.named("a resource"), name) or "",
            reader.read_all(parse_path_pattern, path),
            reader.read_all(inputs.host_pattern, host or ()),
        )
        lists = reader.read_all(inputs.named("a list"), allow_list or ())
        writer.wish(AddResource(resource, restricted, lists, replace))


@scope_app.command("set", epilog=EXIT_CODES)
def scope_set(
    *,
    scope: Annotated[str, typer.Argument(metavar="SCOPE", help="global, tenant:ID or resource:NAME.")],
    reason: Reason,
    mode: Annotated[
        Mode | None, typer.Option("--mode", help="open: who is not blocked may in; restricted: only who is allowed.")
    ] = None,
    enforcement: Annotated[
        Enforcement | None, typer.Option("--enforcement", help="shadow: only record what enforce would do.")
    ] = None,
    allow_list: Annotated[
        list[str] | None, typer.Option("--allow-list", help="Allow this named list. Repeat; those not given go.")
    ] = None,
    block_list: Annotated[
        list[str] | None, typer.Option("--block-list", help="Block this named list. Repeat; those not given go.")
    ] = None,
    no_allow_lists: Annotated[bool, typer.Option("--no-allow-lists", help="Allow no named list any more.")] = False,
    no_block_lists: Annotated[bool, typer.Option("--no-block-lists", help="Block no named list any more.")] = False,
    actor: Actor = None,
    change_id: ChangeId = None,
    wait: Wait = None,
    durable: Durable = False,
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Set what a scope does. What is not given stays as it is."""
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
        reader = writer.reader
        scope_name = reader.read(parse_scope_name, scope) or ""
        allowing = _given_lists(reader, "--allow-list", allow_list, no_allow_lists)
        blocking = _given_lists(reader, "--block-list", block_list, no_block_lists)
        if all(given is None for given in (mode, enforcement, allowing, blocking)):
            reader.refuse("nothing to set: give --mode, --enforcement, --allow-list or --block-list")
        writer.wish(SetScope(scope_name, mode, enforcement, allowing, blocking))


@app.command("explain", epilog=EXIT_CODES)
def explain_command(
    *,
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The client address.")],
    path: Annotated[str, typer.Option("--path", help="The path, with its query.")] = "/",
    host: Annotated[str, typer.Option("--host", help="The Host header.")] = "",
    method: Annotated[str, typer.Option("--method", help="The method.")] = "GET",
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Name this tenant, where the server looks for it first.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", help="A header that may name a tenant, as NAME=VALUE. Repeat.")
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", help="Decide as of then: 2h (from now) or 2026-12-31T00:00:00Z. Without: now.")
    ] = None,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Say what the server decides about a request, and why: with its own code and settings, from the policy as it is.

    The exit code is 0 for any answer, allowed or denied. Needs the server's settings (AUTHZ_* or --config), such as
    where requests name their tenant.
    """
    with reading(output, redis_url, config) as session:
        options = session.settings().decision_options()
        reader = Reader()
        now = time.time()
        moment = now if at is None else reader.read(lambda text: parse_moment(text, now), at)
        headers = [read for text in header or () if (read := reader.read(inputs.header, text))]
        reader.done()
        try:
            attributes = describe_request(
                address, method=method, host=host, path=path, headers=headers, tenant=tenant, options=options
            )
        except CannotDescribeError as error:
            raise BadInputError([str(error)]) from None
        snapshot = session.ask(lambda store: load_snapshot(store, options))
        print_explanation(explain(attributes, snapshot, now if moment is None else moment), output)


feed.register(list_app)
app.add_typer(list_app, name="list")
app.add_typer(tenant_app, name="tenant")
app.add_typer(instance_app, name="instance")
app.add_typer(affinity_app, name="affinity")
app.add_typer(resource_app, name="resource")
app.add_typer(scope_app, name="scope")
app.add_typer(replica_app, name="replica")
app.command("cleanup", epilog=EXIT_CODES)(cleanup)
app.add_typer(history_app, name="history")
incident.register(app)
doctor.register(app)


async def _load_lists(store: Store) -> tuple[Snapshot, dict[str, int]]:
    """Load the named lists and who uses them, and count the entries of every list."""
    counts = await store.record_counts()
    sizes = {name.removeprefix(ENTRIES): count for name, count in counts.items() if name.startswith(ENTRIES)}
    return await load(store, {"lists", "scopes"}), sizes


def _given_lists(reader: Reader, option: str, names: list[str] | None, none: bool) -> tuple[str, ...] | None:
    if none and names:
        reader.refuse(f"{option} and --no{option[1:]}s: give one of them")
    if none:
        return ()
    return reader.read_all(inputs.named("a list"), names) if names else None


def _lists_of_scopes(snapshot: Snapshot, lists: Iterable[str], side: Side) -> list[tuple[str, str]]:
    """Return (scope, list) for every list on one side, scopes by name, a scope's own list first."""
    own = {name.removesuffix(f"/{side}") for name in lists if name.endswith(f"/{side}")}
    names = sorted(own | snapshot.scopes.keys())
    return [(name, list_name) for name in names for list_name in (snapshot.scopes.get(name) or Scope(name)).lists[side]]


def _sorted_entries(snapshot: Snapshot, list_name: str) -> list[Entry]:
    return sorted(snapshot.entries.get(list_name, {}).values(), key=lambda entry: entry.network)


def _print_entries(rows: list[tuple[str, str, Entry]], snapshot: Snapshot, output: OutputFormat, *, empty: str) -> None:
    """Print entries as (scope or nothing, list, entry), and those that cannot be read."""
    now = time.time()
    shown = {list_name for _, list_name, _ in rows}
    unreadable = [
        (key, problem)
        for key, problem in snapshot.problems.items()
        if key.kind is RecordKind.ENTRY and key.list_name in shown
    ]
    if output is OutputFormat.JSON:
        entries: list[Json] = [
            {
                "scope": scope or None,
                "list": list_name,
                **(record_json(entry) or {}),
                "counts": entry.counts_at(now),
            }
            for scope, list_name, entry in rows
        ]
        print_json({**standing(snapshot), "entries": entries, "unreadable": [problem for _, problem in unreadable]})
        return
    print_table(
        ("WHERE", "NETWORK", "EXPIRES", "WHY"),
        [
            (_where(scope, list_name), str(entry.network), show_expiry(entry.expires_at, now), _why(entry))
            for scope, list_name, entry in rows
        ],
        empty=empty,
        wrapped=("EXPIRES", "WHY"),
    )
    print_concerns(problem for _, problem in unreadable)


def _where(scope: str, list_name: str) -> str:
    if not scope:
        return list_name
    return scope if list_name in (own_list(scope, side) for side in Side) else f"{scope} by {list_name}"


def _why(entry: Entry) -> str:
    day = show_moment(entry.created_at).partition("T")[0]
    owner = f", owner {entry.owner}" if entry.owner else ""
    return f"{entry.reason} ({entry.author}, {day}{owner})"


def _print_lists(snapshot: Snapshot, sizes: Mapping[str, int], output: OutputFormat) -> None:
    users: dict[str, list[str]] = {name: [] for name in sorted(snapshot.named_lists)}
    for side in Side:
        for scope, list_name in _lists_of_scopes(snapshot, sizes, side):
            if list_name in users:
                users[list_name].append(f"{scope} ({side}s)")
    if output is OutputFormat.JSON:
        lists: list[Json] = [
            {
                **(record_json(snapshot.named_lists[name]) or {}),
                "entries": sizes.get(name, 0),
                "used_by": used_by,
            }
            for name, used_by in users.items()
        ]
        print_json({**standing(snapshot), "lists": lists})
        return
    print_table(
        ("LIST", "NETWORKS", "USED BY", "OWNER", "DESCRIPTION"),
        [
            (
                name,
                str(sizes.get(name, 0)),
                ", ".join(used_by) or "nobody",
                snapshot.named_lists[name].owner,
                snapshot.named_lists[name].description,
            )
            for name, used_by in users.items()
        ],
        empty="There is no named list.",
        wrapped=("USED BY", "DESCRIPTION"),
    )


if __name__ == "__main__":
    app()
