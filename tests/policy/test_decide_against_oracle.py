"""Every decision is what an independent reader of the architecture decides, and a fault in it would be noticed."""

import importlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from support.cases import REQUESTS_PER_POLICY, Case, PolicyRoom, cases
from support.oracle import reasons_to_reach

import authz_server.policy

FEW, MANY = 20_000, 200_000
AT_A_TIME = 50
"""So many policies are one piece of work for a process."""


def first_difference(room: PolicyRoom, asked: Iterable[Case]) -> str:
    """Return what a room decides differently from the oracle, for people; empty when it decides nothing differently."""
    for policy, questions in asked:
        snapshot = room.build(policy)
        for request, now, expected in questions:
            answer = room.answer(request, snapshot, now)
            if answer != expected:
                return f"{request}\nat {now}, by {policy}\nmust be {expected}\nbut is  {answer}"
    return ""


@pytest.fixture(scope="module")
def few_cases() -> list[Case]:
    return list(cases(1, range(FEW // REQUESTS_PER_POLICY)))


def test_no_difference_in_a_few_cases(few_cases: list[Case]) -> None:
    assert first_difference(PolicyRoom(), few_cases) == ""


def test_a_few_cases_reach_every_reason(few_cases: list[Case]) -> None:
    assert {answer.reason for _, questions in few_cases for _, _, answer in questions} == reasons_to_reach()


def test_a_seed_means_the_same_cases_every_time(few_cases: list[Case]) -> None:
    assert list(cases(1, range(2))) == few_cases[:2]
    assert list(cases(2, range(2))) != few_cases[:2]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_no_difference_in_many_cases_with_every_reason_a_thousand_times() -> None:
    """Starts no server; it is only too long for the unit part."""
    policies = range(MANY // REQUESTS_PER_POLICY)
    pieces = [policies[start:][:AT_A_TIME] for start in policies[::AT_A_TIME]]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as executor:  # one for each core
        differences, reached = zip(*executor.map(compare_with_oracle, pieces), strict=True)
    assert "".join(differences) == ""
    total: Counter[str] = sum(reached, Counter())
    assert total.total() == MANY
    assert {reason: total[reason] for reason in reasons_to_reach() if total[reason] < 1000} == {}


def compare_with_oracle(policies: range) -> tuple[str, Counter[str]]:
    """Return the first difference, if any, and how often the oracle gave each reason until then."""
    reached: Counter[str] = Counter()

    def counted() -> Iterator[Case]:
        for case in cases(2, policies):
            reached.update(answer.reason for _, _, answer in case[1])
            yield case

    return first_difference(PolicyRoom(), counted()), reached


FAULTS = {
    "tie-goes-to-allow": ("access", "block[0] >= allow[0]", "block[0] > allow[0]"),
    "expires-a-moment-late": ("access", "if now < expiry or", "if now <= expiry or"),
    "expired-entry-ends-the-chain": (
        "access",
        "                best = (prefix_length, expiry, list_name)\n                break",
        "                best = (prefix_length, expiry, list_name)\n            break",
    ),
    "named-lists-ignored": ("access", "*self.allow_lists)", ")"),
    "only-the-first-list-searched": ("access", "if best and prefix_length <= best[0]", "if best"),
    "of-equal-entries-the-last-list": ("access", "prefix_length <= best[0]", "prefix_length < best[0]"),
    "restricted-taken-for-open": ("access", "if self.mode is Mode.RESTRICTED", "if self.mode is None"),
    "wider-networks-missed": ("networks", "row = parents[row]", "row = 0"),
    "narrowest-network-missed": (
        "networks",
        "row = bisect_right(keys, key, first, last)\n",
        "row = bisect_left(keys, key, first, last)\n",
    ),
    "host-port-kept": ("access", 'else host.partition(":")[0]', "else host"),
    "suffix-host-without-dot": ("access", "host.endswith(pattern[1:])", "host.endswith(pattern[2:])"),
    "mapped-addresses-stay-mapped": ("addresses", "if value >> 32 == 0xFFFF:", "if value >> 32 == -1:"),
    "trusted-network-one-bit-too-wide": ("addresses", ">> shift == 0", ">> shift <= 1"),
    "shadow-denies": (
        "decision",
        "            if outcome.denies:\n                shadow_denials += (outcome,)\n        elif ",
        "            shadow_denials += (outcome,) * outcome.denies\n        if ",
    ),
    "shadow-denials-of-enforced-scopes": (
        "decision",
        "        if enforcement is _SHADOW:\n            if outcome.denies:",
        "        shadow_denials += (outcome,) * outcome.denies\n        if enforcement is _SHADOW:\n            if ():",
    ),
    "shadow-denials-that-are-none": ("decision", "            if outcome.denies:", "            if outcome:"),
    "shadow-named-as-deciding": (
        "decision",
        "if outcome.reason is reason and outcome.enforcement is Enforcement.ENFORCE:",
        "if outcome.reason is reason:",
    ),
    "shadow-ends-the-evaluation": (
        "decision",
        "        if outcome.reason is reason",
        "        if outcome.enforcement is _SHADOW:\n            return None\n        if outcome.reason is reason",
    ),
    "global-allow-opens-restricted-resource": (
        "decision",
        "> _WEIGHTS[over_all]:",
        "> _WEIGHTS[over_all] and (reason, scopes[0].reason) != ('not_allowlisted', 'allowlisted'):",
    ),
    "blocked-in-the-first-scope-only": (
        "decision",
        "> _WEIGHTS[over_all]:",
        "> _WEIGHTS[over_all] and (reason is not Reason.BLOCKED or outcome is scopes[0]):",
    ),
    "not-allowlisted-before-blocked": (
        "decision",
        "(Reason.BLOCKED, Reason.NOT_ALLOWLISTED)",
        "(Reason.NOT_ALLOWLISTED, Reason.BLOCKED)",
    ),
    "trusted-peers-ignored": ("decision", "if options.trusted_peers:", "if options.trusted_peers is None:"),
    "invalid-peer-trusted": (
        "decision",
        "        except InvalidAddressError:\n            external = None\n",
        "        except InvalidAddressError:\n            pass\n",
    ),
    "missing-address-taken-from-the-peer": (
        "decision",
        "if options.missing_client_address is MissingClientAddress.DENY:",
        "if options.missing_client_address is None:",
    ),
    "held-ignored": ("decision", "if tenant.held:", "if tenant.held is None:"),
    "held-before-unreadable": ("decision", "if instance is None:", "if instance == '':"),
    "unregistered-instance-accepted": (
        "decision",
        "if snapshot.instances.get(instance) is None:",
        "if instance in ():",
    ),
    "unknown-tenants-routed-nowhere": ("decision", "if options.unknown_tenant is UnknownTenant.NONE:", "if True:"),
    "tenant-scope-ignored": ("decision", "if tenant_scope is not None:", "if tenant_scope == '':"),
    "tenant-scope-without-a-record-ignored": (
        "snapshot",
        "if scope is None and any(",
        "if scope is None and not any(",
    ),
    "block-list-of-tenants-without-a-record-ignored": ("snapshot", "for side in Side):", "for side in (Side.ALLOW,)):"),
    "allowed-by-a-scope": ("decision", "if reason is _ALLOWED:\n        return", "if reason is None:\n        return"),
    "letter-case-never-folded": ("decision", "path.readings(fold_case=fold_case)", "path.readings(fold_case=False)"),
    "letter-case-always-folded": ("decision", "path.readings(fold_case=fold_case)", "path.readings(fold_case=True)"),
    "first-names-never-folded": ("decision", "names, fold_case=fold_case", "names, fold_case=False"),
    "first-names-with-their-suffix": ("paths", '.partition("/")[0].partition(".")[0]', '.partition("/")[0]'),
    "odd-paths-have-one-first-name": (
        "paths",
        "        if is_odd(self.text):\n            return True\n",
        "",
    ),
    "pattern-that-begins-with-anything-overlooked": ("snapshot", 'in ((), ("*",))', "in ((),)"),
    "long-path-accepted": ("paths", "return len(path) > MAX_PATH_LENGTH", "return len(path) > MAX_PATH_LENGTH + 1"),
    "long-odd-path-accepted": ("paths", "or len(path) > MAX_ODD_PATH_LENGTH", "or len(path) > MAX_PATH_LENGTH"),
    "long-twice-escaped-path-accepted": ("paths", "_ESCAPED_PERCENT in path or", ""),
    "long-query-accepted": ("decision", "> MAX_QUERY_LENGTH", "> MAX_QUERY_LENGTH + 1"),
    "first-of-two-tenants-taken": (
        "tenant",
        "            elif text != named:\n                return None, Reason.AMBIGUOUS_TENANT\n",
        "",
    ),
    "tenant-id-not-checked": ("tenant", "or is_identifier(named)", "or named"),
    "header-not-split": ("tenant", 'value.split(",")', "[value]"),
    "semicolons-do-not-separate": ("tenant", 'if ";" in query else', "if not query else"),
    "query-names-not-decoded": ("tenant", 'if "%" not in query:', "if query:"),
    "query-names-decoded-once": ("tenant", "_names_decoded(_names_decoded(query))", "_names_decoded(query)"),
    "query-names-with-case": (
        "tenant",
        "fold_text(_names_decoded(_names_decoded(query)))",
        "_names_decoded(_names_decoded(query))",
    ),
    "query-names-with-leading-spaces": ("tenant", 'name = name.lstrip(" ")', "name = str(name)"),
    "query-lists-missed": ("tenant", 'name.partition("[")[0]', "name"),
    "query-dots-kept": ("tenant", 'text.replace(".", "_")', "text"),
    "query-brackets-kept": ("tenant", '.replace("[", "_")', ""),
    "query-name-in-brackets-missed": ("tenant", 'if name.startswith("["):', "if not name:"),
    "escaped-separators-of-a-query-vanish": (
        "tenant",
        '_ENCODED_SEPARATOR.sub("\\ufffd", query)',
        '_ENCODED_SEPARATOR.sub("", query)',
    ),
    "query-inside-the-path-missed": ("tenant", 'if "%" in text:', "if not text:"),
    "query-inside-the-path-missed-without-a-telling-escape": ("tenant", "3[0-9f]", "3[0-9]"),
    "escaped-digits-and-letters-of-a-query-taken-for-none": ("tenant", "|3[0-9f]|[4-7][0-9a-f]|[89a-f]", "|3f"),
    "twice-escaped-letters-of-a-query-taken-for-none": ("tenant", "%(?:25|", "%(?:"),
    "letters-of-a-query-searched-with-case": ("tenant", "in query.lower()", "in query"),
    "query-inside-the-path-only-decoded-once": ("tenant", "in (once, _decoded(once))", "in (once,)"),
    "literals-of-tenant-paths-with-case": (
        "tenant",
        "elif expected != fold_text(segment):",
        "elif expected != segment:",
    ),
    "tenant-in-a-path-folded": (
        "tenant",
        "                value = segment\n",
        "                value = fold_text(segment)\n",
    ),
    "kelvin-sign-in-a-host-is-a-letter-of-ours": ("access", "name.translate(_ASCII_LOWER)", "name.lower()"),
    "draining-instance-takes-hashed-tenants": (
        "affinity",
        "if instance.state is not InstanceState.ACTIVE:",
        "if instance.state is InstanceState.DOWN:",
    ),
    "weights-ignored": ("affinity", "if weight_1 != weight_2:", "if weight_1 is None:"),
    "decoded-only-once": ("paths", "{plain} | once | twice", "{plain} | once"),
    "decoded-only-twice": ("paths", "{plain} | once | twice", "{plain} | twice"),
    "not-cleaned-up-between-two-decodings": ("paths", "_decoded(once | _cleaned_up(once))", "_decoded(once)"),
    "always-cleaned-up-between-two-decodings": (
        "paths",
        "_decoded(once | _cleaned_up(once))",
        "_decoded(_cleaned_up(once))",
    ),
    "cleaned-up-with-dots": ("paths", "    return {_resolved(text) for text in texts}", "    return texts"),
    "cleaned-up-with-double-slashes": (
        "paths",
        "    texts |= {_merged(text) for text in texts}\n    return {",
        "    return {",
    ),
    "cleaned-up-with-merged-slashes": (
        "paths",
        "    texts |= {_merged(text) for text in texts}\n    return {",
        "    texts = {_merged(text) for text in texts}\n    return {",
    ),
    "cleaned-up-with-backslashes": (
        "paths",
        '    texts |= {text.replace("\\\\", "/") for text in texts}\n    texts |= {_merged',
        "    texts |= {_merged",
    ),
    "cleaned-up-with-no-backslashes-at-all": (
        "paths",
        '    texts |= {text.replace("\\\\", "/") for text in texts}\n    texts |= {_merged',
        '    texts = {text.replace("\\\\", "/") for text in texts}\n    texts |= {_merged',
    ),
    "backslash-is-no-slash": (
        "paths",
        '    texts |= {text.replace("\\\\", "/") for text in texts}\n    texts |= {_END',
        "    texts |= {_END",
    ),
    "path-always-read-to-its-end": ("paths", "_END.split(text, maxsplit=1)[0] for", "text for"),
    "parameters-kept": ("paths", '_PARAMETERS.sub("", text) for', "text for"),
    "encoded-slash-always-decoded": ("paths", '_ENCODED_SLASH.sub("%252F", text)', "text"),
    "dot-segments-kept": ("paths", "    texts |= {_resolved(text) for text in texts}\n", ""),
    "host-in-path-missed": ("paths", "_without_host(text) for", "text for"),
    "empty-segments-merged-before-dots-only": ("paths", 'f"/{_EMPTY}/").replace("//", f"/{_EMPTY}/")', '"/")'),
    "slash-at-the-end-lost": ("paths", '        resolved += "/"\n', "        pass\n"),
    "turkish-letters-kept": ("paths", 'text.upper().casefold().replace("i\\u0307", "i")', "text.casefold()"),
    "pattern-matches-part-of-a-segment": ("paths", '(?:/|\\\\Z)"', '"'),
    "suffix-missed": ("paths", '"(?:\\\\.[^/]*)?" if segments', '"" if segments'),
    "dots-and-spaces-at-the-end-kept": ("paths", "[. ]*", ""),
    "star-takes-many-segments": ("paths", '"/[^/]*"', '"/.*"'),
    "unreadable-scope-opens": ("snapshot", "Scope(key.name, Mode.RESTRICTED, Enforcement.ENFORCE)", "Scope(key.name)"),
    "unreadable-scope-only-in-shadow": (
        "snapshot",
        "Mode.RESTRICTED, Enforcement.ENFORCE",
        "Mode.RESTRICTED, Enforcement.SHADOW",
    ),
    "unreadable-resource-vanishes": (
        "snapshot",
        'return Resource(key.name, paths=(parse_path_pattern("/"),))',
        "return None",
    ),
    "unreadable-pin-forgotten": ("snapshot", "return Tenant(key.name, instance=None)", "return None"),
    "unreadable-instance-active": ("snapshot", "state=InstanceState.DOWN", "state=InstanceState.ACTIVE"),
    "unreadable-block-opens": ("access", "now < expiry or (unreadable_too and expiry == UNREADABLE)", "now < expiry"),
    "unreadable-allow-opens": ("access", "(unreadable_too and expiry == UNREADABLE)", "expiry == UNREADABLE"),
    "unreadable-entry-forgotten": ("snapshot", "            return UNREADABLE\n", "            return None\n"),
    "last-good-value-forgotten": ("snapshot", "if last_good is not None and len(snapshot.problems):", "if False:"),
}
"""What is wrong -> (module, its right text, the wrong text)."""


@pytest.fixture
def copied_room(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PolicyRoom]:
    """Give a copy of the policy room with the fault that the parameter names, or with none."""
    name = f"copied_policy_{request.node.callspec.indices['copied_room']}"
    folder = tmp_path / name
    sources_only = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(authz_server.policy.__file__).parent, folder, ignore=sources_only)
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace("authz_server.policy", name))
    if request.param:
        module, right, wrong = request.param
        source = (folder / f"{module}.py").read_text()
        assert source.count(right) == 1, f"the fault's place is in {module} {source.count(right)} times, not once"
        (folder / f"{module}.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield PolicyRoom(name)
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.integration
@pytest.mark.parametrize("copied_room", FAULTS.values(), ids=FAULTS, indirect=True)
def test_every_fault_is_caught(copied_room: PolicyRoom, few_cases: list[Case]) -> None:
    """Starts no server; together they are only too long for the unit part."""
    assert first_difference(copied_room, few_cases)


@pytest.mark.parametrize("copied_room", [None], ids=["no-fault"], indirect=True)
def test_a_copy_without_a_fault_is_not_caught(copied_room: PolicyRoom, few_cases: list[Case]) -> None:
    assert copied_room.decision is not PolicyRoom().decision
    assert first_difference(copied_room, few_cases) == ""
