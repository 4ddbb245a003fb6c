"""Protocol buffers written by hand, without the library that the server uses: also what no library would write."""

_SHORT_VARINTS = [bytes([value]) for value in range(0x80)]


def varint(value: int, longer: int = 0) -> bytes:
    """A number, in `longer` bytes more than it takes."""
    if value < 0x80 and not longer:
        return _SHORT_VARINTS[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(longer):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def delimited(number: int, payload: bytes | str, longer: int = 0) -> bytes:
    """A field of wire type 2: a string, bytes or a message; its tag and its length in `longer` bytes more."""
    data = payload.encode() if isinstance(payload, str) else payload
    return varint(number << 3 | 2, longer) + varint(len(data), longer) + data
