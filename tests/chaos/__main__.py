"""Plays scenarios at length, tells of each as it ends, and ends with 0 only if nothing was noticed.

PYTHONPATH=.:tests python -m chaos [SCENARIO...]
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from chaos.fleet import Row
from chaos.scenarios import LONG, SCENARIOS, play, title

_COLUMNS = ("took s", "checks", "failed", "wrong", "changes", "durable", "lost", "reported", "heals s")


def main(names: list[str]) -> int:
    """Play the scenarios named, or all of them."""
    if unknown := [name for name in names if name not in SCENARIOS]:
        sys.exit(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_line("scenario", *_COLUMNS))
    noticed = False
    for name in names or SCENARIOS:
        console.print(f"[bold]{name}[/]: {escape(title(name))}", highlight=False)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="authz-chaos-") as directory:
            row = asyncio.run(play(name, Path(directory), LONG))
        console.print(_line(name, f"{time.monotonic() - began:.0f}", *_cells(row)), style="red" if row.problems else "")
        if row.skipped:
            console.print(f"  not played: {row.skipped}", markup=False, soft_wrap=True)
        for problem in row.problems:
            console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
        noticed = noticed or bool(row.problems)
    return 1 if noticed else 0


def _line(scenario: str, *cells: str) -> Table:
    """One row; those of one width stand under each other, whenever they are printed."""
    line = Table.grid(Column(width=18), *(Column(width=9, justify="right") for _ in cells), padding=(0, 1))
    line.add_row(scenario, *cells)
    return line


def _cells(row: Row) -> tuple[str, ...]:
    healed = f"{min(row.heal_seconds):.1f}-{max(row.heal_seconds):.1f}" if row.heal_seconds else "-"
    numbers = (row.checks, row.failed, row.wrong, row.changes, row.durable, row.lost, row.reported)
    return (*(f"{number:,}" for number in numbers), healed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
