"""Whose address the decision is about, through a real Envoy, whatever the client sends.

Each row is decided twice, under policies in which its address and every other address of this table have opposite
outcomes: it alone is blocked and all others are allowed; it alone is admitted and all others are blocked. So a row
can only come out right when the decision is about exactly that address.
"""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

import pytest
from support.gateway import TENANT_HEADER_SOURCE, Answer, AuthzServer, Headers, ask, policy
from support.proxy_protocol import V2_LOCAL, V2_PROXY, V2_TCP4, V2_TCP6, V2_UNSPECIFIED, v1, v2, v2_addresses

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import Address, GatewayOptions, appending_proxy_config, gateway_config
from authz_server.demo.upstreams import Upstreams
from authz_server.policy.addresses import parse_network
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, MissingClientAddress, Snapshot

pytestmark = pytest.mark.integration

INSTANCES = ("queue-1", "queue-2", "queue-3")

CLIENT = "127.0.0.5"
"""Where clients connect from, unless a row says otherwise."""
PROXY = "127.0.0.1"
"""Where the appending proxy connects from."""
BALANCER = "127.0.0.3"
"""Where the load balancer that speaks PROXY protocol connects from."""
FORGED = "9.9.9.9"
OTHER_FORGED = "8.8.8.8"
FORGED_6 = "2001:db8::9"
CLIENT_4 = "203.0.113.7"
MAPPED_4 = f"::ffff:{CLIENT_4}"
CLIENT_6 = "2001:db8::7"
ADDRESSES = {CLIENT, PROXY, BALANCER, FORGED, OTHER_FORGED, FORGED_6, CLIENT_4, CLIENT_6, "::1"}

EXTERNAL = "x-envoy-external-address"

V1_TCP4 = v1("TCP4", CLIENT_4, "127.0.0.1")
V1_TCP6 = v1("TCP6", CLIENT_6, "::1")
V2_TCP4_HEADER = v2(V2_PROXY, V2_TCP4, v2_addresses(socket.AF_INET, CLIENT_4, "127.0.0.1"))
V2_TCP6_HEADER = v2(V2_PROXY, V2_TCP6, v2_addresses(socket.AF_INET6, CLIENT_6, "::1"))
V2_MAPPED_HEADER = v2(V2_PROXY, V2_TCP6, v2_addresses(socket.AF_INET6, MAPPED_4, "::ffff:127.0.0.1"))
UNIQUE_ID_TLV = b"\x05" + struct.pack("!H", len(FORGED)) + FORGED.encode()

Topology = Literal["edge", "edge_ipv6", "bypassing", "through_proxy", "proxy_protocol"]
"""edge: no trusted hops. bypassing: one trusted hop, and the client reaches the gateway without passing it."""


@dataclass(frozen=True)
class Row:
    """What is sent, and what the decision must be about."""

    id: str
    topology: Topology
    expected: str | Reason
    """The client address, or why there is none."""
    headers: Headers = ()
    trusted_peers: tuple[str, ...] = ()
    preamble: bytes = b""
    source: str | None = CLIENT
    peer: str | None = None
    """The connection's address as the check request names it; None: the source."""
    upstream: str | None = None
    """What x-envoy-external-address says to the instance; None: the client address."""


def edge(id_: str, *headers: tuple[str, str]) -> Row:
    return Row(f"edge-{id_}", "edge", CLIENT, headers)


def through_proxy(id_: str, *headers: tuple[str, str], trusted_peers: tuple[str, ...] = (f"{PROXY}/32",)) -> Row:
    return Row(f"through_proxy-{id_}", "through_proxy", CLIENT, headers, trusted_peers, peer=PROXY)


def bypassing(
    id_: str, *headers: tuple[str, str], expected: str = FORGED, upstream: str | None = None
) -> tuple[Row, Row]:
    """A client that gets around the proxy: forges its address, unless the gateway's peers are named."""
    return (
        Row(f"bypassing-{id_}-any_peer_trusted", "bypassing", expected, headers, upstream=upstream),
        Row(f"bypassing-{id_}-proxy_trusted", "bypassing", Reason.NO_CLIENT_ADDRESS, headers, (f"{PROXY}/32",)),
    )


def proxied(id_: str, expected: str, preamble: bytes, *headers: tuple[str, str], seen_as: str = "") -> Row:
    """A client behind a balancer; `seen_as`: how Envoy spells the client, when not as we do."""
    spelled = seen_as or expected
    return Row(
        f"proxy_protocol-{id_}",
        "proxy_protocol",
        expected,
        headers,
        preamble=preamble,
        source=BALANCER,
        peer=spelled,
        upstream=spelled,
    )


FORGERIES: dict[str, Headers] = {
    "external": ((EXTERNAL, FORGED),),
    "external_upper_case": (("X-ENVOY-EXTERNAL-ADDRESS", FORGED),),
    "external_twice": ((EXTERNAL, FORGED), (EXTERNAL, OTHER_FORGED)),
    "external_list": ((EXTERNAL, f"{FORGED}, {OTHER_FORGED}"),),
    "external_empty": ((EXTERNAL, ""),),
    "external_ipv6": ((EXTERNAL, FORGED_6),),
    "external_mapped": ((EXTERNAL, f"::ffff:{FORGED}"),),
    "external_mapped_in_hex": ((EXTERNAL, "::FFFF:0909:0909"),),
    "external_nonsense": ((EXTERNAL, "not an address"),),
    "forwarded_for": (("x-forwarded-for", FORGED),),
    "forwarded_for_list": (("X-Forwarded-For", f"{FORGED}, {OTHER_FORGED}"),),
    "forwarded_for_twice": (("x-forwarded-for", FORGED), ("x-forwarded-for", OTHER_FORGED)),
    "forwarded_for_nonsense": (("x-forwarded-for", "not an address"),),
    "both": ((EXTERNAL, FORGED), ("x-forwarded-for", OTHER_FORGED)),
    "others": (
        ("x-real-ip", FORGED),
        ("forwarded", f"for={FORGED}"),
        ("true-client-ip", FORGED),
        ("cf-connecting-ip", FORGED),
        ("x-envoy-internal", "true"),
        ("x-forwarded-proto", "https"),
    ),
    "named_as_hop_by_hop": ((EXTERNAL, FORGED), ("Connection", f"{EXTERNAL}, x-tenant-instance")),
}

ROWS = (
    edge("nothing_forged"),
    *(edge(name, *headers) for name, headers in FORGERIES.items()),
    Row("edge-peer_is_trusted", "edge", CLIENT, FORGERIES["both"], (f"{CLIENT}/32",)),
    Row("edge-peer_is_not_trusted", "edge", Reason.NO_CLIENT_ADDRESS, FORGERIES["both"], (f"{FORGED}/32",)),
    Row("edge_ipv6-nothing_forged", "edge_ipv6", "::1", source="::1"),
    *(Row(f"edge_ipv6-{name}", "edge_ipv6", "::1", headers, source="::1") for name, headers in FORGERIES.items()),
    through_proxy("nothing_forged"),
    *(through_proxy(name, *headers) for name, headers in FORGERIES.items()),
    through_proxy("any_peer_trusted", *FORGERIES["both"], trusted_peers=()),
    through_proxy("proxy_trusted_mapped", *FORGERIES["both"], trusted_peers=(f"::ffff:{PROXY}/128",)),
    *bypassing("forwarded_for", ("x-forwarded-for", FORGED)),
    *bypassing("both", ("x-forwarded-for", FORGED), (EXTERNAL, OTHER_FORGED)),
    *bypassing("list", ("x-forwarded-for", f"{OTHER_FORGED}, {FORGED}")),
    *bypassing("ipv6", ("x-forwarded-for", "2001:DB8:0:0::0009"), expected=FORGED_6),
    *bypassing("mapped", ("x-forwarded-for", f"::ffff:{FORGED}"), upstream=f"::ffff:{FORGED}"),
    proxied("v1_tcp4", CLIENT_4, V1_TCP4),
    proxied("v1_tcp6", CLIENT_6, V1_TCP6),
    proxied("v1_tcp6_mapped", CLIENT_4, v1("TCP6", MAPPED_4, "::ffff:127.0.0.1"), seen_as=MAPPED_4),
    proxied("v1_unknown", BALANCER, b"PROXY UNKNOWN\r\n"),
    proxied("v1_unknown_with_addresses", BALANCER, v1("UNKNOWN", FORGED, "127.0.0.1")),
    proxied("v2_tcp4", CLIENT_4, V2_TCP4_HEADER),
    proxied("v2_tcp6", CLIENT_6, V2_TCP6_HEADER),
    proxied("v2_tcp6_mapped", CLIENT_4, V2_MAPPED_HEADER, seen_as=MAPPED_4),
    *(
        proxied(f"v2_tcp6_mapped-{name}", CLIENT_4, V2_MAPPED_HEADER, *headers, seen_as=MAPPED_4)
        for name, headers in FORGERIES.items()
    ),
    proxied("v2_local", BALANCER, v2(V2_LOCAL, V2_UNSPECIFIED)),
    proxied(
        "v2_local_with_addresses", BALANCER, v2(V2_LOCAL, V2_TCP4, v2_addresses(socket.AF_INET, FORGED, "127.0.0.1"))
    ),
    proxied(
        "v2_tlv",
        CLIENT_4,
        v2(V2_PROXY, V2_TCP4, v2_addresses(socket.AF_INET, CLIENT_4, "127.0.0.1"), UNIQUE_ID_TLV),
    ),
    *(proxied(f"v1_tcp4-{name}", CLIENT_4, V1_TCP4, *headers) for name, headers in FORGERIES.items()),
    *(proxied(f"v2_tcp6-{name}", CLIENT_6, V2_TCP6_HEADER, *headers) for name, headers in FORGERIES.items()),
    proxied("v1_unknown-both", BALANCER, b"PROXY UNKNOWN\r\n", *FORGERIES["both"]),
)

TENANT: Headers = (("X-Tenant-Instance", "queue-3"), ("x-tenant-id", "acme"), ("x-tenant-instance", "queue-2"))
"""Goes with each request: whoever asks, acme is at queue-1."""


class Topologies:
    """The gateways of the table, each started when a row first needs it."""

    def __init__(self, server: AuthzServer, upstreams: Upstreams, stack: ExitStack) -> None:
        self._server = server
        self._upstreams = upstreams
        self._stack = stack
        self._addresses: dict[Topology, Address] = {}

    def __getitem__(self, topology: Topology) -> Address:
        if topology not in self._addresses:
            self._addresses[topology] = self._start(topology)
        return self._addresses[topology]

    def _start(self, topology: Topology) -> Address:
        if topology == "through_proxy":
            return self._stack.enter_context(Envoy(appending_proxy_config(self["bypassing"]), name="proxy")).address
        options = GatewayOptions(
            authz=self._server.address,
            instances=self._upstreams.addresses,
            # What the server does not deny gets through: so nothing here comes out right because something broke.
            failure_mode_allow=True,
            timeout_seconds=5.0,
            trusted_hops=1 if topology == "bypassing" else 0,
            proxy_protocol=topology == "proxy_protocol",
            listen_host="::1" if topology == "edge_ipv6" else "127.0.0.1",
        )
        return self._stack.enter_context(Envoy(gateway_config(options), name=topology)).address


@pytest.fixture(scope="module")
def server() -> Iterator[AuthzServer]:
    with AuthzServer(policy()) as running:
        yield running
        assert running.faults == []


@pytest.fixture(scope="module")
def topologies(server: AuthzServer, running_upstreams: Upstreams) -> Iterator[Topologies]:
    with ExitStack() as stack:
        yield Topologies(server, running_upstreams, stack)


@pytest.fixture
def send(server: AuthzServer, topologies: Topologies, upstreams: Upstreams) -> Callable[[Row, Snapshot], Answer]:
    """Send a row's request under a policy."""

    def send_row(row: Row, snapshot: Snapshot) -> Answer:
        server.snapshot = snapshot
        server.clear()
        upstreams.clear()
        headers = (*TENANT, *row.headers)
        return ask(topologies[row.topology], "/x", headers=headers, source=row.source, preamble=row.preamble)

    return send_row


def options(row: Row, missing: MissingClientAddress = MissingClientAddress.DENY) -> DecisionOptions:
    return DecisionOptions(
        trusted_peers=tuple(parse_network(cidr) for cidr in row.trusted_peers),
        missing_client_address=missing,
        tenant_sources=TENANT_HEADER_SOURCE,
    )


def it_alone_is_blocked(row: Row) -> Snapshot:
    it = str(row.expected)
    return policy(
        restricted=True,
        blocked=[it],
        allowed=ADDRESSES - {it},
        pins={"acme": "queue-1"},
        instances=INSTANCES,
        options=options(row),
    )


def it_alone_is_admitted(row: Row) -> Snapshot:
    it = str(row.expected)
    return policy(
        restricted=True,
        allowed=[it],
        blocked=ADDRESSES - {it},
        pins={"acme": "queue-1"},
        instances=INSTANCES,
        options=options(row, MissingClientAddress.PEER),  # so that the peer is read, though no address is missing
    )


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if not isinstance(row.expected, Reason)])
def test_the_decision_is_about_exactly_this_address(
    row: Row, send: Callable[[Row, Snapshot], Answer], server: AuthzServer, upstreams: Upstreams
) -> None:
    denied = send(row, it_alone_is_blocked(row))
    (checked,) = server.checked()
    assert (denied.status, checked.decision.reason) == (403, Reason.BLOCKED)
    assert str(checked.decision.client_address) == row.expected
    assert upstreams.arrivals() == []

    admitted = send(row, it_alone_is_admitted(row))
    (checked,) = server.checked()
    assert (admitted.status, checked.decision.reason) == (200, Reason.ALLOWLISTED)
    assert str(checked.decision.client_address) == row.expected
    assert checked.attributes is not None
    assert checked.attributes.peer_address == (row.peer or row.source)

    (arrival,) = upstreams.arrivals()
    assert arrival.instance == "queue-1"
    assert arrival.header(EXTERNAL) == (row.upstream or row.expected)
    assert arrival.header("x-tenant-instance") == "queue-1"
    assert arrival.header("x-tenant-id") == "acme"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if isinstance(row.expected, Reason)])
def test_there_is_no_address_to_decide_about_where_the_peer_is_not_trusted(
    row: Row, send: Callable[[Row, Snapshot], Answer], server: AuthzServer, upstreams: Upstreams
) -> None:
    everyone = policy(restricted=True, allowed=["0.0.0.0/0", "::/0"], options=options(row))
    assert send(row, everyone).status == 403
    (checked,) = server.checked()
    assert (checked.decision.reason, checked.decision.client_address) == (row.expected, None)
    assert upstreams.arrivals() == []


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS if isinstance(row.expected, Reason)])
def test_the_peer_stands_in_for_the_address_only_where_the_setting_says_so(
    row: Row, send: Callable[[Row, Snapshot], Answer], server: AuthzServer, upstreams: Upstreams
) -> None:
    only_it = policy(restricted=True, allowed=[CLIENT], options=options(row, MissingClientAddress.PEER))
    assert send(row, only_it).status == 200
    (checked,) = server.checked()
    assert str(checked.decision.client_address) == CLIENT


@pytest.mark.parametrize(
    "preamble",
    [
        pytest.param(b"", id="none"),
        pytest.param(v1("TCP4", "203.0.113.7, 9.9.9.9", "127.0.0.1"), id="v1_two_addresses"),
        pytest.param(v1("TCP4", CLIENT_6, "127.0.0.1"), id="v1_ipv6_called_tcp4"),
        pytest.param(v1("TCP4", "203.0.113.007", "127.0.0.1"), id="v1_leading_zeros"),
        pytest.param(v1("TCP6", f"{CLIENT_6}%lo", "::1"), id="v1_zone"),
        pytest.param(b"PROXY TCP4\r\n", id="v1_no_addresses"),
        pytest.param(b"proxy tcp4 203.0.113.7 127.0.0.1 1 2\r\n", id="v1_lower_case"),
        pytest.param(v2(V2_PROXY, V2_TCP4, b"\x01\x02"), id="v2_too_short"),
        # The specification lets a receiver take it for LOCAL; Envoy does not.
        pytest.param(v2(V2_PROXY, V2_UNSPECIFIED), id="v2_unspecified"),
        pytest.param(v2(V2_PROXY, 0x91, v2_addresses(socket.AF_INET, FORGED, "127.0.0.1")), id="v2_unknown_family"),
        pytest.param(v2(0x2F, V2_TCP4, v2_addresses(socket.AF_INET, FORGED, "127.0.0.1")), id="v2_unknown_command"),
    ],
)
def test_a_connection_without_a_proper_proxy_protocol_header_is_closed(
    preamble: bytes, topologies: Topologies, server: AuthzServer, upstreams: Upstreams
) -> None:
    server.snapshot = policy()
    server.clear()
    with pytest.raises(ConnectionError):
        ask(topologies["proxy_protocol"], "/x", source=BALANCER, preamble=preamble)
    assert server.checked() == []
    assert upstreams.arrivals() == []


@pytest.mark.parametrize("first", [V1_TCP4, V2_TCP4_HEADER], ids=["v1", "v2"])
@pytest.mark.parametrize("second", [v1("TCP4", FORGED, "127.0.0.1"), V2_TCP6_HEADER], ids=["v1", "v2"])
def test_a_clients_own_proxy_protocol_header_behind_the_balancers_is_not_read(
    first: bytes, second: bytes, topologies: Topologies, server: AuthzServer, upstreams: Upstreams
) -> None:
    """The balancer's header comes first; what a client writes there is the begin of its request."""
    server.snapshot = policy()
    server.clear()
    with suppress(ConnectionError):  # closed before the 400 was read: as good
        assert ask(topologies["proxy_protocol"], "/x", source=BALANCER, preamble=first + second).status == 400
    assert server.checked() == []
    assert upstreams.arrivals() == []
