"""`authzctl`: the security team's command line. Every write names who and why, and is one change in the history."""

import asyncio
import re
import shlex
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from authz_server.cli import inputs
from authz_server.cli.administration import Done, Order, carry_out, first_look, initialise, load_snapshot
from authz_server.cli.changes import (
    AddInstance,
    AddResource,
    AddToList,
    AddToScope,
    MoveTenant,
    PinTenant,
    RemoveFromList,
    RemoveFromScope,
    SetScope,
    Wish,
    place_tenant,
)
from authz_server.cli.explanation import describe_request, explain
from authz_server.cli.failures import (
    EXIT_CODES,
    AuthzctlError,
    BadInputError,
    ConfirmationNeededError,
    NoPolicyError,
    NoStoreError,
    NotFoundError,
    RefusedError,
    StoreNotUsableError,
    UnknownOutcomeError,
)
from authz_server.cli.inputs import Reader
from authz_server.cli.output import (
    Json,
    OutputFormat,
    print_concerns,
    print_done,
    print_explanation,
    print_failure,
    print_json,
    print_table,
    record_json,
)
from authz_server.cli.times import parse_moment, show_expiry, show_moment
from authz_server.policy.access import Enforcement, Entry, EntryTable, Mode, Resource, Scope, Side, own_list
from authz_server.policy.affinity import MAX_WEIGHT, rendezvous
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import RecordKind
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.settings import HIDDEN, Settings, SettingsError, load_settings
from authz_server.store.interface import (
    AlreadyInitialisedError,
    NotInitialisedError,
    Store,
    StoreError,
    StoreUnavailableError,
)
from authz_server.store.keys import parse_scope_name
from authz_server.store.redis_store import RedisStore

T = TypeVar("T")

_NAME = "authzctl"
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")
"""The password of a URL, wherever it stands in a word of the command line."""


def _group(short_help: str, more: str = "") -> typer.Typer:
    return typer.Typer(
        help=f"{short_help} {more}".rstrip(), short_help=short_help, no_args_is_help=True, epilog=EXIT_CODES
    )


app = typer.Typer(
    name=_NAME,
    help="Administer the policy that authz-server decides by: who may in, and which instance holds which tenant.\n\n"
    "A write needs --reason. Sent again with the same --change-id, it is applied once.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its frames would print the store's URL, which may hold a password
)
list_app = _group(
    "Named lists, such as `office`, that several scopes can share.",
    "A list allows or blocks nothing by itself: that is up to the scopes that name it (`scope set`, `resource add`). "
    "Its networks are edited here; `allow` and `block` edit the scopes' own lists.",
)
tenant_app = _group("Tenants: each registered one is pinned to an instance.")
instance_app = _group("Instances that tenants can be pinned to.")
affinity_app = _group("Which instance holds which tenant's state.")
resource_app = _group("Parts of the site that have rules of their own, such as the API documentation.")
scope_app = _group("What a scope does with addresses: global, tenant:ID or resource:NAME.")

Networks = Annotated[
    list[str], typer.Argument(metavar="CIDR", help="Networks such as 203.0.113.0/24, or single addresses.")
]
ScopeName = Annotated[str, typer.Option("--scope", help="global, tenant:ID or resource:NAME.")]
Expires = Annotated[
    str | None,
    typer.Option("--expires", help="When the entries end: 30m, 2h, 7d, or 2026-12-31T00:00:00Z. Without: never."),
]
Owner = Annotated[str | None, typer.Option("--owner", help="Whom to ask later whether it is still needed.")]
Replace = Annotated[bool, typer.Option("--replace", help="Write anew what is there already with other values.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is kept in the history.")]
Actor = Annotated[
    str | None, typer.Option("--actor", envvar="AUTHZCTL_ACTOR", help="Who. Without: the operating system's user.")
]
ChangeId = Annotated[
    str | None,
    typer.Option("--change-id", help="Chosen by a script that may have to send this again. Without: a random one."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Confirm what is dangerous, instead of being asked.")]
Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="How to print.")]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", help="The store, as in AUTHZ_REDIS_URL (there, a password is not seen by others)."),
]
Config = Annotated[Path | None, typer.Option("--config", help="The server's settings file, as in AUTHZ_CONFIG.")]
TenantId = Annotated[str, typer.Argument(metavar="TENANT")]
InstanceName = Annotated[str, typer.Argument(metavar="INSTANCE")]


@dataclass(frozen=True, slots=True)
class _Session:
    """How a command was called: where the store is, how to print."""

    output: OutputFormat
    redis_url: str | None
    config: Path | None

    def settings(self) -> Settings:
        """Return the server's settings, with the store's URL of the command line in them."""
        try:
            settings = load_settings(self.config)
        except SettingsError as error:
            raise BadInputError(error.problems) from error
        if self.redis_url is not None:
            settings = settings.model_copy(update={"redis_url": SecretStr(self.redis_url)})
        return settings

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """Open the store for one command, and turn what it complains about into failures."""
        settings = self.settings()
        try:
            # A password on the command line goes with its URL, whatever the settings say.
            has_password = self.redis_url is not None and urlsplit(self.redis_url).password is not None
            url = self.redis_url if self.redis_url and has_password else settings.store_url()
            store = RedisStore(url, prefix=settings.redis_prefix, client_name=_NAME)
        except ValueError as error:
            raise BadInputError([f"--redis-url: {error}"]) from error
        try:
            yield store
        except NotInitialisedError as error:
            raise NoPolicyError([str(error)]) from error
        except AlreadyInitialisedError as error:
            raise RefusedError([str(error)]) from error
        except StoreUnavailableError as error:
            raise NoStoreError([str(error)]) from error
        except StoreError as error:
            raise StoreNotUsableError([str(error)]) from error
        finally:
            await store.close()

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Print a failure and leave with its exit code."""
        try:
            yield
        except UnknownOutcomeError as failure:
            print_failure(failure, self.output, repeat=_command_again(failure.change_id))
            raise typer.Exit(failure.exit_code) from failure
        except AuthzctlError as failure:
            print_failure(failure, self.output)
            raise typer.Exit(failure.exit_code) from failure

    def ask(self, question: Callable[[Store], Awaitable[T]]) -> T:
        """Answer a question from the store."""

        async def answer() -> T:
            async with self.store() as store:
                await first_look(store)
                return await question(store)

        return asyncio.run(answer())


@dataclass(frozen=True, slots=True)
class _Writer:
    """How a writing command was called: who, why, and how sure."""

    session: _Session
    reader: Reader
    actor: str
    reason: str
    change_id: str
    resent: bool
    yes: bool
    now: float

    def entries(self, texts: Iterable[str], expires: str | None, owner: str | None) -> tuple[Entry, ...]:
        """Read networks and what is said of them into entries."""
        expires_at = inputs.expiry(self.reader, expires, self.now)
        owner = self.reader.read(inputs.line("--owner"), owner or "") or ""
        return tuple(
            Entry(network, self.reason, self.actor, int(self.now), owner, expires_at)
            for network in inputs.networks(self.reader, texts)
        )

    def wish(self, wish: Wish) -> None:
        """Carry out a wish and print what became of it."""

        async def given(_: Store) -> Wish:
            return wish

        self.prepare(given)

    def prepare(self, prepare: Callable[[Store], Awaitable[Wish]]) -> None:
        """Carry out a wish that the store must be asked for, and print what became of it."""
        self.tell(lambda store, order: carry_out(store, order, prepare, self._confirm))

    def tell(self, act: Callable[[Store, Order], Awaitable[Done]]) -> None:
        """Act on the store, once the input is known to be good, and print what became of it."""
        self.reader.done()
        order = Order(self.actor, self.reason, self.change_id, self.resent, self.now)
        print_done(self.session.ask(lambda store: act(store, order)), self.session.output)

    def _confirm(self, concerns: tuple[str, ...]) -> None:
        if self.yes:
            return
        if self.session.output is OutputFormat.TABLE and sys.stdin.isatty() and sys.stderr.isatty():
            print_concerns(concerns)
            if typer.confirm("Is that meant?", err=True):
                return
            raise ConfirmationNeededError(["not confirmed: nothing was changed"])
        raise ConfirmationNeededError([*concerns, "nothing was changed: --yes confirms that this is meant"])


@contextmanager
def _reading(output: OutputFormat, redis_url: str | None, config: Path | None) -> Iterator[_Session]:
    session = _Session(output, redis_url, config)
    with session.failures_told():
        yield session


@contextmanager
def _writing(
    *,
    reason: str,
    actor: str | None,
    change_id: str | None,
    yes: bool,
    output: OutputFormat,
    redis_url: str | None,
    config: Path | None,
) -> Iterator[_Writer]:
    with _reading(output, redis_url, config) as session:
        reader = Reader()
        given_id = reader.read(inputs.change_id, change_id) if change_id is not None else None
        yield _Writer(
            session,
            reader,
            actor=reader.read(inputs.line("--actor", required=True), actor or inputs.operating_system_user()) or "",
            reason=reader.read(inputs.line("--reason", required=True), reason) or "",
            change_id=given_id or str(uuid.uuid4()),
            resent=change_id is not None,
            yes=yes,
            now=time.time(),
        )


def _command_again(change_id: str) -> str:
    """Return the command line that sends the same change once more; a password in it is hidden."""
    arguments = [_PASSWORD.sub(rf"\1{HIDDEN}@", word) for word in sys.argv[1:]]
    if not any(word.startswith("--change-id") for word in arguments):
        arguments.insert(arguments.index("--") if "--" in arguments else len(arguments), f"--change-id={change_id}")
    return shlex.join([_NAME, *arguments])


@app.command("init", epilog=EXIT_CODES)
def init(
    *,
    reason: Reason,
    actor: Actor = None,
    change_id: ChangeId = None,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Create an empty policy; one that is there already is left as it is (exit code 1)."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=False, output=output, redis_url=redis_url, config=config
    ) as writer:
        writer.tell(initialise)


def _side_group(side: Side) -> typer.Typer:
    """Return the commands on one side of the scopes' own lists."""
    group = _group(
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
        yes: Yes = False,
        output: Output = OutputFormat.TABLE,
        redis_url: RedisUrl = None,
        config: Config = None,
    ) -> None:
        with _writing(
            reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
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
        output: Output = OutputFormat.TABLE,
        redis_url: RedisUrl = None,
        config: Config = None,
    ) -> None:
        with _writing(
            reason=reason,
            actor=actor,
            change_id=change_id,
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
        with _reading(output, redis_url, config) as session:
            reader = Reader()
            if scope is not None:
                reader.read(parse_scope_name, scope)
            reader.done()
            snapshot = session.ask(_load)
            rows = [
                (name, list_name, entry)
                for name, list_name in _lists_of_scopes(snapshot, side)
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
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Create a named list, put networks into one, or both: `list add office 198.51.100.0/24`.

    --owner is of the networks if there are any, and else of the list.
    """
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
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
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Take networks out of a named list; the list stays."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=False, output=output, redis_url=redis_url, config=config
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
    with _reading(output, redis_url, config) as session:
        snapshot = session.ask(_load)
        if name is None:
            _print_lists(snapshot, output)
            return
        if name not in snapshot.named_lists:
            raise NotFoundError([f"list {name} does not exist: `authzctl list show` names those that do"])
        rows = [("", name, entry) for entry in _sorted_entries(snapshot, name)]
        _print_entries(rows, snapshot, output, empty=f"List {name} is empty.")


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
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register a tenant and pin it to an instance."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
    ) as writer:
        tenant_id = writer.reader.read(inputs.named("a tenant"), tenant) or ""
        if instance is not None:
            name = writer.reader.read(inputs.named("an instance"), instance)
            writer.wish(PinTenant("tenant.add", tenant_id, name))
            return

        async def placed(store: Store) -> Wish:
            snapshot = await _load(store)
            return place_tenant(tenant_id, snapshot.tenants, snapshot.instances.values())

        writer.prepare(placed)


@tenant_app.command("list", epilog=EXIT_CODES)
def tenant_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all registered tenants and where they are pinned."""
    with _reading(output, redis_url, config) as session:
        snapshot = session.ask(_load)
        tenants = [snapshot.tenants[name] for name in sorted(snapshot.tenants)]
        if output is OutputFormat.JSON:
            print_json({**_standing(snapshot), "tenants": [record_json(tenant) for tenant in tenants]})
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
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register an instance; it is active at once. With --replace, give one that is there another weight."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=False, output=output, redis_url=redis_url, config=config
    ) as writer:
        instance_name = writer.reader.read(inputs.named("an instance"), name) or ""
        writer.wish(AddInstance(instance_name, weight, replace))


@instance_app.command("list", epilog=EXIT_CODES)
def instance_list(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Show all instances and how many tenants are pinned to each."""
    with _reading(output, redis_url, config) as session:
        snapshot = session.ask(_load)
        pinned = dict.fromkeys(sorted(snapshot.instances), 0)
        for tenant in snapshot.tenants.values():
            if tenant.instance in pinned:
                pinned[tenant.instance] += 1
        if output is OutputFormat.JSON:
            instances: list[Json] = [
                {**(record_json(snapshot.instances[name]) or {}), "tenants": count} for name, count in pinned.items()
            ]
            print_json({**_standing(snapshot), "instances": instances})
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
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Pin a tenant to an instance, and so register it. One that is pinned elsewhere is refused: see `affinity move`."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
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
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Move a registered tenant to another instance, at once.

    Its requests are not held back: for a moment, replicas that have not heard of the move still use the old instance.
    """
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
    ) as writer:
        tenant_id = writer.reader.read(inputs.named("a tenant"), tenant) or ""
        name = writer.reader.read(inputs.named("an instance"), instance) or ""
        writer.wish(MoveTenant(tenant_id, name))


@affinity_app.command("show", epilog=EXIT_CODES)
def affinity_show(
    *, tenant: TenantId, output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None
) -> None:
    """Show where a tenant is pinned, and where the rendezvous hash would put it (also if it is not registered)."""
    with _reading(output, redis_url, config) as session:
        reader = Reader()
        reader.read(inputs.named("a tenant"), tenant)
        reader.done()
        snapshot = session.ask(_load)
        record = snapshot.tenants.get(tenant)
        hashed = rendezvous(tenant, snapshot.instances.values())
        instance = snapshot.instances.get(record.instance or "") if record else None
        if output is OutputFormat.JSON:
            print_json(
                {
                    **_standing(snapshot),
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


@resource_app.command("add", epilog=EXIT_CODES)
def resource_add(
    *,
    name: Annotated[str, typer.Argument(metavar="NAME")],
    reason: Reason,
    path: Annotated[list[str], typer.Option("--path", help="A path and all beneath it; * is any one segment. Repeat.")],
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
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Register a part of the site; its scope is resource:NAME. --restricted closes it in the same change."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=False, output=output, redis_url=redis_url, config=config
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
    yes: Yes = False,
    output: Output = OutputFormat.TABLE,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Set what a scope does. What is not given stays as it is."""
    with _writing(
        reason=reason, actor=actor, change_id=change_id, yes=yes, output=output, redis_url=redis_url, config=config
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
    with _reading(output, redis_url, config) as session:
        options = session.settings().decision_options()
        reader = Reader()
        now = time.time()
        moment = now if at is None else reader.read(lambda text: parse_moment(text, now), at)
        headers = [read for text in header or () if (read := reader.read(inputs.header, text))]
        reader.done()
        attributes = describe_request(
            address, method=method, host=host, path=path, headers=headers, tenant=tenant, options=options
        )
        snapshot = session.ask(lambda store: load_snapshot(store, options))
        print_explanation(explain(attributes, snapshot, now if moment is None else moment), output)


app.add_typer(list_app, name="list")
app.add_typer(tenant_app, name="tenant")
app.add_typer(instance_app, name="instance")
app.add_typer(affinity_app, name="affinity")
app.add_typer(resource_app, name="resource")
app.add_typer(scope_app, name="scope")


async def _load(store: Store) -> Snapshot:
    """Load the policy for commands that do not decide."""
    return await load_snapshot(store, DecisionOptions())


def _given_lists(reader: Reader, option: str, names: list[str] | None, none: bool) -> tuple[str, ...] | None:
    if none and names:
        reader.refuse(f"{option} and --no{option[1:]}s: give one of them")
    if none:
        return ()
    return reader.read_all(inputs.named("a list"), names) if names else None


def _lists_of_scopes(snapshot: Snapshot, side: Side) -> list[tuple[str, str]]:
    """Return (scope, list) for every list on one side, scopes by name, a scope's own list first."""
    own = {name.removesuffix(f"/{side}") for name in snapshot.tables if name.endswith(f"/{side}")}
    names = sorted(own | snapshot.scopes.keys())
    return [(name, list_name) for name in names for list_name in snapshot.scopes.get(name, Scope(name)).lists[side]]


def _sorted_entries(snapshot: Snapshot, list_name: str) -> list[Entry]:
    return sorted(snapshot.tables.get(list_name, EntryTable()).values(), key=lambda entry: entry.network)


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
        print_json({**_standing(snapshot), "entries": entries, "unreadable": [problem for _, problem in unreadable]})
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


def _print_lists(snapshot: Snapshot, output: OutputFormat) -> None:
    users: dict[str, list[str]] = {name: [] for name in sorted(snapshot.named_lists)}
    for side in Side:
        for scope, list_name in _lists_of_scopes(snapshot, side):
            if list_name in users:
                users[list_name].append(f"{scope} ({side}s)")
    if output is OutputFormat.JSON:
        lists: list[Json] = [
            {
                **(record_json(snapshot.named_lists[name]) or {}),
                "entries": len(snapshot.tables.get(name, EntryTable())),
                "used_by": used_by,
            }
            for name, used_by in users.items()
        ]
        print_json({**_standing(snapshot), "lists": lists})
        return
    print_table(
        ("LIST", "NETWORKS", "USED BY", "OWNER", "DESCRIPTION"),
        [
            (
                name,
                str(len(snapshot.tables.get(name, EntryTable()))),
                ", ".join(used_by) or "nobody",
                snapshot.named_lists[name].owner,
                snapshot.named_lists[name].description,
            )
            for name, used_by in users.items()
        ],
        empty="There is no named list.",
        wrapped=("USED BY", "DESCRIPTION"),
    )


def _standing(snapshot: Snapshot) -> dict[str, Json]:
    return {"epoch": snapshot.epoch, "revision": snapshot.revision}


if __name__ == "__main__":
    app()
