"""Fixtures that several rooms share."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

from authz_server.demo.valkey import Valkey

# An example that takes long says more about what else the machine does than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """One real Valkey for all: never stop or flush it; keep apart by key prefix."""
    with Valkey() as server:
        yield server


@pytest.fixture
def own_valkey() -> Iterator[Valkey]:
    """A real Valkey for this test alone, to be stopped, started again and flushed at will."""
    with Valkey() as server:
        yield server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each practice of istio/: how many tests passed on which Envoy.

    Made of reports, and here: the process that sums up for several others does not know istio's conftest.
    """
    outcomes: dict[str, dict[str, Counter[str]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if practice := getattr(report, "practice", None):
                title, version = practice
                outcomes.setdefault(title, {}).setdefault(version, Counter())[report.outcome] += 1
    if not outcomes:
        return
    terminalreporter.section("istio/, by practice")
    for title, versions in sorted(outcomes.items()):
        parts = []
        for version, counts in sorted(versions.items()):
            said = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
            parts.append(f"{version}: {said}" if version else said)
        failed = any(counts["failed"] for counts in versions.values())
        terminalreporter.line(f"{'FAILED' if failed else 'ok':<7}{title} [{'; '.join(parts)}]", red=failed)
