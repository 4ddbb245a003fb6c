"""`authzctl doctor`: whether the store is fit to keep a policy."""

import time

import typer

from authz_server.cli.diagnosis import Check, Verdict, judge_history, judge_replicas, judge_server
from authz_server.cli.failures import EXIT_CODES, NotSoundError
from authz_server.cli.output import Json, OutputFormat, print_json, print_table
from authz_server.cli.session import Config, Output, RedisUrl, reading
from authz_server.store.interface import InconsistentStateError, NotInitialisedError, Store, UnknownFormatError


def register(app: typer.Typer) -> None:
    """Add the command to `authzctl`."""
    app.command("doctor", epilog=EXIT_CODES)(doctor)


def doctor(output: Output = OutputFormat.TABLE, redis_url: RedisUrl = None, config: Config = None) -> None:
    """Look at the store: version, eviction, memory, persistence, replicas, user, clock, whether the policy fits, and
    whether the servers know of changes that were lost.

    Exit code 1 if anything is a problem; warnings alone are no failure.
    """
    with reading(output, redis_url, config) as session:
        checks = session.ask(_look)
        if output is OutputFormat.JSON:
            rows: list[Json] = [
                {"check": check.what, "verdict": check.verdict, "detail": check.detail} for check in checks
            ]
            print_json({"checks": rows})
        else:
            print_table(
                ("CHECK", "VERDICT", "DETAIL"),
                [(check.what, check.verdict, check.detail) for check in checks],
                empty="",
                wrapped=("DETAIL",),
            )
        problems = [f"{check.what}: {check.detail}" for check in checks if check.verdict is Verdict.PROBLEM]
        if problems:
            raise NotSoundError(problems)


async def _look(store: Store) -> list[Check]:
    before = time.time()
    facts = await store.facts()
    checks = list(judge_server(facts, (before + time.time()) / 2))
    try:
        position = await store.position()
        cursor = -1
        while cursor:
            cursor = (await store.verify(max(cursor, 0))).cursor
    except NotInitialisedError as error:
        return [*checks, Check("policy", Verdict.WARNING, str(error))]
    except (InconsistentStateError, UnknownFormatError) as error:
        return [*checks, Check("policy", Verdict.PROBLEM, str(error))]
    told = f"revision {position.revision}, counts fit (`authzctl reconcile` reads every record)"
    replicas = await store.replicas()
    servers = judge_replicas(replicas, position.revision)
    return [*checks, Check("policy", Verdict.OK, told), servers, judge_history(replicas)]
