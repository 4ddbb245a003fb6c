"""Instances say who they are and remember what arrived."""

import time
from collections.abc import Iterator

import httpx
import pytest

from authz_server.demo.upstreams import Upstreams

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def upstreams() -> Iterator[Upstreams]:
    with Upstreams(["queue-1", "queue-2"]) as running:
        yield running


@pytest.fixture
def http(upstreams: Upstreams) -> Iterator[dict[str, httpx.Client]]:
    upstreams.clear()
    clients = {
        name: httpx.Client(base_url=f"http://{host}:{port}", trust_env=False)
        for name, (host, port) in upstreams.addresses.items()
    }
    yield clients
    for client in clients.values():
        client.close()


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"])
def test_any_method_and_path_is_answered_with_what_was_asked(http: dict[str, httpx.Client], method: str) -> None:
    answer = http["queue-2"].request(
        method, "/a%2Fb//c;x=1?q=%31&q", headers=[("x-a", "1"), ("x-a", "2")], content=b"x" * 100_000
    )
    assert (answer.status_code, answer.headers["x-served-by"]) == (200, "queue-2")
    body = answer.json()
    assert (body["instance"], body["method"], body["path"]) == ("queue-2", method, "/a%2Fb//c;x=1?q=%31&q")
    assert [value for name, value in body["headers"] if name == "x-a"] == ["1", "2"]


def test_arrivals_are_in_order_with_their_times_until_cleared(
    upstreams: Upstreams, http: dict[str, httpx.Client]
) -> None:
    before = time.monotonic()
    for instance, path in [("queue-1", "/1"), ("queue-2", "/2"), ("queue-1", "/3?a")]:
        http[instance].get(path, headers={"X-Tenant-Id": "acme"})
    arrivals = upstreams.arrivals()
    assert [(arrival.instance, arrival.path) for arrival in arrivals] == [
        ("queue-1", "/1"),
        ("queue-2", "/2"),
        ("queue-1", "/3?a"),
    ]
    assert before < arrivals[0].monotonic < arrivals[1].monotonic < arrivals[2].monotonic < time.monotonic()
    assert arrivals[0].header("x-tenant-id") == "acme"
    assert arrivals[0].header("x-tenant-instance") is None
    assert [arrival.path for arrival in upstreams.arrivals("queue-1")] == ["/1", "/3?a"]
    upstreams.clear()
    assert upstreams.arrivals() == []


@pytest.mark.parametrize(("query", "at_least"), [("ms=150", 0.15), ("ms=nonsense", 0.0), ("ms=-5", 0.0), ("", 0.0)])
def test_slow_waits_as_long_as_asked(http: dict[str, httpx.Client], query: str, at_least: float) -> None:
    start = time.monotonic()
    assert http["queue-1"].get(f"/slow?{query}").status_code == 200
    assert at_least <= time.monotonic() - start < at_least + 2.0
