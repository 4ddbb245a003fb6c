"""Valkey comes back where it was."""

import pytest
import redis

from authz_server.demo.valkey import Valkey

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_child_left")]


def connect(valkey: Valkey) -> redis.Redis:
    return redis.Redis.from_url(valkey.url, socket_timeout=0.5, socket_connect_timeout=0.5, retry=None)


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize(
    ("append_only", "save", "kept"),
    [(True, False, True), (False, True, True), (False, False, False)],
    ids=["append_only", "saved", "neither"],
)
def test_started_again_it_has_its_port_and_what_was_written_to_disk(
    end: str, append_only: bool, save: bool, kept: bool
) -> None:
    with Valkey(append_only=append_only) as valkey, connect(valkey) as client:
        url, pid = valkey.url, valkey.pid
        client.set("a", "1")
        if save:
            client.save()
        getattr(valkey, end)()
        assert not valkey.running
        with pytest.raises(redis.ConnectionError):
            client.ping()
        valkey.start()
        assert (valkey.url, valkey.pid != pid) == (url, True)
        assert client.get("a") == (b"1" if kept else None)


def test_paused_it_does_not_answer_and_resumed_it_does() -> None:
    with Valkey() as valkey, connect(valkey) as client:
        client.set("a", "1")
        valkey.pause()
        with pytest.raises(redis.TimeoutError):
            client.get("a")
        valkey.resume()
        assert client.get("a") == b"1"


def test_it_never_evicts() -> None:
    with Valkey() as valkey, connect(valkey) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_two_run_side_by_side_and_a_paused_one_can_be_closed() -> None:
    with Valkey() as one, Valkey() as two:
        assert one.port != two.port
        two.pause()
