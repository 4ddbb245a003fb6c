"""A request reaches the instance that the decision names, and no header that a client sends says otherwise."""

from collections.abc import Iterator

import pytest
from support.gateway import TENANT_HEADER_SOURCE, AuthzServer, Headers, ask, policy

from authz_server.demo.envoy import Envoy
from authz_server.demo.envoy_config import Address, GatewayOptions, gateway_config
from authz_server.demo.processes import free_port
from authz_server.demo.upstreams import Arrival, Upstreams
from authz_server.policy.reasons import Reason
from authz_server.policy.snapshot import DecisionOptions, Snapshot, UnknownTenant
from authz_server.policy.tenant import parse_tenant_source

pytestmark = pytest.mark.integration

INSTANCES = ("queue-1", "queue-2", "queue-3")
CLIENT = "127.0.0.5"
BLOCKED_CLIENT = "127.0.0.6"
PINS = {"acme": "queue-1", "globex": "queue-2", "initech": "queue-9", "hooli": "queue-3"}
ALL_SOURCES = tuple(
    parse_tenant_source(text)
    for text in ("header:x-tenant-id", "query:tenant_id", "host:{tenant}.example.test", "path:/t/{tenant}/")
)
HASHED = DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE, unknown_tenant=UnknownTenant.HASH)


def tenants(options: DecisionOptions | None = None, *, instances: tuple[str, ...] = INSTANCES) -> Snapshot:
    """acme, globex and hooli at queue-1, -2 and -3; initech at queue-9, which is not registered by default."""
    return policy(
        blocked=[f"{BLOCKED_CLIENT}/32"],
        pins=PINS,
        held=["hooli"],
        instances=instances,
        options=options or DecisionOptions(tenant_sources=ALL_SOURCES),
    )


@pytest.fixture(scope="module")
def running_server() -> Iterator[AuthzServer]:
    with AuthzServer(tenants()) as running:
        yield running
        assert running.faults == []


@pytest.fixture
def server(running_server: AuthzServer) -> AuthzServer:
    """The server, with the tenants above."""
    running_server.snapshot = tenants()
    running_server.clear()
    return running_server


@pytest.fixture(scope="module")
def gateway(running_server: AuthzServer, running_upstreams: Upstreams) -> Iterator[Address]:
    options = GatewayOptions(
        authz=running_server.address,
        instances=running_upstreams.addresses,
        failure_mode_allow=True,
        timeout_seconds=5.0,
        exempt_paths=("/healthz",),
    )
    with Envoy(gateway_config(options)) as envoy:
        yield envoy.address


@pytest.fixture(scope="module")
def gateway_without_server(running_upstreams: Upstreams) -> Iterator[Address]:
    options = GatewayOptions(
        authz=("127.0.0.1", free_port()), instances=running_upstreams.addresses, failure_mode_allow=True
    )
    with Envoy(gateway_config(options)) as envoy:
        yield envoy.address


def names(arrival: Arrival) -> list[str]:
    """The headers of an arrival that a backend might take for one of ours."""
    return sorted(f"{name}={value}" for name, value in arrival.headers if name.replace("_", "-").startswith("x-tenant"))


FORGERIES: dict[str, Headers] = {
    "none": (),
    "once": (("x-tenant-instance", "queue-3"),),
    "twice": (("x-tenant-instance", "queue-3"), ("x-tenant-instance", "queue-2")),
    "mixed_case": (("X-Tenant-Instance", "queue-3"), ("x-TENANT-instance", "queue-2")),
    "empty": (("x-tenant-instance", ""),),
    "list": (("x-tenant-instance", "queue-1, queue-3"),),
    "same_as_ours_twice": (("x-tenant-instance", "queue-1"), ("x-tenant-instance", "queue-1")),
    "no_such_instance": (("x-tenant-instance", "queue-99"),),
    "not_utf_8": (("x-tenant-instance", "queue-3\xff"),),
    "hop_by_hop": (("x-tenant-instance", "queue-3"), ("Connection", "x-tenant-instance, keep-alive")),
    "upgrade": (
        ("x-tenant-instance", "queue-3"),
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade, x-tenant-instance, x-tenant-id"),
    ),
}
forgeries = pytest.mark.parametrize("forged", FORGERIES.values(), ids=FORGERIES.keys())

NAMED: dict[str, tuple[str, str, Headers, str]] = {
    "header": ("/x", "site.test", (("x-tenant-id", "acme"),), "acme"),
    "header_mixed_case": ("/x", "site.test", (("X-TENANT-Id", "globex"),), "globex"),
    "header_twice_the_same": ("/x", "site.test", (("x-tenant-id", "globex"), ("x-tenant-id", "globex")), "globex"),
    "query": ("/x?a=1&tenant_id=globex", "site.test", (), "globex"),
    "query_escaped": ("/x?tenant%5Fid=gl%6Fbex", "site.test", (), "globex"),
    "host": ("/x", "Globex.example.test:8080", (), "globex"),
    "path": ("/t/globex/x", "site.test", (), "globex"),
    "path_with_dot_segments": ("/a/../t/./globex/x", "site.test", (), "globex"),
    "all_agree": ("/t/acme/x?tenant_id=acme", "acme.example.test", (("x-tenant-id", "acme"),), "acme"),
}


@forgeries
@pytest.mark.parametrize(("path", "host", "headers", "tenant"), NAMED.values(), ids=NAMED.keys())
def test_a_pinned_tenant_reaches_its_instance_and_only_that(
    *,
    path: str,
    host: str,
    headers: Headers,
    tenant: str,
    forged: Headers,
    gateway: Address,
    server: AuthzServer,
    upstreams: Upstreams,
) -> None:
    answer = ask(gateway, path, host=host, headers=(*forged, *headers), source=CLIENT)
    assert (answer.status, answer.instance) == (200, PINS[tenant])
    (arrival,) = upstreams.arrivals()
    assert names(arrival) == [f"x-tenant-id={tenant}", f"x-tenant-instance={PINS[tenant]}"]


@forgeries
@pytest.mark.parametrize("tenant", ["nobody-knows-it", None], ids=["unknown_tenant", "no_tenant"])
def test_without_an_instance_the_default_route_takes_it_with_no_routing_header(
    tenant: str | None, forged: Headers, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    headers = [*forged, ("x-tenant-id", tenant)] if tenant else forged
    answers = [ask(gateway, headers=headers, source=CLIENT) for _ in INSTANCES]
    assert [answer.status for answer in answers] == [200] * 3
    assert {answer.instance for answer in answers} == set(INSTANCES), "round robin"
    expected = [f"x-tenant-id={tenant}"] if tenant else []
    assert [names(arrival) for arrival in upstreams.arrivals()] == [expected] * 3


def test_a_tenant_header_that_names_nobody_is_not_passed_on(
    gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    """Where tenants are named by host, a client's x-tenant-id is nobody's word and must not reach a backend."""
    server.snapshot = tenants(DecisionOptions(tenant_sources=(parse_tenant_source("host:{tenant}.example.test"),)))
    assert ask(gateway, headers=[("x-tenant-id", "globex")], source=CLIENT).status == 200
    answer = ask(gateway, host="acme.example.test", headers=[("x-tenant-id", "globex")], source=CLIENT)
    assert answer.instance == "queue-1"
    default, pinned = upstreams.arrivals()
    assert names(default) == []
    assert names(pinned) == ["x-tenant-id=acme", "x-tenant-instance=queue-1"]


@forgeries
def test_an_unknown_tenant_is_hashed_to_one_instance_where_the_setting_says_so(
    forged: Headers, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    server.snapshot = tenants(HASHED)
    for number in range(6):
        tenant = f"new-{number}"
        asked = [ask(gateway, headers=[*forged, ("x-tenant-id", tenant)], source=CLIENT) for _ in range(2)]
        assert asked[0].instance == asked[1].instance
    for arrival in upstreams.arrivals():
        assert f"x-tenant-instance={arrival.instance}" in names(arrival)
        assert len(names(arrival)) == 2
    assert len({arrival.instance for arrival in upstreams.arrivals()}) > 1, "six tenants, and not all on one"


@pytest.mark.parametrize(
    ("path", "host", "headers"),
    [
        pytest.param("/x", "site.test", [("x-tenant-id", "acme"), ("x-tenant-id", "globex")], id="header_twice"),
        pytest.param("/x", "site.test", [("x-tenant-id", "acme, globex")], id="header_list"),
        pytest.param("/x", "site.test", [("x-tenant-id", "acme"), ("X-Tenant-ID", "")], id="header_and_empty"),
        pytest.param("/x?tenant_id=globex", "site.test", [("x-tenant-id", "acme")], id="header_and_query"),
        pytest.param("/x?tenant_id=acme&tenant_id=globex", "site.test", [], id="query_twice"),
        pytest.param("/x?tenant_id=acme;tenant_id=globex", "site.test", [], id="query_semicolon"),
        pytest.param("/x", "globex.example.test", [("x-tenant-id", "acme")], id="header_and_host"),
        pytest.param("/t/globex/x", "site.test", [("x-tenant-id", "acme")], id="header_and_path"),
        pytest.param("//t/globex/x", "site.test", [("x-tenant-id", "acme")], id="header_and_path_double_slash"),
        pytest.param("/t%2fglobex/x", "site.test", [("x-tenant-id", "acme")], id="header_and_path_encoded_slash"),
        pytest.param("/t/acme%2f..%2fglobex/x", "site.test", [], id="path_read_in_two_ways"),
        pytest.param("/t/acme/x", "globex.example.test", [], id="host_and_path"),
    ],
)
def test_two_tenants_that_disagree_are_denied(
    *, path: str, host: str, headers: Headers, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    assert ask(gateway, path, host=host, headers=headers, source=CLIENT).status == 403
    (checked,) = server.checked()
    assert checked.decision.reason is Reason.AMBIGUOUS_TENANT
    assert upstreams.arrivals() == []


@pytest.mark.parametrize("name", ["x_tenant_instance", "X_TENANT_INSTANCE", "x-tenant_instance", "x_tenant_id", "a_b"])
def test_an_underscore_in_a_header_name_is_a_400_before_any_check(
    name: str, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    headers = [("x-tenant-id", "acme"), (name, "queue-3")]
    for path in ("/x", "/healthz"):
        assert ask(gateway, path, headers=headers, source=CLIENT).status == 400
    assert server.checked() == []
    assert upstreams.arrivals() == []


@forgeries
def test_an_instance_that_the_routes_do_not_know_is_503_and_nobody_elses_request(
    forged: Headers, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    server.snapshot = tenants(instances=(*INSTANCES, "queue-9"))
    answer = ask(gateway, headers=[*forged, ("x-tenant-id", "initech")], source=CLIENT)
    assert (answer.status, answer.body) == (503, b"no route to the tenant's instance\n")
    assert upstreams.arrivals() == []


@forgeries
@pytest.mark.parametrize(
    ("tenant", "source", "status", "reason"),
    [
        ("hooli", CLIENT, 503, Reason.TENANT_HELD),
        ("initech", CLIENT, 503, Reason.UNKNOWN_INSTANCE),
        ("acme", BLOCKED_CLIENT, 403, Reason.BLOCKED),
        ("Acme", CLIENT, 403, Reason.INVALID_TENANT),
    ],
    ids=["held", "unregistered_instance", "blocked", "invalid_tenant"],
)
def test_a_denied_request_arrives_nowhere(
    *,
    forged: Headers,
    tenant: str,
    source: str,
    status: int,
    reason: Reason,
    gateway: Address,
    server: AuthzServer,
    upstreams: Upstreams,
) -> None:
    assert ask(gateway, headers=[*forged, ("x-tenant-id", tenant)], source=source).status == status
    (checked,) = server.checked()
    assert checked.decision.reason is reason
    assert upstreams.arrivals() == []


@forgeries
def test_on_an_exempt_path_a_forged_header_chooses_nothing(
    forged: Headers, gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    answers = [ask(gateway, "/healthz", headers=forged, source=BLOCKED_CLIENT) for _ in INSTANCES]
    assert {answer.instance for answer in answers} == set(INSTANCES), "round robin"
    assert [names(arrival) for arrival in upstreams.arrivals()] == [[]] * 3
    assert server.checked() == []


@pytest.mark.parametrize("path", ["/healthz/", "/HEALTHZ", "/healthz;x", "/healthz%2f", "//healthz", "/x/%2e%2e/x"])
def test_only_the_very_path_is_exempt(path: str, gateway: Address, server: AuthzServer, upstreams: Upstreams) -> None:
    assert ask(gateway, path, source=BLOCKED_CLIENT).status == 403
    assert len(server.checked()) == 1
    assert upstreams.arrivals() == []


@forgeries
def test_without_a_server_and_failing_open_a_forged_header_chooses_nothing(
    forged: Headers, gateway_without_server: Address, upstreams: Upstreams
) -> None:
    answers = [ask(gateway_without_server, headers=forged, source=BLOCKED_CLIENT) for _ in INSTANCES]
    assert {answer.instance for answer in answers} == set(INSTANCES), "round robin"
    assert [names(arrival) for arrival in upstreams.arrivals()] == [[]] * 3


def test_a_tenant_id_named_as_hop_by_hop_is_gone_before_the_check(
    gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    """Else we would decide about a tenant that the instance never hears of."""
    headers = [("x-tenant-id", "acme"), ("Connection", "x-tenant-id")]
    assert ask(gateway, headers=headers, source=CLIENT).status == 200
    (checked,) = server.checked()
    assert checked.decision.tenant is None
    (arrival,) = upstreams.arrivals()
    assert names(arrival) == []


def test_a_moved_tenant_reaches_its_new_instance_with_the_next_request(
    gateway: Address, server: AuthzServer, upstreams: Upstreams
) -> None:
    for instance in ("queue-2", "queue-3", "queue-1"):
        server.snapshot = policy(
            pins={"acme": instance},
            instances=INSTANCES,
            options=DecisionOptions(tenant_sources=TENANT_HEADER_SOURCE),
        )
        assert ask(gateway, headers=[("x-tenant-id", "acme")], source=CLIENT).instance == instance
