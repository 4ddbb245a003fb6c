"""Which build runs: the sources as they are, or with the hot path compiled by mypyc (`make compiled`, the image)."""

from pathlib import Path
from typing import Literal

from authz_server.policy import decision


def hot_path() -> Literal["compiled", "python"]:
    """Return how what each check runs through is executed; decisions and answers are the same in both."""
    return "python" if Path(decision.__file__).suffix == ".py" else "compiled"
