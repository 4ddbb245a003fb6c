"""How every command of `authzctl` is called: the options that all share, the store it opens, how failures end it."""

import asyncio
import re
import shlex
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import typer
from pydantic import SecretStr

from authz_server.cli import inputs
from authz_server.cli.acknowledgement import Acknowledgement, wait_for_servers
from authz_server.cli.administration import WRITE_SECONDS, Done, Order, carry_out, first_look, load_snapshot
from authz_server.cli.changes import Wish
from authz_server.cli.failures import (
    EXIT_CODES,
    AuthzctlError,
    BadInputError,
    ChangeLostError,
    ConfirmationNeededError,
    InterruptedQuestionError,
    InterruptedWaitError,
    NoPolicyError,
    NoStoreError,
    NotAcknowledgedError,
    NotDurableFailure,
    RefusedError,
    StoreNotUsableError,
    UnknownOutcomeError,
)
from authz_server.cli.inputs import Reader
from authz_server.cli.moves import Moved, OnProgress
from authz_server.cli.output import (
    Json,
    OutputFormat,
    print_concerns,
    print_done,
    print_failure,
    print_moved,
    progress_shown,
    waiting_shown,
)
from authz_server.policy.access import Entry
from authz_server.policy.addresses import Network
from authz_server.policy.snapshot import DecisionOptions, Snapshot
from authz_server.settings import HIDDEN, Settings, SettingsError, load_settings
from authz_server.store.interface import (
    AlreadyInitialisedError,
    DurabilityError,
    NotDurableError,
    NotInitialisedError,
    Position,
    Store,
    StoreError,
    StoreUnavailableError,
    WriteResult,
)
from authz_server.store.redis_store import RedisStore

T = TypeVar("T")

NAME = "authzctl"
_DAY_SECONDS = 24 * 60 * 60
_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@\s]*@")
"""The password of a URL, wherever it stands in a word of the command line."""


def group_of(short_help: str, more: str = "") -> typer.Typer:
    """Return a group of commands whose help ends with the exit codes."""
    return typer.Typer(
        help=f"{short_help} {more}".rstrip(), short_help=short_help, no_args_is_help=True, epilog=EXIT_CODES
    )


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
Wait = Annotated[
    float | None,
    typer.Option(
        "--wait",
        metavar="SECONDS",
        min=0,
        help="Then wait so long, at most, until every server decides by it; exit code 4 if one may not.",
    ),
]
Durable = Annotated[
    bool,
    typer.Option(
        "--durable",
        help="Then wait until the store's append-only file and its replicas have it; refused where neither is.",
    ),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Confirm what is dangerous, instead of being asked.")]
Output = Annotated[OutputFormat, typer.Option("--output", "-o", help="How to print.")]
RedisUrl = Annotated[
    str | None,
    typer.Option("--redis-url", help="The store, as in AUTHZ_REDIS_URL (there, a password is not seen by others)."),
]
Config = Annotated[Path | None, typer.Option("--config", help="The server's settings file, as in AUTHZ_CONFIG.")]


@dataclass(frozen=True, slots=True)
class Session:
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
            update = {"redis_url": SecretStr(self.redis_url), "redis_sentinels": (), "redis_cluster": ()}
            settings = settings.model_copy(update=update)
        return settings

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        """Open the store for one command, and turn what it complains about into failures."""
        settings = self.settings()
        try:
            # A password on the command line goes with its URL, whatever the settings say.
            has_password = self.redis_url is not None and urlsplit(self.redis_url).password is not None
            url = self.redis_url if has_password else None
            address = settings.url_address(url) if url else settings.store_address()
            store = RedisStore(
                address,
                prefix=settings.redis_prefix,
                client_name=NAME,
                max_events=settings.history_events,
                keep_seconds=settings.history_days * _DAY_SECONDS,
            )
        except ValueError as error:
            raise BadInputError([f"--redis-url: {error}"]) from error
        try:
            yield store
        except NotInitialisedError as error:
            raise NoPolicyError([str(error)]) from error
        except AlreadyInitialisedError as error:
            raise RefusedError([str(error)]) from error
        except DurabilityError as error:
            raise RefusedError([str(error)]) from error
        except NotDurableError as error:
            raise NotDurableFailure([str(error)]) from error
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

        with _ended_as_by_ctrl_c():
            return asyncio.run(answer())


@dataclass(frozen=True, slots=True)
class Writer:
    """How a writing command was called: who, why, and how sure."""

    session: Session
    reader: Reader
    actor: str
    reason: str
    change_id: str
    resent: bool
    wait: float | None
    durable: bool
    yes: bool
    now: float

    def entries(self, texts: Iterable[str], expires: str | None, owner: str | None) -> tuple[Entry, ...]:
        """Read networks and what is said of them into entries."""
        return self.entries_of(inputs.networks(self.reader, texts), expires, owner)

    def entries_of(self, networks: Iterable[Network], expires: str | None, owner: str | None) -> tuple[Entry, ...]:
        """Read what is said of networks, and make entries of them."""
        expires_at = inputs.expiry(self.reader, expires, self.now)
        owner = self.reader.read(inputs.line("--owner"), owner or "") or ""
        return tuple(Entry(network, self.reason, self.actor, int(self.now), owner, expires_at) for network in networks)

    def wish(self, wish: Wish) -> None:
        """Carry out a wish and print what became of it."""

        async def given(_: Store) -> Wish:
            return wish

        self.prepare(given)

    def prepare(self, prepare: Callable[[Store], Awaitable[Wish]]) -> None:
        """Carry out a wish that the store must be asked for, and print what became of it."""
        self.tell(lambda store, order: carry_out(store, order, prepare, self.confirm))

    def tell(self, act: Callable[[Store, Order], Awaitable[Done]]) -> None:
        """Act on the store, once the input is known to be good, and print what became of it."""
        self.reader.done()
        done = self.session.ask(lambda store: self._act(store, act, self.order))
        print_done(done, self.session.output)
        if done.acknowledgement and not done.acknowledgement.complete:
            raise _not_acknowledged(done.position, done.acknowledgement)

    async def _act(self, store: Store, act: Callable[[Store, Order], Awaitable[Done]], order: Order) -> Done:
        durability = await store.durability() if self.durable else None
        done = await act(store, order)
        if durability and done.changed:
            result = WriteResult(done.position, done.repeated)
            await store.make_durable(result, durability, seconds=WRITE_SECONDS)
            done = replace(done, notes=(*done.notes, f"durable: in {durability}"))
        if self.wait is None:
            return done
        with waiting_shown(self.session.output) as show:
            told = await wait_for_servers(store, done.position, seconds=self.wait, on_progress=show)
        return replace(done, acknowledgement=told)

    def tell_many(self, act: Callable[[Store, OnProgress], Awaitable[Moved]]) -> None:
        """As `tell`, for what takes several changes: show how far it is, and print what became of it."""
        if self.resent:
            self.reader.refuse("--change-id names one change, and this may take several; sent again, it does the rest")
        self.reader.done()

        async def acting(store: Store) -> Moved:
            durability = await store.durability() if self.durable else None
            with progress_shown(self.session.output) as show:
                moved = await act(store, show)
            if durability and moved.changes:
                result = WriteResult(moved.changes[-1], repeated=False)
                await store.make_durable(result, durability, seconds=WRITE_SECONDS)
            if self.wait is None or not moved.changes:
                return moved
            with waiting_shown(self.session.output) as show_waiting:
                told = await wait_for_servers(store, moved.changes[-1], seconds=self.wait, on_progress=show_waiting)
            return replace(moved, acknowledgement=told)

        moved = self.session.ask(acting)
        print_moved(moved, self.session.output)
        if moved.acknowledgement and not moved.acknowledgement.complete:
            raise _not_acknowledged(moved.changes[-1], moved.acknowledgement)

    @property
    def order(self) -> Order:
        """Who wants what is asked for, and why."""
        return Order(self.actor, self.reason, self.change_id, self.resent, self.now)

    def confirm(self, concerns: tuple[str, ...]) -> None:
        """Let somebody confirm what is dangerous (ConfirmationNeededError: nobody does)."""
        if self.yes:
            return
        if self.session.output is OutputFormat.TABLE and sys.stdin.isatty() and sys.stderr.isatty():
            print_concerns(concerns)
            if _answered_yes("Is that meant?"):
                return
            raise ConfirmationNeededError(["not confirmed: nothing was changed"])
        raise ConfirmationNeededError([*concerns, "nothing was changed: --yes confirms that this is meant"])


def _answered_yes(question: str) -> bool:
    """Ask on the terminal. Ctrl-C ends the question: left to asyncio, it would only be noted until the answer."""
    noting = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return typer.confirm(question, err=True)
    except typer.Abort as error:
        raise InterruptedQuestionError(["interrupted: nothing was changed"]) from error
    finally:
        signal.signal(signal.SIGINT, noting)


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Let a command that is told to end (SIGTERM), or loses its terminal (SIGHUP), tidy up as after Ctrl-C.

    Else a strict move would leave its tenants held, and their requests denied.
    """

    def interrupt(_: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell's job in the background ignores Ctrl-C
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


async def load(store: Store, only: Collection[str] | None = None) -> Snapshot:
    """Load the policy, or some collections of it, for commands that do not decide."""
    return await load_snapshot(store, DecisionOptions(), only)


def standing(snapshot: Snapshot) -> dict[str, Json]:
    """Return what the JSON of every answer says of the policy that it comes from."""
    return {"epoch": snapshot.epoch, "revision": snapshot.revision}


@contextmanager
def reading(output: OutputFormat, redis_url: str | None, config: Path | None) -> Iterator[Session]:
    """Run a command that only reads; a failure in the block is printed and ends it with its exit code."""
    session = Session(output, redis_url, config)
    with session.failures_told():
        yield session


@contextmanager
def writing(
    *,
    reason: str,
    actor: str | None,
    change_id: str | None,
    wait: float | None,
    durable: bool,
    yes: bool,
    output: OutputFormat,
    redis_url: str | None,
    config: Path | None,
) -> Iterator[Writer]:
    """Run a command that writes; as `reading`."""
    with reading(output, redis_url, config) as session:
        reader = Reader()
        given_id = reader.read(inputs.change_id, change_id) if change_id is not None else None
        yield Writer(
            session,
            reader,
            actor=reader.read(inputs.line("--actor", required=True), actor or inputs.operating_system_user()) or "",
            reason=reader.read(inputs.line("--reason", required=True), reason) or "",
            change_id=given_id or str(uuid.uuid4()),
            resent=change_id is not None,
            wait=wait,
            durable=durable,
            yes=yes,
            now=time.time(),
        )


def _not_acknowledged(position: Position, told: Acknowledgement) -> AuthzctlError:
    what = f"revision {position.revision}"
    if told.lost:
        return ChangeLostError([f"{what} was written and is lost since: {told.problem}. Look, and send it again"])
    problems = [f"{what} is written, and it is not known which servers have it: {told.problem}"] if told.problem else []
    problems += [f"{lagging.replica} does not have {what}: {lagging.why}" for lagging in told.lagging]
    hints = [
        "`authzctl replica list` shows all servers; `authzctl replica forget NAME` is for one that is gone for good"
    ]
    if told.interrupted:
        return InterruptedWaitError(
            problems or [f"{what} is written; interrupted while waiting for the servers"], hints
        )
    return NotAcknowledgedError(problems, hints)


def _command_again(change_id: str) -> str:
    """Return the command line that sends the same change once more; a password in it is hidden."""
    arguments = [_PASSWORD.sub(rf"\1{HIDDEN}@", word) for word in sys.argv[1:]]
    if not any(word.startswith("--change-id") for word in arguments):
        arguments.insert(arguments.index("--") if "--" in arguments else len(arguments), f"--change-id={change_id}")
    return shlex.join([NAME, *arguments])
