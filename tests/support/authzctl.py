"""`authzctl` called within this process."""

import json
from dataclasses import dataclass
from typing import Any

from typer.testing import CliRunner

from authz_server.cli.authzctl import app


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        return json.loads(self.err)


def run(*words: str) -> Ran:
    result = CliRunner().invoke(app, list(words))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def write(*words: str, code: int = 0) -> Ran:
    ran = run(*words, "--reason", "a test")
    assert ran.code == code, ran
    return ran
