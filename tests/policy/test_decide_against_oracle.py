"""Every decision is what an independent reader of the architecture decides, and a fault in it would be noticed."""

import importlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from support.cases import Case, PolicyRoom, cases
from support.oracle import reasons_to_reach

import authz_server.policy

FEW, MANY = 10_000, 200_000


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
    return list(cases(seed=1, count=FEW))


def test_no_difference_in_a_few_cases(few_cases: list[Case]) -> None:
    assert first_difference(PolicyRoom(), few_cases) == ""


def test_a_few_cases_reach_every_reason(few_cases: list[Case]) -> None:
    assert {answer.reason for _, questions in few_cases for _, _, answer in questions} == reasons_to_reach()


def test_a_seed_means_the_same_cases_every_time(few_cases: list[Case]) -> None:
    assert list(cases(seed=1, count=400)) == few_cases[:2]
    assert list(cases(seed=2, count=400)) != few_cases[:2]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_no_difference_in_many_cases_with_every_reason_a_thousand_times() -> None:
    """Starts no server; it is only too long for the unit part."""
    reached: Counter[str] = Counter()

    def counted() -> Iterator[Case]:
        for case in cases(seed=2, count=MANY):
            reached.update(answer.reason for _, _, answer in case[1])
            yield case

    assert first_difference(PolicyRoom(), counted()) == ""
    assert reached.total() == MANY
    assert {reason: reached[reason] for reason in reasons_to_reach() if reached[reason] < 1000} == {}


FAULTS = {
    "tie-goes-to-allow": ("access", ">= _length(allow)", "> _length(allow)"),
    "expires-a-moment-late": ("access", "now < self.expires_at", "now <= self.expires_at"),
    "expired-entry-ends-the-chain": (
        "access",
        "                best = ListMatch(list_name, entry)\n                break",
        "                best = ListMatch(list_name, entry)\n            break",
    ),
    "named-lists-ignored": ("access", "own_list(self.name, side), *named)", "own_list(self.name, side),)"),
    "only-the-first-list-searched": ("access", "if best and prefix_length <= _length(best)", "if best"),
    "of-equal-entries-the-last-list": ("access", "prefix_length <= _length(best)", "prefix_length < _length(best)"),
    "restricted-taken-for-open": ("access", "if scope.mode is Mode.RESTRICTED", "if scope.mode is None"),
    "shortest-prefix-wins": (
        "networks",
        "for length, by_prefix in by_length.items() if by_prefix), reverse=True)",
        "for length, by_prefix in by_length.items() if by_prefix))",
    ),
    "host-port-kept": ("access", 'else host.partition(":")[0]', "else host"),
    "suffix-host-without-dot": ("access", "host.endswith(pattern[1:])", "host.endswith(pattern[2:])"),
    "mapped-addresses-stay-mapped": ("addresses", "if value >> 32 == 0xFFFF:", "if value >> 32 == -1:"),
    "trusted-network-one-bit-too-wide": ("addresses", ">> shift == 0", ">> shift <= 1"),
    "shadow-denies": (
        "decision",
        "if outcome.reason is reason and outcome.enforcement is Enforcement.ENFORCE:",
        "if outcome.reason is reason:",
    ),
    "shadow-ends-the-evaluation": (
        "decision",
        "    for outcome in scopes:\n",
        "    for outcome in scopes:\n        if outcome.enforcement is Enforcement.SHADOW:\n            return None\n",
    ),
    "global-allow-opens-restricted-resource": (
        "decision",
        "        if _deciding(reason, scopes):\n",
        "        if _deciding(reason, scopes) and (reason, scopes[0].reason) != ('not_allowlisted', 'allowlisted'):\n",
    ),
    "blocked-in-the-first-scope-only": (
        "decision",
        "        if _deciding(reason, scopes):\n",
        "        if _deciding(reason, scopes[:1] if reason is Reason.BLOCKED else scopes):\n",
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
    "held-before-unreadable": ("decision", "if tenant.instance is None:", "if tenant.instance == '':"),
    "unregistered-instance-accepted": (
        "decision",
        "if tenant.instance not in snapshot.instances:",
        "if tenant.instance in ():",
    ),
    "unknown-tenants-routed-nowhere": ("decision", "if options.unknown_tenant is UnknownTenant.NONE:", "if True:"),
    "tenant-scope-ignored": ("decision", "if tenant_id and (scope :=", "if not tenant_id and (scope :="),
    "letter-case-never-folded": ("decision", "if snapshot.options.fold_path_case:", "if snapshot.options is None:"),
    "long-path-cut-short": ("decision", "if len(path) > MAX_PATH_LENGTH:", "if len(path) > MAX_PATH_LENGTH + 1:"),
    "first-of-two-tenants-taken": (
        "tenant",
        "    if len(named) > 1:\n        return None, Reason.AMBIGUOUS_TENANT\n    (text,) = named\n",
        "    text = min(named)\n",
    ),
    "tenant-id-not-checked": ("tenant", "if is_identifier(text) else", "if text else"),
    "header-not-split": ("tenant", 'value.split(",")', "[value]"),
    "semicolons-do-not-separate": ("tenant", 'if ";" in query:', "if not query:"),
    "query-names-not-decoded": ("tenant", "if unquote_plus(key) == name:", "if key == name:"),
    "draining-instance-takes-hashed-tenants": (
        "affinity",
        "if instance.state is not InstanceState.ACTIVE:",
        "if instance.state is InstanceState.DOWN:",
    ),
    "weights-ignored": ("affinity", "if weight_1 != weight_2:", "if weight_1 is None:"),
    "decoded-only-once": ("paths", "for _ in range(2):", "for _ in range(1):"),
    "backslash-is-no-slash": ("paths", 'text.replace("\\\\", "/") for text in texts', "text for text in texts"),
    "parameters-kept": ("paths", 'segment.partition(";")[0] for segment in reading', "segment for segment in reading"),
    "encoded-slash-always-decoded": ("paths", '_ENCODED_SLASH.sub("%252F", text)', "text"),
    "dot-segments-kept": ("paths", "_resolved(reading) for", "reading for"),
    "host-in-path-missed": ("paths", "_without_host(reading) for", "reading for"),
    "pattern-matches-part-of-a-segment": ("paths", 'mine in ("*", theirs)', 'mine == "*" or theirs.startswith(mine)'),
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
    "last-good-value-forgotten": ("snapshot", "if last_good and (kept := last_good.get(key)):", "if False:"),
}
"""What is wrong -> (module, its right text, the wrong text)."""


@pytest.fixture
def copied_room(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PolicyRoom]:
    """Give a copy of the policy room with the fault that the parameter names, or with none."""
    name = f"copied_policy_{request.node.callspec.indices['copied_room']}"
    folder = tmp_path / name
    shutil.copytree(Path(authz_server.policy.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
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


@pytest.mark.parametrize("copied_room", FAULTS.values(), ids=FAULTS, indirect=True)
def test_every_fault_is_caught(copied_room: PolicyRoom, few_cases: list[Case]) -> None:
    assert first_difference(copied_room, few_cases)


@pytest.mark.parametrize("copied_room", [None], ids=["no-fault"], indirect=True)
def test_a_copy_without_a_fault_is_not_caught(copied_room: PolicyRoom, few_cases: list[Case]) -> None:
    assert copied_room.decision is not PolicyRoom().decision
    assert first_difference(copied_room, few_cases) == ""
