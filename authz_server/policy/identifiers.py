"""The one pattern for names that travel in headers, keys and patterns: tenants, instances, lists, resources."""

import re
from typing import Final

MAX_IDENTIFIER_LENGTH: Final = 63

_IDENTIFIER: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


def is_identifier(text: str) -> bool:
    """Tell whether the text is 1 to 63 of a-z, 0-9, dot, underscore, hyphen, beginning with a letter or digit.

    Lower case only, so that two spellings are never two tenants here and one tenant in a backend that folds case.
    """
    return _IDENTIFIER.fullmatch(text) is not None


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
