"""Plays scenarios at length, prints a table, and ends with 0 only if nothing was noticed.

PYTHONPATH=.:tests python -m chaos [SCENARIO...]
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chaos.fleet import Row
from chaos.scenarios import LONG, SCENARIOS, play, title

_COLUMNS = ("checks", "failed", "wrong", "changes", "durable", "lost", "reported", "heals in s")


def main(names: list[str]) -> int:
    """Play the scenarios named, or all of them."""
    if unknown := [name for name in names if name not in SCENARIOS]:
        sys.exit(f"no such scenario: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table("scenario")
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    rows = []
    for name in names or SCENARIOS:
        console.print(f"[bold]{name}[/]: {escape(title(name))}", highlight=False)
        with tempfile.TemporaryDirectory(prefix="authz-chaos-") as directory:
            row = asyncio.run(play(name, Path(directory), LONG))
        for problem in row.problems:
            console.print(f"  {problem}", style="red", markup=False, soft_wrap=True)
        rows.append(row)
        table.add_row(*_cells(row), style="red" if row.problems else "")
    console.print(table)
    return 1 if any(row.problems for row in rows) else 0


def _cells(row: Row) -> tuple[str, ...]:
    healed = f"{min(row.heal_seconds):.1f}-{max(row.heal_seconds):.1f}" if row.heal_seconds else row.skipped
    numbers = (row.checks, row.failed, row.wrong, row.changes, row.durable, row.lost, row.reported)
    return (row.scenario, *(f"{number:,}" for number in numbers), healed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
