"""Entries end at their second in a server that hears of nothing: no event, no store, no clean-up."""

import time
from pathlib import Path

import pytest
from support.process import ServerProcess, apply_writes, init_policy

from authz_server.demo.valkey import Valkey
from authz_server.policy.access import Entry, Mode, Scope, Side, own_list
from authz_server.policy.addresses import parse_network
from authz_server.policy.records import entry_key, record_key
from authz_server.store.interface import Write

pytestmark = pytest.mark.integration

BLOCKED, ALLOWED = "198.51.100.7", "203.0.113.7"


def test_a_block_and_an_allow_end_at_their_second_while_the_store_is_away(own_valkey: Valkey, tmp_path: Path) -> None:
    init_policy(own_valkey.url)
    with ServerProcess(tmp_path, {"AUTHZ_REDIS_URL": own_valkey.url}) as server:
        server.wait_ready()
        ends = int(time.time()) + 5
        block = Entry(parse_network("198.51.100.0/24"), "scraper", "ann", 1, expires_at=ends)
        allow = Entry(parse_network("203.0.113.0/24"), "visitors", "ann", 1, expires_at=ends)
        closed = Scope("tenant:acme", Mode.RESTRICTED)
        apply_writes(
            own_valkey.url,
            "c1",
            Write(entry_key(own_list("global", Side.BLOCK), block), None, block),
            Write(entry_key(own_list("tenant:acme", Side.ALLOW), allow), None, allow),
            Write(record_key(closed), None, closed),
        )
        server.wait_log("change applied")
        own_valkey.stop()
        revision = server.get_json("/snapshot")["revision"]

        def check() -> tuple[bool, bool]:
            """Whether the blocked address is denied, and the allowed one let in."""
            denied = server.check(BLOCKED).status.code != 0
            return denied, server.check(ALLOWED, x_tenant_id="acme").status.code == 0

        counted = 0
        while time.time() < ends:
            before = time.time()
            answers = check()
            if time.time() < ends:
                assert answers == (True, True), f"{ends - before:.3f} s before the end"
                counted += 1
            time.sleep(0.01)
        assert counted > 3, "the store took so long to stop that nothing was shown"
        assert check() == (False, False), "from its second on"
        assert server.get_json("/snapshot")["revision"] == revision
        assert len(server.logged("change applied")) == 1
