"""`make demo`: play the tour, say how it went, and stay up on a terminal."""

import shlex
import signal
import sys
import threading
import time
from types import FrameType

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from authz_server.demo.processes import ChildFailedError
from authz_server.demo.stage import Stage
from authz_server.demo.tour import NIGHT_SCRAPER, OFFICE, POLICY, VISITOR, Act, acts

_PLAIN_WIDTH = 120
"""Columns when the output is not a terminal, such as a CI log."""


def main() -> int:
    """Return 0 when every row came out as it must, else 1."""
    # Like Ctrl-C: unwinds the `with` blocks, which stop what was started.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    began = time.monotonic()
    try:
        with Stage() as stage:
            console.print(
                "[bold]The main job on one machine[/]: Valkey, Envoy, three instances and the server are up.\n"
            )
            console.print("The policy, as the security team types it:")
            for command in POLICY:
                console.print(f"  authzctl {command}", style="dim", soft_wrap=True)
                stage.run(command)
            stage.wait_ready()
            rows = wrong = 0
            for act in acts(stage):
                _print_act(act, console)
                rows += len(act.rows)
                wrong += sum(not row.ok for row in act.rows)
            seconds = time.monotonic() - began
            if wrong:
                console.print(f"\n[bold red]{wrong} of {rows} rows did not come out as they must[/] ({seconds:.0f} s)")
            else:
                console.print(f"\n[bold green]All {rows} rows came out as they must[/] ({seconds:.0f} s)")
            if sys.stdin.isatty() and sys.stdout.isatty():
                _stay(stage, console)
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
        return 130
    except (ChildFailedError, RuntimeError) as error:
        console.print(f"\nThe tour broke off: {error}", style="red", markup=False)
        return 1
    return 1 if wrong else 0


def _print_act(act: Act, console: Console) -> None:
    console.print(f"\n[bold]{act.title}[/]")
    console.print(act.story, style="dim")
    table = Table(box=box.ROUNDED, expand=True, show_lines=any("\n" in row.asks for row in act.rows))
    table.add_column("", width=1)
    table.add_column("who", width=max(len(row.who) for row in act.rows))
    table.add_column("asks for", ratio=5, overflow="fold")
    table.add_column("came back", ratio=3)
    table.add_column("why", ratio=5, overflow="fold")
    for row in act.rows:
        mark = Text("✓", "green") if row.ok else Text("✗", "bold red")
        # Text, not markup: a path may contain square brackets.
        came_back = Text(row.came_back) if row.ok else Text(f"{row.came_back}\nmust be: {row.must}", "red")
        table.add_row(mark, Text(row.who), Text(row.asks), came_back, Text(row.why))
    console.print(table)


def _stay(stage: Stage, console: Console) -> None:
    """Bring the server back and stay up until Ctrl-C, with commands to try."""
    stage.server.start()
    stage.wait_ready()
    url = stage.fail_closed.url
    needed = ("AUTHZ_REDIS_URL", "AUTHZ_TENANT_FROM")
    settings = " ".join(f"{name}={shlex.quote(stage.environment[name])}" for name in needed)
    authzctl = shlex.join([sys.executable, "-m", "authz_server.cli.authzctl"])
    console.print("\n[bold]It stays up.[/] In another terminal, from this folder:\n")
    for command in (
        f"export {settings}",
        f"alias authzctl={shlex.quote(authzctl)}",
        f"curl -i --interface {VISITOR} {shlex.quote(url + '/?tenant_id=acme')}",
        f"curl -i --interface {OFFICE} {url}//docs",
        f"authzctl explain {NIGHT_SCRAPER} --path /docs",
        f'authzctl block add {VISITOR} --reason "trying it"',
        f"curl http://127.0.0.1:{stage.admin_port}/readyz",
    ):
        # Never cut nor broken by us: these lines are there to be copied.
        console.print(f"  {command}", style="cyan", soft_wrap=True, markup=False)
    console.print("\nCtrl-C here stops everything.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
