"""Names and texts of records: what is written can be read again, and nothing else can."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope
from authz_server.policy.addresses import MAX_PREFIX_LENGTH, Network
from authz_server.policy.affinity import Hold, Instance, InstanceState, Tenant
from authz_server.policy.paths import parse_path_pattern
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable, entry_key, record_key
from authz_server.store.keys import (
    collection,
    decode_record,
    encode_event_records,
    encode_readable,
    encode_record,
    read_event_records,
    record_key_of,
)

identifiers = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
scope_names = st.one_of(st.just("global"), identifiers.map("tenant:{}".format), identifiers.map("resource:{}".format))
list_names = st.one_of(identifiers, st.tuples(scope_names, st.sampled_from(["allow", "block"])).map("/".join))
seconds = st.integers(0, 253_402_300_799)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    version = draw(st.sampled_from([4, 6]))
    bits = MAX_PREFIX_LENGTH[version]
    length = draw(st.integers(0, bits))
    first = draw(st.integers(0, (1 << length) - 1)) << (bits - length)
    if version == 6 and first >> 32 == 0xFFFF:
        first = 0  # IPv4-mapped: no IPv6 network
    return Network(version, first, length)


entries = st.builds(Entry, networks(), texts, texts, seconds, texts, st.none() | seconds)
list_of_names = st.lists(identifiers, max_size=3).map(tuple)
segments = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/%\\;#?*.\0"), min_size=1, max_size=8)
patterns = st.lists(segments | st.just("*"), max_size=4).map(lambda parts: parse_path_pattern("/" + "/".join(parts)))
hosts = st.from_regex(r"(\*\.)?[a-z0-9-]{1,10}(\.[a-z0-9-]{1,10}){0,2}", fullmatch=True)
self_named = st.one_of(
    st.builds(NamedList, identifiers, texts, texts),
    st.builds(Scope, scope_names, st.sampled_from(Mode), st.sampled_from(Enforcement), list_of_names, list_of_names),
    st.builds(Resource, identifiers, st.lists(patterns, min_size=1, max_size=3).map(tuple), st.lists(hosts).map(tuple)),
    st.builds(Tenant, identifiers, identifiers, st.booleans()),
    st.builds(Tenant, identifiers, identifiers, st.just(True), st.builds(Hold, texts, identifiers, seconds, texts)),
    st.builds(Instance, identifiers, st.integers(1, 100), st.sampled_from(InstanceState)),
)
keyed = st.one_of(
    st.tuples(list_names, entries).map(lambda pair: (entry_key(*pair), pair[1])),
    self_named.map(lambda record: (record_key(record), record)),
)


@given(keyed)
def test_every_record_survives_writing_and_reading(item: tuple[RecordKey, Record]) -> None:
    key, record = item
    text = encode_readable(key, record)
    assert decode_record(key, text) == record
    assert record_key_of(collection(key), key.name) == key
    assert text == json.dumps(json.loads(text), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


@given(
    keyed,
    st.text(max_size=40)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ).map(json.dumps),
)
def test_reading_any_text_gives_a_record_or_says_why_not(item: tuple[RecordKey, Record], text: str) -> None:
    read = decode_record(item[0], text)
    if isinstance(read, Unreadable):
        assert str(item[0]) in read.problem
        read.problem.encode()
    else:
        assert decode_record(item[0], encode_record(read)) == read


@given(keyed)
def test_a_field_that_this_version_does_not_know_makes_a_record_unreadable(item: tuple[RecordKey, Record]) -> None:
    key, record = item
    fields = json.loads(encode_record(record)) | {"since_version_2": None}
    assert isinstance(decode_record(key, json.dumps(fields)), Unreadable)


ENTRY = RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "office")
GOOD_ENTRY = {"reason": "r", "author": "a", "created_at": 1}
SCOPE = RecordKey(RecordKind.SCOPE, "global")
GOOD_SCOPE = {"mode": "open", "enforcement": "enforce"}
RESOURCE = RecordKey(RecordKind.RESOURCE, "docs")
TENANT = RecordKey(RecordKind.TENANT, "acme")
INSTANCE = RecordKey(RecordKind.INSTANCE, "q1")
LIST = RecordKey(RecordKind.LIST, "office")

BROKEN: dict[str, tuple[RecordKey, Any, str]] = {
    "no JSON": (LIST, "hello", "'hello' is not JSON"),
    "cut off": (LIST, '{"owner":"a', "is not JSON"),
    "empty": (LIST, "", "is not JSON"),
    "deep": (LIST, "[" * 100_000, "is not JSON"),
    "long number": (INSTANCE, '{"weight":' + "9" * 5000 + "}", "is not JSON"),
    "not an object": (LIST, "[]", "'[]' is not a JSON object"),
    "null": (LIST, "null", "is not a JSON object"),
    "a field twice": (TENANT, '{"instance":"q1","instance":"q2"}', "a field twice"),
    "unknown field": (LIST, {"colour": "red"}, "unknown fields: 'colour'"),
    "list: owner a number": (LIST, {"owner": 1}, "'owner': 1 is not text"),
    "list: half a surrogate pair": (LIST, '{"owner":"\\ud800"}', "is not Unicode text"),
    "list: name": (RecordKey(RecordKind.LIST, "Office"), {}, "'Office' is not a name for a list"),
    "entry: no reason": (ENTRY, {"author": "a", "created_at": 1}, "'reason' is missing"),
    "entry: null reason": (ENTRY, GOOD_ENTRY | {"reason": None}, "'reason': None is not text"),
    "entry: created as text": (ENTRY, GOOD_ENTRY | {"created_at": "1"}, "'1' is not a whole number"),
    "entry: created as fraction": (ENTRY, GOOD_ENTRY | {"created_at": 1.5}, "1.5 is not a whole number"),
    "entry: created in the far future": (ENTRY, GOOD_ENTRY | {"created_at": 1_700_000_000_000}, "whole number"),
    "entry: expires before time began": (ENTRY, GOOD_ENTRY | {"expires_at": -1}, "-1 is not a whole number"),
    "entry: expires true": (ENTRY, GOOD_ENTRY | {"expires_at": True}, "True is not a whole number"),
    "entry: expires null": (ENTRY, GOOD_ENTRY | {"expires_at": None}, "None is not a whole number"),
    "entry: host bits": (RecordKey(RecordKind.ENTRY, "10.0.0.1/8", "office"), GOOD_ENTRY, "write 10.0.0.0/8"),
    "entry: bare address": (RecordKey(RecordKind.ENTRY, "10.0.0.1", "office"), GOOD_ENTRY, "spelled '10.0.0.1/32'"),
    "entry: long spelling": (RecordKey(RecordKind.ENTRY, "2001:DB8:0::/48", "office"), GOOD_ENTRY, "'2001:db8::/48'"),
    "entry: mapped": (RecordKey(RecordKind.ENTRY, "::ffff:10.0.0.0/104", "office"), GOOD_ENTRY, "'10.0.0.0/8'"),
    "entry: no network": (RecordKey(RecordKind.ENTRY, "home", "office"), GOOD_ENTRY, "'home' is not a CIDR"),
    "entry: list": (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "The Office"), GOOD_ENTRY, "'The Office'"),
    "entry: own list of nothing": (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "x/allow"), GOOD_ENTRY, "not a scope"),
    "entry: own list, side": (RecordKey(RecordKind.ENTRY, "10.0.0.0/8", "global/deny"), GOOD_ENTRY, "/allow or /block"),
    "scope: mode": (SCOPE, GOOD_SCOPE | {"mode": "closed"}, "'closed' is not a valid Mode"),
    "scope: no enforcement": (SCOPE, {"mode": "open"}, "'enforcement' is missing"),
    "scope: lists as text": (SCOPE, GOOD_SCOPE | {"allow_lists": "office"}, "'office' is not an array"),
    "scope: own list by name": (SCOPE, GOOD_SCOPE | {"block_lists": ["global/block"]}, "not a name for a list"),
    "scope: name": (RecordKey(RecordKind.SCOPE, "everywhere"), GOOD_SCOPE, "'everywhere' is not a scope"),
    "scope: tenant": (RecordKey(RecordKind.SCOPE, "tenant:A"), GOOD_SCOPE, "'A' is not a name for a tenant"),
    "resource: no path": (RESOURCE, {"paths": []}, "protects nothing"),
    "resource: path": (RESOURCE, {"paths": ["docs"]}, "'docs' is not a path pattern"),
    "resource: path a number": (RESOURCE, {"paths": [1]}, "1 is not text"),
    "resource: host with port": (RESOURCE, {"paths": ["/"], "hosts": ["a.com:80"]}, "'a.com:80' is not a host"),
    "resource: host in capitals": (RESOURCE, {"paths": ["/"], "hosts": ["A.com"]}, "'A.com' is not a host"),
    "resource: host of stars": (RESOURCE, {"paths": ["/"], "hosts": ["a.*.com"]}, "'a.*.com' is not a host"),
    "tenant: no instance": (TENANT, {}, "'instance' is missing"),
    "tenant: null instance": (TENANT, {"instance": None}, "None is not text"),
    "tenant: instance": (TENANT, {"instance": "Q1"}, "'Q1' is not a name for an instance"),
    "tenant: held": (TENANT, {"instance": "q1", "held": 1}, "1 is not true or false"),
    "tenant: hold": (TENANT, {"instance": "q1", "held": True, "hold": "alice"}, "'hold': 'alice' is not an object"),
    "tenant: hold without an owner": (TENANT, {"instance": "q1", "held": True, "hold": {}}, "'owner' is missing"),
    "tenant: hold of one that is not held": (
        TENANT,
        {"instance": "q1", "hold": {"owner": "a", "to": "q2", "since": 5, "reason": "r"}},
        "says who holds it, and 'held' that nobody does",
    ),
    "tenant: name": (RecordKey(RecordKind.TENANT, "a\nb"), {"instance": "q1"}, "'a\\nb' is not a name"),
    "instance: weight": (INSTANCE, {"weight": 0, "state": "active"}, "0 is not a whole number from 1 to 100"),
    "instance: weight true": (INSTANCE, {"weight": True, "state": "active"}, "True is not a whole number"),
    "instance: state": (INSTANCE, {"weight": 1, "state": "gone"}, "'gone' is not a valid InstanceState"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_text_is_unreadable_and_says_why(case: tuple[RecordKey, Any, str]) -> None:
    key, content, problem = case
    read = decode_record(key, content if isinstance(content, str) else json.dumps(content))
    assert isinstance(read, Unreadable)
    assert problem in read.problem
    assert str(key) in read.problem


@pytest.mark.parametrize(
    ("key", "record"),
    [
        (INSTANCE, Instance("q2")),
        (INSTANCE, Instance("q1", weight=0)),
        (TENANT, Tenant("acme", None)),
        (ENTRY, Entry(Network(4, 0x0B000000, 8), "r", "a", 1)),
        (ENTRY, Entry(Network(4, 0x0A000000, 8), "\udcff", "a", 1)),
        (RESOURCE, Resource("docs", ())),
    ],
    ids=["another name", "weight", "no instance", "another network", "half a surrogate pair", "no path"],
)
def test_what_could_not_be_read_again_is_not_written(key: RecordKey, record: Record) -> None:
    with pytest.raises(ValueError, match="cannot be stored"):
        encode_readable(key, record)


@pytest.mark.parametrize("name", ["", "list", "change", "entries", "counts"])
def test_there_is_no_such_collection(name: str) -> None:
    with pytest.raises(ValueError, match="is not a collection"):
        record_key_of(name, "x")


def test_texts_in_redis_stay_as_they_are() -> None:
    """What older versions have written must be found again: a difference here needs a new format."""
    assert [(collection(key), key.name, encode_record(record)) for key, record in SPELLED] == [
        ("entries:tenant:acme/allow", "2001:db8::/32", '{"author":"a","created_at":5,"reason":"r"}'),
        (
            "entries:office",
            "0.0.0.0/0",
            '{"author":"ä","created_at":5,"expires_at":9,"owner":"o","reason":"r"}',
        ),
        ("lists", "office", "{}"),
        ("scopes", "global", '{"allow_lists":["office"],"enforcement":"shadow","mode":"restricted"}'),
        ("resources", "docs", '{"hosts":["*.a.com"],"paths":["/docs","/"]}'),
        ("tenants", "acme", '{"instance":"q1"}'),
        ("tenants", "acme", '{"held":true,"instance":"q1"}'),
        (
            "tenants",
            "acme",
            '{"held":true,"hold":{"owner":"alice","reason":"more room","since":1800000000,"to":"q2"},"instance":"q1"}',
        ),
        ("instances", "q1", '{"state":"draining","weight":3}'),
    ]


SPELLED: list[tuple[RecordKey, Record]] = [
    (
        RecordKey(RecordKind.ENTRY, "2001:db8::/32", "tenant:acme/allow"),
        Entry(Network(6, 0x20010DB8 << 96, 32), "r", "a", 5),
    ),
    (RecordKey(RecordKind.ENTRY, "0.0.0.0/0", "office"), Entry(Network(4, 0, 0), "r", "ä", 5, "o", 9)),
    (LIST, NamedList("office")),
    (SCOPE, Scope("global", Mode.RESTRICTED, Enforcement.SHADOW, ("office",))),
    (RESOURCE, Resource("docs", (parse_path_pattern("/docs"), parse_path_pattern("/")), ("*.a.com",))),
    (TENANT, Tenant("acme", "q1")),
    (TENANT, Tenant("acme", "q1", held=True)),
    (TENANT, Tenant("acme", "q1", held=True, hold=Hold("alice", "q2", 1_800_000_000, "more room"))),
    (INSTANCE, Instance("q1", 3, InstanceState.DRAINING)),
]


@given(st.lists(st.tuples(keyed, st.booleans(), st.booleans()), max_size=5))
def test_the_records_of_an_event_survive(items: list[tuple[tuple[RecordKey, Record], bool, bool]]) -> None:
    changes = [
        (key, encode_record(record) if before else None, encode_record(record) if after else None)
        for (key, record), before, after in items
    ]
    read = list(read_event_records(encode_event_records(changes)))
    assert [(item.key, item.previous, item.new) for item in read] == changes
    assert [item.record for item in read] == [record if after else None for (_, record), _, after in items]


@pytest.mark.parametrize("text", ["", "{}x", "1", "[1]", '[["list"]]', '[["no kind","a","",null,null]]', "[" * 100_000])
def test_other_texts_are_no_records_of_an_event(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - whichever says so
        list(read_event_records(text))
