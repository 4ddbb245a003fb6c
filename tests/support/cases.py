"""Random policies and requests with the structure that breaks decisions, and what turns them into policy records.

Everything follows from a seed. A policy comes with many requests, since building a policy costs more than deciding.
"""

import importlib
import ipaddress
import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from support.oracle import (
    Answer,
    IPNetwork,
    Oracle,
    Outcome,
    PlainEntry,
    PlainInstance,
    PlainOptions,
    PlainPolicy,
    PlainRequest,
    PlainResource,
    PlainScope,
    PlainTenant,
)

NOW = 1_700_000_000
REQUESTS_PER_POLICY = 200

TENANTS = ("acme", "globex", "initech", "umbrella", "hooli")
STRANGERS = ("stranger", "a", "0.x_y-z", "n" * 63, "void")
BAD_TENANTS = ("ACME", "", "-acme", "acme!", "n" * 64, "acme evil", "\u0430cme", "acme\0", "..")
INSTANCES = ("queue-1", "queue-2", "queue-3", "queue-4")
NAMED_LISTS = ("office", "partners", "feed", "vpn")
SOURCES = (
    "header:x-tenant-id",
    "header:x-other",
    "query:tenant_id",
    "query:Tenant.Key",
    "query:t",
    "host:{tenant}.example.com",
    "path:/t/{tenant}/",
    "path:/{tenant}/api",
    "path:/Acc/{tenant}",
)
PATTERNS = (
    "/",
    "/docs",
    "/docs/internal",
    "/api/*/docs",
    "/t",
    "/x/*",
    "/Caf\u00e9",
    "/.well-known",
    "/*/admin",
    "/admin",
)
HOST_PATTERNS = ("www.example.com", "*.example.com", "[2001:db8::1]", "internal")
NEAR_HOST = "evilexample.com"
HOSTS = (
    "www.example.com",
    "WWW.Example.COM:8443",
    "www.example.com.",
    "example.com",
    ".example.com",
    "a.b.example.com",
    "internal:80",
    "internal:80:80",
    "[2001:db8::1]",
    "[2001:db8::1]:443",
    "",
    ":",
    "evil.test",
    "www.example.com.evil.test",
    "\u212aey.example.com",
    "ACME.Example.com",
)
PLAIN_PATHS = (
    "/",
    "/docs",
    "/docs/",
    "/docs/internal/a",
    "/DOCS/Internal",
    "/docsx",
    "/docs.json",
    "/docs./internal",
    "/docs%20",
    "/api.x/v1/docs",
    "/api/v1/docs.html/x",
    "/api/v1/docs",
    "/api/docs",
    "/api/v1/v2/docs",
    "/api//docs",
    "/t/acme/x",
    "/t/globex",
    "/t/",
    "/T/acme/",
    "/acme/api",
    "/acc/acme",
    "/ACC/HOOLI",
    "/hooli/api/docs",
    "/x/y",
    "/x/",
    "/other",
    "/Caf\u00e9/x",
    "/caf%C3%A9",
    "/.well-known/x",
    "/a/admin",
)
ODD_PATHS = (
    "//docs",
    "/a/../do%63s/x%2f..%2f..%2f..",
    "/%61pi/v1%2fx/docs",
    "//x/docs",
    "///x/a/../docs",
    "\\\\x\\docs",
    "//x//docs/a",
    "/adm\u0131n/x",
    "/ADM%C4%B0N",
    "///docs//internal",
    "/./docs",
    "/a/../docs",
    "/docs/../a",
    "/../../docs",
    "/docs;x=1",
    "/docs;x=1/internal",
    "/;/docs",
    "/a/..;/docs",
    "/%64ocs",
    "/%2564ocs",
    "/%252564ocs",
    "/x%2f..%2fdocs",
    "/x%2F..%2Fdocs",
    "/x%252f..%252fdocs",
    "/docs%2finternal",
    "/docs%252finternal",
    "/a%5c..%5cdocs",
    "\\docs",
    "/a\\..\\docs",
    "/docs\\internal",
    "/docs%3fa",
    "/docs%23a",
    "/docs#a",
    "/docs%3bx",
    "/docs%00",
    "/%2e%2e/docs",
    "/%252e%252e/docs",
    "/a/%2e%2e%2fdocs",
    "/Caf%c3%A9",
    "/Caf%25c3%25a9",
    "/Caf%C3%25A9",
    "/caf\u00c9",
    "/%ff%fe/docs",
    "/docs/%",
    "/docs%2",
    "/%zz",
    "/t/acme;v=2/x",
    "/t/acme%2f..%2fglobex/",
    "/t/%61cme/",
    "/t/acme/../globex/",
    "/t//acme",
    "/t/%2e%2e/hooli/api",
    "/t/.",
    "/api/%2e/v1/../docs",
    "/x/y%2fz",
    "/a%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "/a%5cb%2f..%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "/a\\b%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "/a%2f..%2fdo%2563s%2f%2f..%2f%252e%252e%2f..%2fx",
    "/a%5c..%5cdo%2563s%5c%252e%252e%5c..%5cx",
    "/do%2563s/../x",
    "/a/../docs//../x",
    "/a/../x/",
    "/a%2f%2f..%2fdo%2563s%2f%252e%252e%2f..%2fx",
    "/x%3ftenant_id=acme",
    "/x%253ftenant_id=globex",
    "/x%3Fa%26TENANT%2ekey=hooli",
    "/ac%43/acme",
)
PIECES = (
    *("/", "//", "\\", "%2f", "%2F", "%252f", "%5c", "%255C", ".", "..", "%2e", "%2E%2e", "%252e", ";", ";a=b", "%3b"),
    *("%253B", "#", "%23", "%3f", "%253f", "%25", "%", "docs", "%64ocs", "internal", "DOCS", "api", "v1", "t", "acme"),
    *(
        "globex",
        "x",
        "admin",
        "Caf\u00e9",
        "%C3%A9",
        "\u0130",
        "%ff",
        "%00",
        "*",
        "{tenant}",
        "/..;/",
        "/../",
        "/t/acme",
    ),
)
LONG_PATHS = ("/" + "a" * 8191, "/" + "a" * 8192, "/docs/" + "a/" * 4096, "/docs/" + "b" * 8186)
LONG_ODD_PATHS = (
    *("/%61" + "a" * 2044, "/%61" + "a" * 2045, "/docs;" + "b" * 2042, "/docs;" + "b" * 2043),
    *("/%2561" + "a" * 506, "/%2561" + "a" * 507),
)
LONG_QUERIES = ("t=acme&" + "a" * 16377, "t=acme&" + "a" * 16378, "&" * 999 + "a" * 15385, "t=hooli&" * 2048)
BAD_ADDRESSES = (
    *("", " ", "203.0.113.7 ", "203.0.113.7,10.0.0.1", "203.0.113.7:443", "[2001:db8::1]", "fe80::1%eth0", "10.1", "1"),
    *("010.0.0.1", "10.0.0.256", "0x0a000001", "10.0.0.1/32", "::1::", "2001:db8::g", "\u0661.2.3.4", "10.0.0.1\0"),
    *("unknown", "\ud800", "::ffff:10.0.0.256", "1:2:3:4:5:6:7", "12345::", "localhost"),
)
SPELLINGS: dict[int, tuple[Callable[[Any], str], ...]] = {
    4: (
        *(str,) * 4,
        lambda address: f"::ffff:{address}",
        lambda address: "::FFFF:{:x}:{:x}".format(*divmod(int(address), 65536)),
        lambda address: f"0:0:0:0:0:ffff:{address}",
    ),
    6: (*(str,) * 2, lambda address: address.exploded, lambda address: address.exploded.upper()),
}
"""IP version -> the ways to spell an address of it."""


class PolicyRoom:
    """The decision, as a package of any name: the real one, or a copy with a fault in it."""

    def __init__(self, package: str = "authz_server.policy") -> None:
        def module(name: str) -> ModuleType:
            return importlib.import_module(f"{package}.{name}")

        self.access = module("access")
        self.addresses = module("addresses")
        self.affinity = module("affinity")
        self.attributes = module("attributes")
        self.decision = module("decision")
        self.paths = module("paths")
        self.records = module("records")
        self.snapshot = module("snapshot")
        self.tenant = module("tenant")

    def build(self, policy: PlainPolicy) -> Any:
        """Build the snapshot of a policy, after one in which the `kept` records could still be read."""
        options = self.options(policy.options)
        before = self.snapshot.build_snapshot(
            [(key, record) for plain_key, key, record in self.records_of(policy) if plain_key in policy.kept],
            epoch="e",
            revision=1,
            options=options,
        )
        unreadable = self.records.Unreadable
        return self.snapshot.build_snapshot(
            [
                (key, unreadable(f"{key} is spoilt") if plain_key in policy.unreadable else record)
                for plain_key, key, record in self.records_of(policy)
            ],
            epoch="e",
            revision=2,
            options=options,
            last_good=before,
        )

    def options(self, options: PlainOptions) -> Any:
        module = self.snapshot
        return module.DecisionOptions(
            trusted_peers=tuple(self.addresses.parse_network(text) for text in options.trusted_peers),
            missing_client_address=module.MissingClientAddress(options.missing_client_address),
            tenant_sources=tuple(self.tenant.parse_tenant_source(text) for text in options.tenant_sources),
            unknown_tenant=module.UnknownTenant(options.unknown_tenant),
            missing_tenant=module.MissingTenant(options.missing_tenant),
            fold_path_case=options.fold_path_case,
        )

    def records_of(self, policy: PlainPolicy) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
        """Yield (plain key, key, record)."""
        access, affinity = self.access, self.affinity
        for name in policy.lists:
            yield self._named("list", access.NamedList(name))
        for entry in policy.entries:
            record = access.Entry(
                self.addresses.parse_network(entry.cidr), "why", "who", NOW - 5000, expires_at=entry.expires_at
            )
            plain_key = ("entry", entry.cidr, entry.list_name)
            yield plain_key, self.records.entry_key(entry.list_name, record), record
        for scope in policy.scopes:
            mode = access.Mode.RESTRICTED if scope.restricted else access.Mode.OPEN
            enforcement = access.Enforcement.SHADOW if scope.shadow else access.Enforcement.ENFORCE
            yield self._named(
                "scope", access.Scope(scope.name, mode, enforcement, scope.allow_lists, scope.block_lists)
            )
        for resource in policy.resources:
            paths = tuple(self.paths.parse_path_pattern(text) for text in resource.paths)
            yield self._named("resource", access.Resource(resource.name, paths, resource.hosts))
        for tenant in policy.tenants:
            record = affinity.Tenant(tenant.name, tenant.instance, tenant.held)
            yield ("tenant", tenant.name), self.records.record_key(record), record
        for instance in policy.instances:
            state = affinity.InstanceState(instance.state)
            yield self._named("instance", affinity.Instance(instance.name, instance.weight, state))

    def answer(self, request: PlainRequest, snapshot: Any, now: float) -> Answer:
        """Decide, and say the decision in words and numbers."""
        decision = self.decision.decide(self.attributes.RequestAttributes(*request), snapshot, now)
        address = decision.client_address
        allowed = isinstance(decision, self.decision.Allowed)
        return Answer(
            str(decision.reason),
            (address.version, address.value) if address else None,
            decision.tenant,
            decision.instance if allowed else None,
            str(decision.affinity) if allowed else "none",
            tuple(_outcome(outcome) for outcome in decision.scopes),
            _outcome(decision.deciding) if decision.deciding else None,
            tuple(_outcome(outcome) for outcome in decision.shadow_denials),
        )

    def _named(self, kind: str, record: Any) -> tuple[tuple[str, ...], Any, Any]:
        return (kind, record.name), self.records.record_key(record), record


def _outcome(outcome: Any) -> Outcome:
    match = outcome.match
    return Outcome(
        outcome.scope,
        str(outcome.enforcement),
        str(outcome.reason),
        match.list_name if match else None,
        (match.network.version, match.network.first, match.network.prefix_length) if match else None,
    )


Case = tuple[PlainPolicy, list[tuple[PlainRequest, float, Answer]]]
"""A policy, and requests with their times and the oracle's answers."""


def cases(seed: int, policies: range, per_policy: int = REQUESTS_PER_POLICY) -> Iterator[Case]:
    """Yield policies, each with as many requests, the same ones for the same seed and number."""
    for number in policies:
        maker = CaseMaker(random.Random(f"{seed}/{number}"))
        oracle = Oracle(maker.policy)
        questions = [(maker.request(), maker.now()) for _ in range(per_policy)]
        yield maker.policy, [(request, now, oracle.decide(request, now)) for request, now in questions]


class CaseMaker:
    """Makes one policy, and requests for it."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.networks = self._nested_networks()
        self.addresses = self._boundaries()
        self.policy = self._policy()
        self.paths = [
            *rng.sample(PLAIN_PATHS, 8),
            *rng.sample(ODD_PATHS, 16),
            *(self._made_up_path() for _ in range(4)),
        ]
        self.hosts = [NEAR_HOST, *rng.sample(HOSTS, 4), *(f"{self._tenant()}.example.com" for _ in range(3))]

    def now(self) -> float:
        return self.rng.choice((NOW - 1, NOW - 0.5, NOW, NOW, NOW + 0.5, NOW + 1))

    def request(self) -> PlainRequest:
        rng = self.rng
        path = rng.choice(self.paths)
        method, host = "GET", rng.choice(self.hosts)
        luck = rng.random()
        if luck < 0.01:
            method = ""
        elif luck < 0.02:
            path = rng.choice(("", "docs", "http://www.example.com/docs", "%2fdocs", "\u2215docs", "?/"))
        elif luck < 0.04:
            path = rng.choice((*LONG_PATHS, *LONG_ODD_PATHS))
        elif luck < 0.05:
            path = "*"
        headers = {}
        for name in ("x-tenant-id", "x-other"):
            if rng.random() < 0.3:
                headers[name] = self._header_value()
        if rng.random() < 0.4:
            path += "?" + self._query()
        elif rng.random() < 0.01:
            path += "?" + rng.choice(LONG_QUERIES)
        return PlainRequest(method, host, path, self._peer(), self._external(), headers)

    def _nested_networks(self) -> list[IPNetwork]:
        """Make chains of networks, each inside the one before, with a neighbour beside some."""
        rng, networks = self.rng, []
        for lengths, bits in (
            ((8, 9, 16, 22, 24, 30, 31, 32), 32),
            ((4, 12, 20, 24, 25, 28, 32), 32),
            ((16, 32, 48, 56, 64, 120, 127, 128), 128),
        ):
            family = ipaddress.IPv4Network if bits == 32 else ipaddress.IPv6Network
            value = rng.getrandbits(bits)
            if bits == 128:
                value = (0x2001 << 112) | (value & ((1 << 112) - 1))
            for length in sorted(rng.sample(lengths, rng.randint(4, 6))):
                host_bits = bits - length
                networks.append(family((value >> host_bits << host_bits, length)))
                if rng.random() < 0.25:
                    networks.append(family(((value >> host_bits ^ 1) << host_bits, length)))
        if rng.random() < 0.3:
            networks.append(ipaddress.IPv4Network("0.0.0.0/0"))
        if rng.random() < 0.3:
            networks.append(ipaddress.IPv6Network("::/0"))
        return networks

    def _boundaries(self) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        """Return the first and last address of every network, their neighbours, and one within."""
        addresses = []
        for network in self.networks:
            first, last = int(network.network_address), int(network.broadcast_address)
            for value in (first - 1, first, self.rng.randint(first, last), last, last + 1):
                if 0 <= value < 1 << network.max_prefixlen:
                    addresses.append(type(network.network_address)(value))
        return addresses

    def _policy(self) -> PlainPolicy:
        rng = self.rng
        policy = PlainPolicy(self._options())
        policy.lists = [name for name in NAMED_LISTS if rng.random() < 0.9]
        resources = rng.sample(PATTERNS, rng.choice((0, 1, 2, 3)))
        for number, pattern in enumerate(resources):
            paths = (pattern, *(rng.sample(PATTERNS[1:], 1) if rng.random() < 0.3 else ()))
            hosts = tuple(rng.sample(HOST_PATTERNS, rng.randint(1, 2))) if rng.random() < 0.3 else ()
            policy.resources.append(PlainResource(f"r{number}", paths, hosts))
        scope_names = ["global", *(f"tenant:{name}" for name in rng.sample((*TENANTS, "stranger"), 4))]
        scope_names += [f"resource:r{number}" for number in range(len(resources))]
        for name in scope_names:
            if rng.random() < 0.8:
                policy.scopes.append(
                    PlainScope(
                        name,
                        restricted=rng.random() < 0.25,
                        shadow=rng.random() < 0.3,
                        allow_lists=tuple(rng.sample(NAMED_LISTS, rng.choice((0, 0, 1, 2)))),
                        block_lists=tuple(rng.sample(NAMED_LISTS, rng.choice((0, 0, 0, 1)))),
                    )
                )
        own_lists = [f"{scope}/{side}" for scope in scope_names for side in ("allow", "block")]
        list_names = [*NAMED_LISTS, *(name for name in own_lists if rng.random() < 0.7)]  # the others stay empty
        for network in self.networks:
            for list_name in rng.sample(list_names, rng.choice((0, 1, 2, 3, 5))):
                policy.entries.append(PlainEntry(list_name, self._cidr(network), self._expiry()))
        pins = (*INSTANCES, "gone")
        policy.tenants = [
            PlainTenant(name, rng.choice(pins), held=rng.random() < 0.2) for name in TENANTS if rng.random() < 0.8
        ]
        policy.instances = [
            PlainInstance(name, rng.choice((1, 1, 2, 3, 100)), rng.choice(("active", "active", "draining", "down")))
            for name in INSTANCES
            if rng.random() < rng.choice((0.2, 0.8))
        ]
        self._spoil(policy)
        return policy

    def _spoil(self, policy: PlainPolicy) -> None:
        """Make some records unreadable, half of them with a last good value."""
        keys: list[tuple[str, ...]] = [("list", name) for name in policy.lists]
        keys += [("entry", entry.cidr, entry.list_name) for entry in policy.entries]
        keys += [("scope", scope.name) for scope in policy.scopes]
        keys += [("resource", resource.name) for resource in policy.resources]
        keys += [("tenant", tenant.name) for tenant in policy.tenants]
        keys += [("instance", instance.name) for instance in policy.instances]
        for key in keys:
            if self.rng.random() < (0.35 if key[0] == "tenant" else 0.04):
                policy.unreadable.add(key)
                if self.rng.random() < 0.5:
                    policy.kept.add(key)

    def _options(self) -> PlainOptions:
        rng = self.rng
        trusted = []
        if rng.random() < 0.3:
            trusted = [self._cidr(network) for network in rng.sample(self.networks, 2)] + ["10.0.0.0/8"]
        return PlainOptions(
            trusted_peers=tuple(trusted),
            missing_client_address=rng.choice(("deny", "peer")),
            tenant_sources=tuple(rng.sample(SOURCES, rng.choice((0, 1, 1, 2, 2, 3, 4)))),
            unknown_tenant=rng.choice(("none", "hash", "hash", "deny")),
            missing_tenant=rng.choice(("allow", "allow", "allow", "deny")),
            fold_path_case=rng.random() < 0.7,
        )

    def _cidr(self, network: IPNetwork) -> str:
        """Spell a network: as CIDR, a bare address, or IPv4 in IPv6 clothes."""
        luck = self.rng.random()
        if network.version == 4 and network.prefixlen > 0 and luck < 0.1:
            return f"::ffff:{network.network_address}/{network.prefixlen + 96}"
        if network.prefixlen == network.max_prefixlen and luck < 0.5:
            return str(network.network_address)
        return str(network)

    def _expiry(self) -> int | None:
        return self.rng.choice((None, None, None, NOW - 1000, NOW - 1, NOW, NOW, NOW + 1, NOW + 1000))

    def _address(self) -> str:
        """Spell an address of interest in one of its ways."""
        address = self.rng.choice(self.addresses)
        return self.rng.choice(SPELLINGS[address.version])(address)

    def _external(self) -> str | None:
        luck = self.rng.random()
        if luck < 0.03:
            return None
        return self.rng.choice(BAD_ADDRESSES) if luck < 0.06 else self._address()

    def _peer(self) -> str | None:
        luck = self.rng.random()
        if luck < 0.03:
            return None
        if luck < 0.05:
            return self.rng.choice(BAD_ADDRESSES)
        return self._address() if luck < 0.6 else self.rng.choice(("10.0.0.7", "::ffff:10.255.255.255", "11.0.0.0"))

    def _tenant(self) -> str:
        rng = self.rng
        return rng.choice(rng.choice((TENANTS, TENANTS, TENANTS, STRANGERS, STRANGERS, BAD_TENANTS)))

    def _header_value(self) -> str:
        luck, tenant = self.rng.random(), self._tenant()
        if luck < 0.8:
            return tenant
        return f"{tenant},{tenant}" if luck < 0.9 else f"{tenant}, \t{self._tenant()}"

    def _query(self) -> str:
        tenant = self._tenant()
        return self.rng.choice(
            (
                "",
                "a=b",
                f"tenant_id={tenant}",
                f"tenant_id={tenant}",
                f"a=b&tenant_id={tenant}&c",
                f"t={tenant}",
                f"tenant_id={tenant}&t={tenant}",
                f"tenant_id={tenant}&tenant_id={self._tenant()}",
                f"a=b;tenant_id={tenant}",
                f"tenant_id={tenant};tenant_id={self._tenant()}",
                "tenant_id",
                f"ten%61nt%5fid={tenant}",
                f"tenant_id=%61cme&t={tenant}",
                "tenant_id=+acme",
                f"tenant_id=x?tenant_id={tenant}",
                f"tenant_id=%ff&tenant_id=%fe{tenant}",
                f"?t={tenant}",
                f"TENANT_ID={tenant}",
                f"tenant_id={tenant}&Tenant_Id={self._tenant()}",
                f"tenant.id={tenant}&T={tenant}",
                f"a&tenant%2Eid={tenant};b",
                f"+tenant+id={tenant}",
                f"tenant[id={tenant}",
                f"tenant_id%5B%5d={tenant}&tenant_id={self._tenant()}",
                f"t[]={tenant}",
                f"[t]={tenant}",
                f"x[tenant_id]={tenant}&tenant_id_=a&xt=b",
                f"%2574enant%255fid={tenant}",
                f"%25252574={tenant}&tenant_id%26={tenant}",
                f"tenant_\u212aEY={tenant}",
                f"tenant_id={tenant}&tenant.key={tenant}&tenant_Key[a][b]={tenant}",
            )
        )

    def _made_up_path(self) -> str:
        rng = self.rng
        return "/" + "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 7))).replace("?", "")
