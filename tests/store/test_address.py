"""Addresses say where the store is and no secret, and survive being JSON."""

import json
from pathlib import Path

import pytest

from authz_server.store.address import RedisAddress, RedisTls

ADDRESSES = {
    "url": (RedisAddress("redis://ann:s3cret@valkey:6380/2"), "Redis at valkey:6380"),
    "socket": (RedisAddress("unix:///run/valkey.sock"), "Redis at /run/valkey.sock"),
    "tls": (RedisAddress("rediss://valkey", tls=RedisTls(ca=Path("/ca.pem"))), "Redis at valkey:6379"),
    "sentinels": (
        RedisAddress(
            sentinels=(("s1", 26379), ("::1", 26379)), primary="policy", password="s3cret", sentinel_password="s3cret"
        ),
        "Redis primary 'policy' of the Sentinels at s1:26379, [::1]:26379",
    ),
    "cluster": (RedisAddress(cluster=(("n1", 6379),), password="s3cret", tls=RedisTls()), "Redis Cluster at n1:6379"),
}


@pytest.mark.parametrize(("address", "said"), ADDRESSES.values(), ids=ADDRESSES)
def test_an_address(address: RedisAddress, said: str) -> None:
    assert str(address) == said
    assert "s3cret" not in repr(address)
    assert RedisAddress.from_json(json.loads(json.dumps(address.as_json()))) == address


@pytest.mark.parametrize(
    "fields",
    [{}, {"url": "redis://a", "cluster": (("n1", 1),)}, {"sentinels": (("s1", 1),)}],
    ids=["nothing", "two places", "Sentinels without a name"],
)
def test_an_address_that_says_nothing_or_too_much(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"where is the store|need the name"):
        RedisAddress(**fields)  # type: ignore[arg-type]
