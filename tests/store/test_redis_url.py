"""URLs and prefixes that cannot be used are refused when the store is made, without showing a password."""

import pytest

from authz_server.store.redis_store import RedisStore


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost",
        "redis://:pa/sesame@localhost",
        "redis://:1234/sesame@localhost/0",
        "redis://:sesame@localhost:port",
        "redis://:sesame@localhost/zero",
        "redis://:sesame@localhost/0?socket_timeout=soon",
        "redis://:sesame@localhost/0?no_such_option=1",
    ],
)
def test_a_url_that_cannot_be_read(url: str) -> None:
    with pytest.raises(ValueError, match="write redis://") as caught:
        RedisStore(url)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "a b", "{a}", "a\n"])
def test_a_prefix_that_cannot_be_used(prefix: str) -> None:
    with pytest.raises(ValueError, match="is not a prefix"):
        RedisStore("redis://localhost", prefix=prefix)
