"""Each scenario for some seconds; `make chaos` plays them at length."""

from pathlib import Path

import pytest

from chaos.scenarios import SCENARIOS, SHORT, play

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", SCENARIOS)
async def test_no_check_notices_and_nothing_is_lost_unseen(name: str, tmp_path: Path) -> None:
    row = await play(name, tmp_path, SHORT)
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.problems == []
    assert (row.failed, row.wrong, row.reported) == (0, 0, row.lost)
    assert row.checks > 100
    assert row.heal_seconds
