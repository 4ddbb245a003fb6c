"""`authzctl` called within this process, and as a process of its own."""

import asyncio
import json
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

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


class AuthzctlProcess:
    """One command in a process of its own, ended at the end of the `async with` block."""

    def __init__(self, url: str, words: str) -> None:
        self._environ = {"AUTHZ_REDIS_URL": url}
        self._words = [*words.split(), "--reason", "a test", "--actor", "alice"]

    async def __aenter__(self) -> Self:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "authz_server.cli.authzctl", *self._words,
            env=self._environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        return self

    async def ended(self) -> tuple[int | None, str]:
        """Exit code and output."""
        out, _ = await self.process.communicate()
        return self.process.returncode, out.decode()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
