"""The one pattern for names that travel in headers, keys and patterns: tenants, instances, lists, resources."""

from string import ascii_lowercase, digits
from typing import Final

MAX_IDENTIFIER_LENGTH: Final = 63

_SIGNS: Final = "._-"
_CHARACTERS: Final = ascii_lowercase + digits + _SIGNS


def is_identifier(text: str) -> bool:
    """Tell whether the text is 1 to 63 of a-z, 0-9, dot, underscore, hyphen, beginning with a letter or digit.

    Lower case only, so that two spellings are never two tenants here and one tenant in a backend that folds case.
    """
    return 0 < len(text) <= MAX_IDENTIFIER_LENGTH and text[0] not in _SIGNS and not text.strip(_CHARACTERS)


def parse_identifier(text: str, kind: str) -> str:
    """Return the text when it is an identifier.

    Raises:
        ValueError: naming the kind, the text and what is allowed.
    """
    if not is_identifier(text):
        raise ValueError(
            f"{text!r} is not a name for {kind}: use 1 to {MAX_IDENTIFIER_LENGTH} of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or digit"
        )
    return text
