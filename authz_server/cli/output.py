"""What `authzctl` prints: tables and sentences for people, JSON with stable keys for scripts."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from authz_server.cli.acknowledgement import Acknowledgement
from authz_server.cli.administration import Done
from authz_server.cli.changes import Effect, Step, counted
from authz_server.cli.failures import AuthzctlError, OutputLostError
from authz_server.cli.moves import Moved, OnProgress
from authz_server.cli.times import show_expiry, show_moment
from authz_server.explanation import Explanation
from authz_server.policy.access import Enforcement, Entry, ListMatch, NamedList, Resource, Scope, ScopeOutcome
from authz_server.policy.affinity import Hold, Instance, Tenant
from authz_server.policy.decision import Allowed
from authz_server.policy.reasons import Reason
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable
from authz_server.store.interface import Difference

Json = str | int | float | bool | None | Sequence["Json"] | Mapping[str, "Json"]

_UNWRAPPED_WIDTH = 10_000
"""Columns where nobody looks: output that goes to a file or a pipe is not to be cut."""

_NAMED = 5
"""Servers that a line names; more are counted."""

_WORD_KEPT = 24
"""Columns of a word that a narrow terminal does not break: a time fits."""

_STYLES = {
    Effect.ADDED: "green",
    Effect.REPLACED: "yellow",
    Effect.REMOVED: "red",
    Effect.UNCHANGED: "dim",
}


class OutputFormat(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


@contextmanager
def _printing(done: str = "") -> Iterator[None]:
    """Say that standard output takes nothing more (a full disk, a reader that left); `done` is what must not be lost.

    Raises:
        OutputLostError: it takes nothing more.
    """
    try:
        yield
    except OSError as error:
        # What is still in the buffer would fail once more when Python ends.
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - os.devnull is no path of ours
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        lost = f"the output could not be written: {error.strerror or error}"
        raise OutputLostError([f"{lost}. {done}" if done else lost]) from error


class _Console(Console):
    """A console that does not end the program when the reader of a pipe has left: `_printing` says it."""

    def on_broken_pipe(self) -> None:
        raise  # noqa: PLE0704 - called by rich while it handles the BrokenPipeError


def print_json(value: Json) -> None:
    """Print one JSON document to standard output (OutputLostError: it cannot be written)."""
    with _printing():
        _echo_json(value)


def _echo_json(value: Json) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@_printing()
def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str, wrapped: Sequence[str] = ()
) -> None:
    """Print rows for people, or the sentence `empty` when there are none; only `wrapped` columns wrap willingly.

    Raises:
        OutputLostError: they cannot be written.
    """
    console = _console()
    if not rows:
        console.print(plain(empty))
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        longest_word = max(len(word) for row in rows for word in (row[index] or column).split())
        table.add_column(
            column,
            overflow="fold",
            no_wrap=column not in wrapped,
            min_width=min(longest_word, _WORD_KEPT) if column in wrapped else None,
        )
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    console.print(table)


@_printing()
def print_lines(*lines: str) -> None:
    """Print sentences for people (OutputLostError: they cannot be written)."""
    console = _console()
    for line in lines:
        console.print(plain(line))


@contextmanager
def lines_printed() -> Iterator[TextIO]:
    """Give standard output for many lines (OutputLostError: they cannot be written)."""
    with _printing():
        stream = typer.get_text_stream("stdout")
        yield stream
        stream.flush()


def print_done(done: Done, output: OutputFormat) -> None:
    """Print what became of a wish (OutputLostError: it cannot be written; the error says what became of it)."""
    with _printing(_summary(done)):
        if output is OutputFormat.JSON:
            _echo_json(done_json(done))
        else:
            _print_done_for_people(done)


def _print_done_for_people(done: Done) -> None:
    console = _console()
    width = max((len(step.effect) for step in done.steps), default=0)
    for step in done.steps:
        line = Text.assemble((f"{step.effect:<{width}}", _STYLES[step.effect]), "  ", plain(_step_text(step, done)))
        console.print(line)
    for note in done.notes:
        console.print(Text.assemble(("note: ", "yellow"), plain(note)))
    console.print(plain(_summary(done)))
    _print_acknowledged(console, done.acknowledgement)


@contextmanager
def waiting_shown(output: OutputFormat) -> Iterator[Callable[[Acknowledgement], None]]:
    """Show on a terminal for whom a command waits, as long as it does."""
    console = _console(stderr=True)
    if output is not OutputFormat.TABLE or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("Waiting for the servers") as status:

        def show(told: Acknowledgement) -> None:
            names = ", ".join(lagging.replica for lagging in told.lagging[:_NAMED])
            more = f" and {len(told.lagging) - _NAMED} more" if len(told.lagging) > _NAMED else ""
            status.update(plain(f"Waiting for {names}{more}" if names else f"Waiting: {told.problem}"))

        yield show


@contextmanager
def progress_shown(output: OutputFormat) -> Iterator[OnProgress]:
    """Show how far a command is that takes several changes: a bar on a terminal, else a line for each change.

    What nobody can see any more (a terminal that was closed) stops nothing.
    """
    console = _console(stderr=True)
    if output is not OutputFormat.TABLE:
        yield lambda *_: None
        return
    if not console.is_terminal:

        def tell(done: int, total: int, what: str) -> None:
            if not what:
                with suppress(OSError):
                    console.print(plain(f"{done:,} of {total:,} done"))

        yield tell
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}", table_column=Column(ratio=1)),
    )
    progress = Progress(*columns, console=console, transient=True, expand=True)
    task = progress.add_task("", total=None)

    def show(done: int, total: int, what: str) -> None:
        with suppress(OSError):
            progress.start()  # not before: somebody may have been asked something
            progress.update(task, completed=done, total=total, description=escape(what))

    try:
        yield show
    finally:
        with suppress(OSError):
            progress.stop()


def print_notice(sentence: str, output: OutputFormat) -> None:
    """Print for people, to standard error, what they should know before the command goes on."""
    if output is OutputFormat.TABLE:
        _console(stderr=True).print(plain(sentence))


def print_moved(moved: Moved, output: OutputFormat) -> None:
    """Print what became of many wishes (OutputLostError: it cannot be written; the error says what became of them)."""
    summary = _moved_summary(moved)
    with _printing(summary):
        if output is OutputFormat.JSON:
            _echo_json(
                {
                    "action": moved.action,
                    "records": moved.records,
                    "changes": [
                        {"epoch": position.epoch, "revision": position.revision, "change_id": position.change_id}
                        for position in moved.changes
                    ],
                    "notes": list(moved.notes),
                    "servers": acknowledgement_json(moved.acknowledgement),
                }
            )
            return
        console = _console()
        for note in moved.notes:
            console.print(Text.assemble(("note: ", "yellow"), plain(note)))
        console.print(plain(summary))
        _print_acknowledged(console, moved.acknowledgement)


def _moved_summary(moved: Moved) -> str:
    if not moved.changes:
        return f"Nothing to do for {moved.action}: it is so already."
    first, last = moved.changes[0].revision, moved.changes[-1].revision
    where = f"revision {first}" if first == last else f"{len(moved.changes)} changes, revisions {first} to {last}"
    return f"Done: {moved.action} of {counted(moved.records, moved.noun)}, {where}."


def _print_acknowledged(console: Console, told: Acknowledgement | None) -> None:
    if told and told.complete:
        count = len(told.acknowledged)
        console.print("The only server decides by it." if count == 1 else f"All {count} servers decide by it.")


def _summary(done: Done) -> str:
    if done.difference and not done.changed:
        return f"Only looked: nothing was written for {done.action}."
    if not done.changed:
        return f"Nothing to do for {done.action}: it is so already (revision {done.position.revision})."
    if done.repeated:
        return f"{done.action} was applied before, as revision {done.position.revision}; nothing was written now."
    return f"Done: {done.action} is revision {done.position.revision}, change id {done.order.change_id}."


def done_json(done: Done) -> dict[str, Json]:
    """Return what became of a wish, for scripts."""
    return {
        "action": done.action,
        "changed": done.changed,
        "repeated": done.repeated,
        "epoch": done.position.epoch,
        "revision": done.position.revision,
        "change_id": done.order.change_id if done.changed else None,
        "actor": done.order.actor,
        "reason": done.order.reason,
        "records": [
            {
                **key_json(step.key),
                "effect": step.effect,
                "value": record_json(step.record),
                "previous": record_json(step.previous),
            }
            for step in done.steps
        ],
        "difference": difference_json(done.difference),
        "notes": list(done.notes),
        "servers": acknowledgement_json(done.acknowledgement),
    }


def difference_json(difference: Difference | None) -> dict[str, Json] | None:
    """Return how many records a change of any size writes."""
    if difference is None:
        return None
    return {
        "added": difference.added,
        "changed": difference.changed,
        "removed": difference.removed,
        "unchanged": difference.unchanged,
    }


def acknowledgement_json(told: Acknowledgement | None) -> dict[str, Json] | None:
    """Return which servers have a change; None when nobody waited for them."""
    if told is None:
        return None
    return {
        "complete": told.complete,
        "acknowledged": list(told.acknowledged),
        "lagging": [{"server": lagging.replica, "why": lagging.why} for lagging in told.lagging],
        "problem": told.problem or None,
    }


def print_failure(failure: AuthzctlError, output: OutputFormat, *, repeat: str | None = None) -> None:
    """Print what went wrong to standard error; `repeat` is the command that finds out whether a write was applied."""
    if output is OutputFormat.JSON:
        told: dict[str, Json] = {"error": failure.kind, "problems": list(failure.problems)}
        told |= {"hints": list(failure.hints), "repeat": repeat}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False), err=True)
        return
    console = _console(stderr=True)
    for problem in failure.problems:
        console.print(Text.assemble(("error: ", "bold red"), plain(problem)))
    for hint in failure.hints:
        console.print(Text.assemble(("hint: ", "yellow"), plain(hint)))
    if repeat:
        console.print(plain("Once the store answers, this command applies it, unless it was applied already:"))
        console.print(plain(f"  {repeat}"), soft_wrap=True)


def print_concerns(concerns: Iterable[str]) -> None:
    """Print to standard error what somebody must confirm."""
    console = _console(stderr=True)
    for concern in concerns:
        console.print(Text.assemble(("careful: ", "bold yellow"), plain(concern)))


@_printing()
def print_explanation(explanation: Explanation, output: OutputFormat) -> None:
    """Print a decision and what it came from (OutputLostError: it cannot be written)."""
    if output is OutputFormat.JSON:
        print_json(explanation_json(explanation))
        return
    console = _console()
    decision = explanation.decision
    allowed = isinstance(decision, Allowed)
    console.print(
        Text.assemble(("ALLOWED", "bold green") if allowed else ("DENIED", "bold red"), "  ", (decision.reason, "bold"))
    )
    attributes = explanation.attributes
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    host = f" on {attributes.host}" if attributes.host else ""
    for name, value in (
        ("client address", _address_text(explanation)),
        ("request", f"{attributes.method} {attributes.path}{host}"),
        ("tenant", _tenant_text(explanation)),
        ("instance", _instance_text(explanation)),
        ("policy", f"revision {explanation.snapshot.revision} of epoch {explanation.snapshot.epoch}"),
        ("at", show_moment(explanation.at)),
    ):
        facts.add_row(name, plain(value))
    console.print(facts)
    console.print(Text("scopes that apply" if explanation.scopes else "no scope was asked", "dim"))
    for outcome in explanation.scopes:
        for line in _scope_lines(outcome, explanation):
            console.print(line)
    for note in explanation.notes:
        console.print(Text.assemble(("note: ", "yellow"), plain(note)))


def explanation_json(explanation: Explanation) -> dict[str, Json]:
    """Return a decision and what it came from, for scripts."""
    decision = explanation.decision
    attributes = explanation.attributes
    tenant = explanation.registered
    return {
        "decision": "allowed" if isinstance(decision, Allowed) else "denied",
        "reason": decision.reason,
        "client_address": str(decision.client_address) if decision.client_address else None,
        "request": {
            "method": attributes.method,
            "host": attributes.host,
            "path": attributes.path,
            "external_address": attributes.external_address,
            "peer_address": attributes.peer_address,
            "headers": dict(attributes.headers),
        },
        "tenant": decision.tenant,
        "tenant_registered": tenant is not None,
        "tenant_pinned_to": tenant.instance if tenant else None,
        "tenant_held": tenant.held if tenant else False,
        "instance": decision.instance if isinstance(decision, Allowed) else None,
        "affinity": decision.affinity if isinstance(decision, Allowed) else None,
        "scopes": [
            {
                "scope": outcome.scope,
                "mode": _mode(outcome, explanation),
                "enforcement": outcome.enforcement,
                "reason": outcome.reason,
                "deciding": outcome is decision.deciding,
                "list": outcome.match.list_name if outcome.match else None,
                "entry": record_json(_entry(outcome.match, explanation)) if outcome.match else None,
            }
            for outcome in explanation.scopes
        ],
        "epoch": explanation.snapshot.epoch,
        "revision": explanation.snapshot.revision,
        "at": show_moment(explanation.at),
        "notes": list(explanation.notes),
    }


def key_json(key: RecordKey) -> dict[str, Json]:
    """Return what names a record."""
    return {"kind": key.kind, "name": key.name, "list": key.list_name or None}


def record_json(record: Record | Unreadable | None) -> dict[str, Json] | None:
    """Return a record with times as text; an unreadable one has the key `unreadable`."""
    match record:
        case None:
            return None
        case Unreadable(problem=problem):
            return {"unreadable": problem}
        case Entry():
            return {
                "network": str(record.network),
                "reason": record.reason,
                "author": record.author,
                "owner": record.owner,
                "created_at": show_moment(record.created_at),
                "expires_at": None if record.expires_at is None else show_moment(record.expires_at),
            }
        case NamedList():
            return {"name": record.name, "description": record.description, "owner": record.owner}
        case Scope():
            return {
                "name": record.name,
                "mode": record.mode,
                "enforcement": record.enforcement,
                "allow_lists": list(record.allow_lists),
                "block_lists": list(record.block_lists),
            }
        case Resource():
            return {
                "name": record.name,
                "paths": [pattern.text for pattern in record.paths],
                "hosts": list(record.hosts),
            }
        case Tenant():
            return {
                "id": record.id,
                "instance": record.instance,
                "held": record.held,
                "hold": hold_json(record.hold),
            }
        case Instance():
            return {"name": record.name, "weight": record.weight, "state": record.state}


def hold_json(hold: Hold | None) -> dict[str, Json] | None:
    """Return who holds a tenant."""
    if hold is None:
        return None
    return {"owner": hold.owner, "to": hold.to, "since": show_moment(hold.since), "reason": hold.reason}


def plain(text: str) -> Text:
    """Return text without markup, in which a control character that somebody stored cannot act on the terminal."""
    return Text("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text))


def _console(*, stderr: bool = False) -> Console:
    console = _Console(stderr=stderr, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED_WIDTH
    return console


def _step_text(step: Step, done: Done) -> str:
    where = f" in {step.key.list_name}" if step.key.list_name else ""
    kind = "" if step.key.kind is RecordKind.ENTRY else f"{step.key.kind} "
    what = f"{kind}{step.key.name}{where}"
    match step.record:
        case Entry() as entry:
            told = f"{what}, expires {show_expiry(entry.expires_at, done.order.now)}"
            if step.effect is Effect.UNCHANGED:
                told += f"; put there by {entry.author} at {show_moment(entry.created_at)}: {entry.reason}"
            return told
        case Tenant() as tenant:
            held = f", held for a move to {tenant.hold.to}" if tenant.hold else ", held" if tenant.held else ""
            return f"{what}, pinned to {tenant.instance}{held}{_was(step)}"
        case Instance() as instance:
            return f"{what}, weight {instance.weight}, {instance.state}{_was(step)}"
        case Resource() as resource:
            paths = ", ".join(pattern.text for pattern in resource.paths)
            return f"{what}, paths {paths} on {', '.join(resource.hosts) or 'any host'}"
        case Scope() as scope:
            lists = "".join(
                f", {side} lists {', '.join(names)}"
                for side, names in (("allow", scope.allow_lists), ("block", scope.block_lists))
                if names
            )
            return f"{what}, {scope.mode}, {scope.enforcement}{lists}{_was(step)}"
        case _:
            return what


def _was(step: Step) -> str:
    if step.effect is not Effect.REPLACED:
        return ""
    match step.previous:
        case Tenant(instance=instance):
            return f" (was {instance or 'not readable'})"
        case Instance(weight=weight, state=state):
            return f" (was weight {weight}, {state})"
        case Scope(mode=mode, enforcement=enforcement):
            return f" (was {mode}, {enforcement})"
        case _:
            return ""


def _address_text(explanation: Explanation) -> str:
    decision = explanation.decision
    if decision.client_address is not None:
        return str(decision.client_address)
    given = explanation.attributes.external_address
    if decision.reason in (Reason.BAD_REQUEST, Reason.REQUEST_TOO_LARGE):
        return f"not looked at: the request is refused before that ({given})"
    return f"none that can be read ({given})"


def _tenant_text(explanation: Explanation) -> str:
    decision = explanation.decision
    if decision.tenant is None:
        return "none"
    tenant = explanation.registered
    if tenant is None:
        return f"{decision.tenant} (not registered)"
    held = ", held" if tenant.held else ""
    return f"{decision.tenant} (pinned to {tenant.instance or 'an instance that cannot be read'}{held})"


def _instance_text(explanation: Explanation) -> str:
    decision = explanation.decision
    if isinstance(decision, Allowed) and decision.instance:
        return f"{decision.instance} ({decision.affinity})"
    return "none: the default route takes it" if isinstance(decision, Allowed) else "none: it is denied"


def _mode(outcome: ScopeOutcome, explanation: Explanation) -> str:
    return (explanation.snapshot.scopes.get(outcome.scope) or Scope(outcome.scope)).mode


def _entry(match: ListMatch, explanation: Explanation) -> Entry | Unreadable:
    snapshot = explanation.snapshot
    problem = snapshot.problems.get(RecordKey(RecordKind.ENTRY, str(match.network), match.list_name))
    return snapshot.entries[match.list_name][match.network] if problem is None else Unreadable(problem)


def _scope_lines(outcome: ScopeOutcome, explanation: Explanation) -> Iterable[Text | Padding]:
    decision = explanation.decision
    shadow = outcome.enforcement is Enforcement.SHADOW
    style = "yellow" if shadow else "red" if outcome.denies else "green"
    tail = "  <- decides" if outcome is decision.deciding else ""
    if shadow:
        tail = "  (recorded, not enforced)"
    yield Text.assemble(
        "  ",
        plain(outcome.scope),
        f" ({_mode(outcome, explanation)}, {outcome.enforcement}): ",
        (outcome.reason, style),
        tail,
    )
    if outcome.match is None:
        yield Text("    no entry of its lists holds the address", "dim")
        return
    entry = _entry(outcome.match, explanation)
    if isinstance(entry, Unreadable):
        problem = plain(f"{entry.problem}; its network blocks all the same")
        yield Padding(problem, (0, 0, 0, 4), expand=False)
        return
    owner = f", owner {entry.owner}" if entry.owner else ""
    yield Padding(
        plain(
            f"{entry.network} in {outcome.match.list_name}: {entry.reason} (by {entry.author} at "
            f"{show_moment(entry.created_at)}{owner}, expires {show_expiry(entry.expires_at, explanation.at)})"
        ),
        (0, 0, 0, 4),
        expand=False,
    )
