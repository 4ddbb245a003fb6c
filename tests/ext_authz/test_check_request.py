"""Whatever Envoy's own messages encode, we read the same."""

from datetime import UTC, datetime

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.envoy_api import auth, core, protobuf
from support.wire import delimited, varint

from authz_server.ext_authz._generated import ext_authz_pb2
from authz_server.ext_authz.check_request import BadCheckRequestError, CheckRequestReader
from authz_server.policy.addresses import InvalidAddressError, parse_address
from authz_server.policy.attributes import RequestAttributes

TENANT_HEADERS = frozenset({"x-tenant-id", "x-account"})
READER = CheckRequestReader(TENANT_HEADERS)
WANTED = ("x-envoy-external-address", "x-request-id", "x-tenant-id", "x-account")

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
header_names = st.sampled_from(WANTED) | st.from_regex(r"[a-z][a-z0-9-]{0,15}", fullmatch=True)
ip_texts = (
    st.ip_addresses().map(str)
    | st.ip_addresses(v=6).map(lambda address: address.exploded.upper())
    | st.ip_addresses(v=4).map(lambda address: f"::ffff:{address}")
)
values = ip_texts | texts


def check_request(http: auth.AttributeContextHttpRequest | None, source: core.Address | None = None) -> bytes:
    peer = auth.AttributeContextPeer(address=source)
    request = auth.AttributeContextRequest(http=http)
    return bytes(auth.CheckRequest(attributes=auth.AttributeContext(source=peer, request=request)))


def http_request(**fields: object) -> auth.AttributeContextHttpRequest:
    return auth.AttributeContextHttpRequest(**{"method": "GET", "host": "www.example.com", "path": "/", **fields})


@st.composite
def peers(draw: st.DrawFn) -> tuple[core.Address | None, str | None]:
    """Return an address as Envoy sends it, and what we have to read."""
    kind = draw(st.sampled_from(["none", "unset", "pipe", "internal", "ip"]))
    match kind:
        case "none":
            return None, None
        case "unset":
            return core.Address(), None
        case "pipe":
            return core.Address(pipe=core.Pipe(path=draw(texts), mode=0o600)), None
        case "internal":
            return core.Address(envoy_internal_address=core.EnvoyInternalAddress(server_listener_name="loop")), None
        case _:
            text = draw(ip_texts)
            socket_address = core.SocketAddress(
                address=text,
                port_value=draw(st.integers(0, 65535)),
                protocol=draw(st.sampled_from(list(core.SocketAddressProtocol))),
                ipv4_compat=draw(st.booleans()),
            )
            return core.Address(socket_address=socket_address), text


@st.composite
def unread_parts(draw: st.DrawFn) -> dict[str, object]:
    """Fill fields of AttributeContext that we have no use for."""
    metadata = core.Metadata(
        filter_metadata={draw(texts): protobuf.Struct(fields={draw(texts): protobuf.Value(string_value=draw(texts))})}
    )
    return {
        "destination": auth.AttributeContextPeer(
            address=core.Address(socket_address=core.SocketAddress(address="192.0.2.99", port_value=443)),
            service=draw(texts),
        ),
        "context_extensions": draw(st.dictionaries(texts, texts, max_size=3)),
        "metadata_context": metadata,
        "route_metadata_context": metadata,
        "tls_session": auth.AttributeContextTlsSession(sni=draw(texts)),
    }


def joined(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Lower-case names, and values of one name joined by commas in their order: what Envoy's map form holds."""
    headers: dict[str, list[str]] = {}
    for name, value in pairs:
        headers.setdefault(name.lower(), []).append(value)
    return {name: ",".join(parts) for name, parts in headers.items()}


@st.composite
def header_fields(draw: st.DrawFn) -> tuple[dict[str, object], dict[str, str]]:
    """Return the headers in one of the two forms, and the same headers joined."""
    if draw(st.booleans()):
        headers = draw(st.dictionaries(header_names, values, max_size=8))
        return {"headers": headers}, headers
    pairs: list[tuple[str, str]] = []
    encoded: list[core.HeaderValue] = []
    for name in draw(st.lists(header_names | header_names.map(str.title), max_size=8)):
        if draw(st.booleans()):
            text = draw(values)
            header = core.HeaderValue(key=name, value=text)
        else:
            raw = draw(st.binary(max_size=20) | values.map(str.encode))
            text = raw.decode(errors="replace")
            header = core.HeaderValue(key=name, raw_value=raw)
        pairs.append((name, text))
        encoded.append(header)
    return {"header_map": core.HeaderMap(headers=encoded)}, joined(pairs)


@settings(max_examples=100, deadline=None)
@given(method=texts, host=texts, path=texts, peer=peers(), headers=header_fields(), unread=unread_parts(), body=texts)
def test_reads_what_envoys_own_messages_encode(
    *,
    method: str,
    host: str,
    path: str,
    peer: tuple[core.Address | None, str | None],
    headers: tuple[dict[str, object], dict[str, str]],
    unread: dict[str, object],
    body: str,
) -> None:
    fields, expected_headers = headers
    http = auth.AttributeContextHttpRequest(
        id=body,
        method=method,
        host=host,
        path=path,
        scheme="https",
        query=body,
        fragment=body,
        size=len(body),
        protocol="HTTP/2",
        body=body,
        raw_body=body.encode(),
        **fields,
    )
    message = auth.CheckRequest(
        attributes=auth.AttributeContext(
            source=auth.AttributeContextPeer(address=peer[0], principal=body, certificate=body, labels={body: body}),
            request=auth.AttributeContextRequest(time=datetime(2024, 5, 6, tzinfo=UTC), http=http),
            **unread,
        )
    )
    assert READER.read(bytes(message)) == RequestAttributes(
        method=method,
        host=host,
        path=path,
        peer_address=peer[1],
        external_address=expected_headers.get("x-envoy-external-address"),
        headers={name: value for name, value in expected_headers.items() if name in TENANT_HEADERS},
        request_id=expected_headers.get("x-request-id", ""),
    )


def test_keeps_no_header_that_the_decision_does_not_need() -> None:
    secret = {"cookie": "session=1", "authorization": "Bearer t", "x-forwarded-for": "192.0.2.1"}
    data = check_request(http_request(headers={**secret, "x-tenant-id": "acme"}))
    attributes = READER.read(data)
    assert attributes.headers == {"x-tenant-id": "acme"}
    assert not any(value in repr(attributes) for value in secret.values())


def test_a_tenant_may_be_named_by_a_header_of_any_length_and_by_one_of_ours() -> None:
    names = {"x-" + "a" * 200, "x-request-id"}
    headers = {**dict.fromkeys(names, "acme"), "x-" + "b" * 200: "other", "x-request-no": "other"}
    attributes = CheckRequestReader(names).read(check_request(http_request(headers=headers)))
    assert attributes.headers == dict.fromkeys(names, "acme")
    assert attributes.request_id == "acme"


def test_an_absent_external_address_is_none_and_an_empty_one_is_not() -> None:
    absent = READER.read(check_request(http_request()))
    empty = READER.read(check_request(http_request(headers={"x-envoy-external-address": ""})))
    assert (absent.external_address, empty.external_address) == (None, "")


@pytest.mark.parametrize(
    "raw_values",
    [
        pytest.param([b"203.0.113.7\xff"], id="stray byte after"),
        pytest.param([b"\xc0\xb1203.0.113.7"], id="overlong digit before"),
        pytest.param(["203.0.113.\N{FULLWIDTH DIGIT SEVEN}".encode()], id="full-width digit"),
        pytest.param([b"203.0.113.7", b"203.0.113.7"], id="twice the same"),
        pytest.param([b"203.0.113.7", b""], id="one and an empty one"),
        pytest.param([b"", b"203.0.113.7"], id="an empty one and one"),
        pytest.param([b"203.0.113.7\x00"], id="NUL"),
        pytest.param([b" 203.0.113.7"], id="space"),
    ],
)
def test_a_raw_address_that_is_not_exactly_one_stays_invalid(raw_values: list[bytes]) -> None:
    headers = [core.HeaderValue(key="x-envoy-external-address", raw_value=raw) for raw in raw_values]
    data = check_request(http_request(header_map=core.HeaderMap(headers=headers)))
    external_address = READER.read(data).external_address
    assert external_address is not None
    with pytest.raises(InvalidAddressError):
        parse_address(external_address)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty message"),
        pytest.param(b"\xff\xff\xff\xff", id="garbage"),
        pytest.param(bytes(auth.CheckRequest(attributes=auth.AttributeContext())), id="no request"),
        pytest.param(check_request(None), id="no http"),
        pytest.param(check_request(http_request())[:-1], id="cut short"),
        pytest.param(check_request(http_request(path="/PATH")).replace(b"/PATH", b"/P\xffTH"), id="path not UTF-8"),
        pytest.param(
            check_request(http_request(headers={"x-account": "VALUE"})).replace(b"VALUE", b"V\xffLUE"),
            id="header not UTF-8",
        ),
        pytest.param(b"\x0a\x80\x80\x80\x80\x08", id="length beyond the end"),
        pytest.param(b"\x1b" * 100_000, id="groups"),
    ],
)
def test_refuses_what_is_no_check_about_an_http_request(data: bytes) -> None:
    with pytest.raises(BadCheckRequestError):
        READER.read(data)


def test_what_is_stepped_over_need_not_be_utf_8() -> None:
    data = check_request(http_request(headers={"x-a": "VALUE", "x-account": "acme"})).replace(b"VALUE", b"V\xffLUE")
    assert READER.read(data).headers == {"x-account": "acme"}


def decoded(data: bytes) -> RequestAttributes | None:
    """What the protobuf runtime reads of a check request; None: it is not about HTTP. Raises DecodeError."""
    attributes = ext_authz_pb2.CheckRequest.FromString(data).attributes
    if not attributes.request.HasField("http"):
        return None
    http = attributes.request.http
    headers = dict(http.headers)
    if not headers:
        for header in http.header_map.headers:
            value = header.value or header.raw_value.decode(errors="replace")
            name = header.key.lower()
            headers[name] = f"{headers[name]},{value}" if name in headers else value
    return RequestAttributes(
        method=http.method,
        host=http.host,
        path=http.path,
        peer_address=attributes.source.address.socket_address.address or None,
        external_address=headers.get("x-envoy-external-address"),
        headers={name: headers[name] for name in TENANT_HEADERS if name in headers},
        request_id=headers.get("x-request-id", ""),
    )


strange_numbers = st.integers(14, 5000)
strange_fields = st.one_of(
    st.builds(lambda number, value: varint(number << 3) + varint(value), strange_numbers, st.integers(0, 1 << 63)),
    st.builds(lambda number, value: varint(number << 3 | 1) + bytes(value), strange_numbers, st.just(8)),
    st.builds(lambda number, value: varint(number << 3 | 5) + bytes(value), strange_numbers, st.just(4)),
    # A number that is known, of another type than it has.
    st.builds(lambda number, value: varint(number << 3) + varint(value), st.integers(1, 5), st.integers(0, 300)),
    st.builds(delimited, strange_numbers, st.binary(max_size=200)),
)
longer = st.sampled_from([0, 0, 0, 0, 0, 0, 1, 2])


@st.composite
def parts(draw: st.DrawFn, known: dict[int, st.SearchStrategy[bytes]], least: int = 1, most: int = 2) -> bytes:
    """A message with some fields of each known number, and now and then a strange one, in any order."""
    fields = [
        delimited(number, draw(contents), draw(longer))
        for number, contents in known.items()
        for _ in range(draw(st.integers(least, most)))
    ]
    fields += draw(st.lists(strange_fields, max_size=1))
    return b"".join(draw(st.permutations(fields)))


def entry(*fields: bytes) -> st.SearchStrategy[bytes]:
    return st.just(b"".join(fields))


encoded_texts = texts.map(str.encode)
encoded_names = header_names.map(str.encode) | st.sampled_from([b"n" * 127, b"n" * 128, b"n" * 300])
encoded_values = (values | st.text("v", min_size=100, max_size=300)).map(str.encode)
plain_entries = st.builds(lambda name, value: delimited(1, name) + delimited(2, value), encoded_names, encoded_values)
odd_entries = st.one_of(
    st.builds(
        lambda name, value, more: delimited(1, name, more) + delimited(2, value, more),
        encoded_names,
        encoded_values,
        longer,
    ),
    st.builds(lambda name, value: delimited(2, value) + delimited(1, name), encoded_names, encoded_values),
    entry(),
    entry(delimited(1, b"x-account")),
    entry(delimited(2, b"acme")),
    entry(delimited(2, b"a"), delimited(2, b"b"), delimited(1, b"x-account")),
    entry(delimited(1, b"x-accounts"), delimited(1, b"x-account"), delimited(2, b"c")),
    entry(delimited(1, b"x-accounts"), delimited(2, b"d"), delimited(1, b"x-account")),
    entry(delimited(1, b"x-account"), delimited(2, b"e"), delimited(1, b"x-accounts")),
)
listed_headers = st.builds(
    lambda name, number, value: delimited(1, name) + delimited(number, value),
    encoded_names,
    st.sampled_from([2, 3]),
    encoded_values,
)
http_fields = {2: encoded_texts, 4: encoded_texts, 5: encoded_texts}
http_messages = st.one_of(
    parts({**http_fields, 3: plain_entries | odd_entries}, most=4),
    parts({**http_fields, 13: parts({1: listed_headers}, most=3)}, least=0),
    parts({**http_fields, 3: plain_entries, 13: parts({1: listed_headers})}, least=0),
)
peer_messages = parts({1: parts({1: parts({2: encoded_texts})})}, least=0)
attribute_contexts = parts(
    {1: peer_messages, 2: st.binary(max_size=50), 4: parts({1: st.just(b""), 2: http_messages}, least=0)}
)


@settings(max_examples=300, deadline=None)
@given(parts({1: attribute_contexts}))
def test_reads_what_the_protobuf_runtime_reads(data: bytes) -> None:
    """Fields in any order, repeated, in parts, of unknown numbers and types, with numbers longer than need be."""
    expected = decoded(data)
    if expected is None:
        with pytest.raises(BadCheckRequestError):
            READER.read(data)
    else:
        assert READER.read(data) == expected


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(varint(1 << 3 | 2, 5) + b"\0", id="tag of six bytes"),
        pytest.param(varint(1 << 3 | 2) + varint(0, 5), id="length of six bytes"),
        pytest.param(varint(9 << 3) + varint(1, 10), id="number of eleven bytes"),
        pytest.param(varint(1 << 32 | 2) + b"\0", id="field number beyond 29 bits"),
        pytest.param(varint(2) + b"\0", id="field number 0"),
        pytest.param(varint(1 << 3 | 2) + varint((1 << 64) + 2) + b"\0\0", id="length beyond 64 bits"),
    ],
)
@pytest.mark.parametrize("depth", range(4))
def test_refuses_numbers_that_are_none(data: bytes, depth: int) -> None:
    """In each of the messages that lie within each other."""
    good = check_request(http_request())
    for number in (2, 4, 1)[3 - depth :]:
        data = delimited(number, data)
    assert READER.read(good + delimited(1, b"")) == READER.read(good)
    with pytest.raises(BadCheckRequestError):
        READER.read(good + data)


@pytest.mark.parametrize("length_bytes", [1, 2])
def test_a_second_key_of_an_entry_counts_however_the_value_before_it_is_written(length_bytes: int) -> None:
    """Written in two bytes, the length of the first value begins with 133, which is what is left of the entry."""
    value = b"\x12" + varint(5, length_bytes - 1) + b"value"
    entry = delimited(1, b"a") + value + delimited(1, b"x-account") + delimited(2, b"f" * 114)
    data = delimited(1, delimited(4, delimited(2, delimited(3, entry))))
    assert READER.read(data) == decoded(data)
    assert READER.read(data).headers == {"x-account": "f" * 114}


def test_parts_of_a_message_are_messages() -> None:
    """A peer, and a list of headers, that are cut within a field, are none."""
    header_map = delimited(1, delimited(1, b"x-account") + delimited(3, b"acme"))
    peer = delimited(1, delimited(1, delimited(2, b"192.0.2.7")))
    for wrap, whole in (
        (lambda part: delimited(4, delimited(2, delimited(13, part))), header_map),
        (lambda part: delimited(1, part), peer),
    ):
        http = delimited(4, delimited(2, delimited(4, b"/")))
        READER.read(delimited(1, http + wrap(whole)))
        with pytest.raises(BadCheckRequestError):
            READER.read(delimited(1, http + wrap(whole[:5]) + wrap(whole[5:])))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=4), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(noise: bytes, damage: bytes, position: int) -> None:
    """Noise alone, within a message, and instead of some of its bytes: BadCheckRequestError, or what upb reads of it.

    Where upb refuses it, because of what is stepped over here, the rest is as it was or is not there.
    """
    headers = {"x-envoy-external-address": "203.0.113.7", "x-tenant-id": "acme", "cookie": "a" * 200}
    real = check_request(http_request(headers=headers))
    damaged = real[:position] + damage + real[position + len(damage) :]
    for data in (noise, real[:position] + noise + real[position:], damaged):
        try:
            attributes = READER.read(data)
        except BadCheckRequestError:
            continue
        try:
            expected = decoded(data)
        except DecodeError:
            said = [attributes.external_address, *attributes.headers.values()]
            assert all(value is None or value in headers.values() for value in said)
        else:
            assert attributes == expected
