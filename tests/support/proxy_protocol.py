"""PROXY protocol headers, as a load balancer sends them before a connection's first byte."""

import socket
import struct

V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_LOCAL, V2_PROXY = 0x20, 0x21
V2_UNSPECIFIED, V2_TCP4, V2_TCP6 = 0x00, 0x11, 0x21


def v1(protocol: str, client: str, gateway: str) -> bytes:
    """A PROXY protocol header, version 1 (haproxy's proxy-protocol.txt, section 2.1)."""
    return f"PROXY {protocol} {client} {gateway} 40000 443\r\n".encode()


def v2(command: int, family: int, addresses: bytes = b"", extra: bytes = b"") -> bytes:
    """A PROXY protocol header, version 2 (section 2.2)."""
    return V2_SIGNATURE + struct.pack("!BBH", command, family, len(addresses + extra)) + addresses + extra


def v2_addresses(family: socket.AddressFamily, client: str, gateway: str) -> bytes:
    """The addresses of a version 2 header."""
    return socket.inet_pton(family, client) + socket.inet_pton(family, gateway) + struct.pack("!HH", 40000, 443)
