"""One pattern for names."""

import pytest

from authz_server.policy.identifiers import is_identifier, parse_identifier

GOOD = {"letter": "a", "digit": "0", "all-kinds": "a.b_c-9", "longest": "x" * 63}
BAD = {
    "empty": "",
    "too-long": "x" * 64,
    "upper-case": "Acme",
    "leading-dot": ".a",
    "leading-hyphen": "-a",
    "leading-underscore": "_a",
    "space": "a b",
    "slash": "a/b",
    "colon": "tenant:a",
    "line-end": "acme\n",
    "nul": "a\0",
    "cyrillic-a": "\u0430cme",
    "arabic-digit": "\u0661",
    "kelvin-sign": "\u212a",
    "surrogate": "\ud800",
}


@pytest.mark.parametrize("text", GOOD.values(), ids=GOOD)
def test_names_are_taken_as_they_are(text: str) -> None:
    assert is_identifier(text)
    assert parse_identifier(text, "a tenant") == text


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_other_text_is_refused_with_the_kind_and_the_text(text: str) -> None:
    assert not is_identifier(text)
    with pytest.raises(ValueError, match="use 1 to 63 of a-z") as caught:
        parse_identifier(text, "an instance")
    assert str(caught.value).startswith(f"{text!r} is not a name for an instance")
