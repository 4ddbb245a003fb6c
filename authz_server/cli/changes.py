"""From an administrator's wish to a change: pure planning, without a store, a clock or a terminal.

A wish names the records that it must know (`keys`); `plan` takes what was read and says what to write, and what every
write expects to find, so that two administrators who act at once cannot overwrite each other. A wish that does not fit
the policy is refused with all its problems, and then nothing of it is written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import Protocol

from netaddr import IPNetwork

from authz_server.cli.failures import NotFoundError, RefusedError
from authz_server.cli.times import show_expiry, show_moment
from authz_server.policy.access import Enforcement, Entry, Mode, NamedList, Resource, Scope, Side, own_list
from authz_server.policy.addresses import Address, Network
from authz_server.policy.affinity import Hold, Instance, InstanceState, Tenant, rendezvous
from authz_server.policy.records import Record, RecordKey, RecordKind, Unreadable, entry_key, record_key
from authz_server.store.interface import MAX_WRITES_PER_CHANGE, Check, StoredRecord, Write

WIDEST_UNASKED = {4: 8, 6: 16}
"""Entries with a shorter prefix than this, by address version, are asked about: most of them are typing errors."""

_NOBODY_MOVES = (
    "registered tenants stay where they are (`authzctl affinity rebalance` shows which of them the hash would place "
    "elsewhere now); where servers place others by the hash (AUTHZ_UNKNOWN_TENANT), some of those move at once"
)

_NAMED = 5
"""Tenants that a sentence names; more are counted."""


class Effect(StrEnum):
    """What a change does to one record."""

    ADDED = "added"
    REPLACED = "replaced"
    REMOVED = "removed"
    UNCHANGED = "unchanged"
    """It was already as wished."""


@dataclass(frozen=True, slots=True)
class Step:
    """One record of a plan."""

    key: RecordKey
    effect: Effect
    record: Record | Unreadable | None
    """As it is afterwards; None: gone."""
    previous: Record | Unreadable | None = None
    """As it was before."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a wish comes to."""

    steps: tuple[Step, ...]
    writes: tuple[Write, ...]
    """Empty when everything is as wished already."""
    checks: tuple[Check, ...] = ()
    concerns: tuple[str, ...] = ()
    """Dangers that somebody must confirm."""
    notes: tuple[str, ...] = ()
    """What is good to know."""
    alone: bool = False
    """Whether it holds only as long as nobody changes anything else."""
    closes: Scope | None = None
    """A scope that the plan leaves restricted and enforced: who still gets in depends on entries not read for it."""


@dataclass(frozen=True, slots=True)
class Known:
    """What was read of the store before planning."""

    stored: Mapping[RecordKey, StoredRecord | None]

    def text(self, key: RecordKey) -> str | None:
        """Return the stored text, which is what a write expects to replace; None: there is no such record."""
        stored = self.stored[key]
        return stored.text if stored else None

    def record(self, key: RecordKey) -> Record | Unreadable | None:
        """Return the record, or None."""
        stored = self.stored[key]
        return stored.record if stored else None


class Wish(Protocol):
    """Something that an administrator asks for."""

    @property
    def action(self) -> str:
        """What is asked for, such as `block.add`; it stands in the history."""

    def keys(self) -> tuple[RecordKey, ...]:
        """Return the keys of all records that `plan` must know."""

    def plan(self, known: Known, now: float) -> Plan:
        """Say what to write (AuthzctlError: the wish does not fit; `now` in seconds since the Unix epoch)."""


class MissingEntriesError(NotFoundError):
    """Entries to remove are not in the list."""

    def __init__(self, list_name: str, missing: tuple[Network, ...], hints: Iterable[str] = ()) -> None:
        super().__init__((f"{network} is not in list {list_name}: nothing was removed" for network in missing), hints)
        self.list_name = list_name
        self.missing = missing


@dataclass(frozen=True, slots=True)
class AddToScope:
    """Put entries into a scope's own allow or block list."""

    side: Side
    scope: str
    entries: tuple[Entry, ...]
    replace: bool = False
    """Whether entries that are there already are written anew."""

    @property
    def action(self) -> str:
        """`allow.add` or `block.add`."""
        return f"{self.side}.add"

    def keys(self) -> tuple[RecordKey, ...]:
        """The entries, and the record that gives the scope its meaning."""
        list_name = own_list(self.scope, self.side)
        return (*(entry_key(list_name, entry) for entry in self.entries), *_scope_keys(self.scope))

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        draft.rely_on_scope(self.scope)
        draft.put_entries(own_list(self.scope, self.side), self.entries, replace_=self.replace)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class RemoveFromScope:
    """Take entries out of a scope's own allow or block list."""

    side: Side
    scope: str
    networks: tuple[Network, ...]

    @property
    def action(self) -> str:
        """`allow.remove` or `block.remove`."""
        return f"{self.side}.remove"

    def keys(self) -> tuple[RecordKey, ...]:
        """The entries."""
        return _entry_keys(own_list(self.scope, self.side), self.networks)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`; MissingEntriesError when one is not there."""
        return _plan_removal(own_list(self.scope, self.side), self.networks, known, now)


@dataclass(frozen=True, slots=True)
class RemoveExpired:
    """Take an entry out that ended before a moment; one that was renewed meanwhile stays."""

    key: RecordKey
    ended_before: float
    """Seconds since the Unix epoch."""

    @property
    def action(self) -> str:
        """`cleanup`."""
        return "cleanup"

    def keys(self) -> tuple[RecordKey, ...]:
        """The entry."""
        return (self.key,)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        entry = known.record(self.key)
        if isinstance(entry, Entry) and not entry.counts_at(self.ended_before):
            draft.remove(self.key)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class AddToList:
    """Put entries into a named list, and create the list when it is not there."""

    name: str
    entries: tuple[Entry, ...] = ()
    description: str | None = None
    """None: as it is, or empty for a new list."""
    owner: str | None = None
    """As with the description."""
    replace: bool = False

    @property
    def action(self) -> str:
        """`list.add`."""
        return "list.add"

    def keys(self) -> tuple[RecordKey, ...]:
        """The list and the entries."""
        return (_list_key(self.name), *(entry_key(self.name, entry) for entry in self.entries))

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        key = _list_key(self.name)
        old = known.record(key)
        base = old if isinstance(old, NamedList) else NamedList(self.name)
        wished = NamedList(
            self.name,
            base.description if self.description is None else self.description,
            base.owner if self.owner is None else self.owner,
        )
        draft.put(key, wished, replace_=self.replace)
        draft.put_entries(self.name, self.entries, replace_=self.replace)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class RemoveFromList:
    """Take entries out of a named list; the list stays."""

    name: str
    networks: tuple[Network, ...]

    @property
    def action(self) -> str:
        """`list.remove`."""
        return "list.remove"

    def keys(self) -> tuple[RecordKey, ...]:
        """The entries."""
        return _entry_keys(self.name, self.networks)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`; MissingEntriesError when one is not there."""
        return _plan_removal(self.name, self.networks, known, now)


@dataclass(frozen=True, slots=True)
class AddInstance:
    """Register an instance; one that is there keeps its state."""

    name: str
    weight: int
    replace: bool = False

    @property
    def action(self) -> str:
        """`instance.add`."""
        return "instance.add"

    def keys(self) -> tuple[RecordKey, ...]:
        """The instance."""
        return (_instance_key(self.name),)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        (key,) = self.keys()
        old = known.record(key)
        base = old if isinstance(old, Instance) else Instance(self.name)
        wished = replace(base, weight=self.weight)
        draft.put(key, wished, replace_=self.replace)
        if wished != old:
            draft.note(_NOBODY_MOVES)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class SetInstance:
    """Set an instance's weight or state; what is None stays as it is."""

    action: str
    """`instance.weight`, `instance.drain`, `instance.down` or `instance.activate`."""
    name: str
    weight: int | None = None
    state: InstanceState | None = None
    tenants: int = 0
    """How many tenants are pinned to it, as far as is known."""
    others_active: bool = True
    """Whether another instance is active."""

    def keys(self) -> tuple[RecordKey, ...]:
        """The instance."""
        return (_instance_key(self.name),)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        (key,) = self.keys()
        old = known.record(key)
        if old is None:
            raise NotFoundError(
                [f"instance {self.name} does not exist: `authzctl instance add {self.name}` registers it"]
            )
        if isinstance(old, Unreadable) and None in (self.weight, self.state):
            draft.refuse(
                f"{key} cannot be read ({old.problem}), so nothing of it can be kept: "
                f"`authzctl instance add {self.name} --replace` writes it anew"
            )
            return draft.finish()
        base = old if isinstance(old, Instance) else Instance(self.name)
        wished = Instance(
            self.name,
            base.weight if self.weight is None else self.weight,
            base.state if self.state is None else self.state,
        )
        draft.put(key, wished, replace_=True)
        if wished.state is not InstanceState.ACTIVE and wished != old:
            if base.state is InstanceState.ACTIVE and not self.others_active:
                draft.concern(f"no other instance is active: new tenants have nowhere to go once {self.name} is not")
            if self.tenants:
                draft.note(
                    f"{counted(self.tenants, 'tenant')} pinned to {self.name} and not moved by this: "
                    f"`authzctl instance drain {self.name} --apply` moves them away"
                )
        elif wished != old:
            draft.note(_NOBODY_MOVES)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class RemoveInstance:
    """Take an instance out of the policy; one with tenants is kept."""

    name: str
    pinned: tuple[str, ...]
    """The tenants that are pinned to it or being moved to it, all of them."""

    @property
    def action(self) -> str:
        """`instance.remove`."""
        return "instance.remove"

    def keys(self) -> tuple[RecordKey, ...]:
        """The instance."""
        return (_instance_key(self.name),)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        (key,) = self.keys()
        old = known.record(key)
        if old is None:
            raise NotFoundError([f"instance {self.name} does not exist: `authzctl instance list` shows those that do"])
        if self.pinned:
            named = ", ".join(self.pinned[:_NAMED])
            more = f" and {len(self.pinned) - _NAMED:,} more" if len(self.pinned) > _NAMED else ""
            draft.refuse(
                f"instance {self.name} has {counted(len(self.pinned), 'tenant')} ({named}{more}): "
                f"`authzctl instance drain {self.name} --apply` moves them away first"
            )
        if isinstance(old, Instance) and old.state is InstanceState.ACTIVE:
            draft.concern(f"instance {self.name} is active: tenants that the hash places on it go elsewhere at once")
        draft.remove(key)
        # Nobody may pin a tenant to it between the look at all tenants and the change.
        return replace(draft.finish(), alone=True)


@dataclass(frozen=True, slots=True)
class PinTenant:
    """Register a tenant, pinned to an instance."""

    action: str
    """`tenant.add` or `affinity.pin`."""
    tenant: str
    instance: str | None
    """None: wherever it is pinned already (then there is nothing to do)."""

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant and the instance."""
        return _tenant_keys(self.tenant, self.instance)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        key = _tenant_key(self.tenant)
        old = known.record(key)
        if isinstance(old, Tenant) and self.instance in (None, old.instance):
            draft.keep(key)
        elif old is not None:
            draft.refuse(
                f"tenant {self.tenant} is registered already, {_pin_text(old)}: "
                f"`authzctl affinity move {self.tenant} {self.instance or 'INSTANCE'}` writes its pin anew"
            )
        elif self.instance is None:
            draft.refuse(f"tenant {self.tenant} was removed meanwhile")
        else:
            draft.rely_on_instance(self.instance)
            draft.put(key, Tenant(self.tenant, self.instance), replace_=False)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class MoveTenant:
    """Pin a registered tenant to another instance, at once and without holding its requests."""

    tenant: str
    instance: str
    origin: str | None = None
    """Where it must be pinned now, or else it stays; None: anywhere."""

    @property
    def action(self) -> str:
        """`affinity.move`."""
        return "affinity.move"

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant and the instance."""
        return _tenant_keys(self.tenant, self.instance)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        key = _tenant_key(self.tenant)
        old = known.record(key)
        if old is None:
            remedy = f"`authzctl affinity pin {self.tenant} {self.instance}` registers it there"
            raise NotFoundError([f"tenant {self.tenant} is not registered: {remedy}"])
        if self.origin is not None and isinstance(old, Tenant) and old.instance != self.origin:
            draft.keep(key)
            draft.note(f"tenant {self.tenant} is {_pin_text(old)} by now, and not moved")
            return draft.finish()
        if isinstance(old, Tenant) and old.held:
            draft.refuse(
                f"tenant {self.tenant} is {hold_text(old)}: `--strict` goes on with that move, "
                f"`authzctl affinity release {self.tenant}` ends it"
            )
        draft.rely_on_instance(self.instance)
        draft.put(key, Tenant(self.tenant, self.instance), replace_=True)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class HoldTenant:
    """Have a tenant's requests denied until it is switched to another instance: the first half of a strict move."""

    move: MoveTenant
    hold: Hold

    @property
    def action(self) -> str:
        """`affinity.hold`."""
        return "affinity.hold"

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant and the instance that it moves to."""
        return self.move.keys()

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`; one that is there already, or no longer where it was, is left alone."""
        draft = _Draft(known, now)
        key = _tenant_key(self.move.tenant)
        old = known.record(key)
        if isinstance(old, Unreadable):
            draft.refuse(
                f"{key} cannot be read ({old.problem}), and servers may still use what it said before: "
                "--at-once writes it anew"
            )
            return draft.finish()
        if not isinstance(old, Tenant) or (old.held and old.hold is None):
            return self.move.plan(known, now)  # which says what is wrong
        draft.rely_on_instance(self.move.instance)
        if old.hold is not None:
            if old.hold.to != self.move.instance:
                draft.refuse(f"tenant {old.id} is {hold_text(old)}: `authzctl affinity release {old.id}` ends that")
            draft.keep(key)
            if old.hold.owner != self.hold.owner:  # a danger also where nothing is written: it is switched later
                return replace(draft.finish(), concerns=(_still_under_way(old),))
        elif old.instance == self.move.instance:
            draft.keep(key)
        elif self.move.origin not in (None, old.instance):
            draft.keep(key)
            draft.note(f"tenant {old.id} is {_pin_text(old)} by now, and not moved")
        else:
            draft.put(key, Tenant(old.id, old.instance, held=True, hold=self.hold), replace_=True)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class SwitchTenant:
    """Pin a held tenant to the instance that it is held for: the second half of a strict move."""

    move: MoveTenant

    @property
    def action(self) -> str:
        """`affinity.move`."""
        return "affinity.move"

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant and the instance that it moves to."""
        return self.move.keys()

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`; one that is not held for this move is left alone."""
        draft = _Draft(known, now)
        key = _tenant_key(self.move.tenant)
        old = known.record(key)
        if isinstance(old, Tenant) and old.hold is not None and old.hold.to == self.move.instance:
            draft.rely_on_instance(self.move.instance)
            draft.put(key, Tenant(old.id, self.move.instance), replace_=True)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class UnpinTenant:
    """Forget a registered tenant and its pin."""

    tenant: str

    @property
    def action(self) -> str:
        """`affinity.unpin`."""
        return "affinity.unpin"

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant."""
        return (_tenant_key(self.tenant),)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        (key,) = self.keys()
        old = known.record(key)
        if old is None:
            raise NotFoundError([f"tenant {self.tenant} is not registered"])
        if isinstance(old, Tenant) and old.held:
            draft.refuse(
                f"tenant {self.tenant} is {hold_text(old)}: `authzctl affinity release {self.tenant}` ends that first"
            )
        draft.remove(key)
        draft.note("the servers treat tenants that are not registered as AUTHZ_UNKNOWN_TENANT says")
        return draft.finish()


@dataclass(frozen=True, slots=True)
class ReleaseTenant:
    """End the hold of a tenant; it stays where it is pinned."""

    tenant: str
    actor: str
    """Who releases; somebody else's hold is asked about."""

    @property
    def action(self) -> str:
        """`affinity.release`."""
        return "affinity.release"

    def keys(self) -> tuple[RecordKey, ...]:
        """The tenant."""
        return (_tenant_key(self.tenant),)

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        (key,) = self.keys()
        old = known.record(key)
        if old is None:
            raise NotFoundError([f"tenant {self.tenant} is not registered"])
        if isinstance(old, Unreadable):
            draft.refuse(f"{key} cannot be read ({old.problem}): `authzctl affinity move` writes its pin anew")
        elif isinstance(old, Tenant) and old.held:
            draft.put(key, Tenant(old.id, old.instance), replace_=True)
            if old.hold is None or old.hold.owner != self.actor:
                draft.concern(_still_under_way(old))
        else:
            draft.keep(key)
        return draft.finish()


@dataclass(frozen=True, slots=True)
class Together:
    """Several wishes of one action as one change: all of them or none."""

    wishes: tuple[Wish, ...]

    @property
    def action(self) -> str:
        """What each of them asks for."""
        return self.wishes[0].action

    def keys(self) -> tuple[RecordKey, ...]:
        """The keys of all."""
        return tuple(dict.fromkeys(chain.from_iterable(wish.keys() for wish in self.wishes)))

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`; the problems of all are told."""
        plans = []
        problems: list[str] = []
        for wish in self.wishes:
            try:
                plans.append(wish.plan(known, now))
            except (RefusedError, NotFoundError) as error:
                problems += error.problems
        if problems:
            raise RefusedError(dict.fromkeys(problems))
        return Plan(
            tuple(step for plan in plans for step in plan.steps),
            tuple(write for plan in plans for write in plan.writes),
            tuple({check.key: check for plan in plans for check in plan.checks}.values()),
            tuple(dict.fromkeys(concern for plan in plans for concern in plan.concerns)),
            tuple(dict.fromkeys(note for plan in plans for note in plan.notes)),
        )


@dataclass(frozen=True, slots=True)
class AddResource:
    """Register a part of the site and, on demand, restrict it in the same change: it is never open in between."""

    resource: Resource
    restricted: bool = False
    """Whether its scope becomes restricted; otherwise the scope's mode stays."""
    allow_lists: tuple[str, ...] = ()
    """The named lists that its scope allows; empty: as they are."""
    replace: bool = False

    @property
    def action(self) -> str:
        """`resource.add`."""
        return "resource.add"

    def keys(self) -> tuple[RecordKey, ...]:
        """The resource, its scope and the lists named."""
        return (
            record_key(self.resource),
            _scope_key(f"resource:{self.resource.name}"),
            *(_list_key(name) for name in self.allow_lists),
        )

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        draft.put(record_key(self.resource), self.resource, replace_=self.replace)
        if self.restricted or self.allow_lists:
            draft.put_scope(
                f"resource:{self.resource.name}",
                mode=Mode.RESTRICTED if self.restricted else None,
                allow_lists=self.allow_lists or None,
            )
        return draft.finish()


@dataclass(frozen=True, slots=True)
class SetScope:
    """Set what a scope does; what is None stays as it is."""

    scope: str
    mode: Mode | None = None
    enforcement: Enforcement | None = None
    allow_lists: tuple[str, ...] | None = None
    block_lists: tuple[str, ...] | None = None

    @property
    def action(self) -> str:
        """`scope.set`."""
        return "scope.set"

    def keys(self) -> tuple[RecordKey, ...]:
        """The scope, what gives it its meaning, and the lists named."""
        names = dict.fromkeys((*(self.allow_lists or ()), *(self.block_lists or ())))
        return (
            _scope_key(self.scope),
            *_scope_keys(self.scope),
            *(_list_key(name) for name in names),
        )

    def plan(self, known: Known, now: float) -> Plan:
        """See `Wish.plan`."""
        draft = _Draft(known, now)
        draft.rely_on_scope(self.scope)
        draft.put_scope(
            self.scope,
            mode=self.mode,
            enforcement=self.enforcement,
            allow_lists=self.allow_lists,
            block_lists=self.block_lists,
        )
        return draft.finish()


def place_tenant(tenant: str, registered: Mapping[str, Tenant], instances: Iterable[Instance]) -> PinTenant:
    """Return the wish that pins a tenant where the rendezvous hash puts it; a registered one stays where it is.

    Raises:
        RefusedError: there is no active instance.
    """
    if tenant in registered:
        return PinTenant("tenant.add", tenant, None)
    known = list(instances)
    instance = rendezvous(tenant, known)
    if instance is None:
        states = ", ".join(f"{one.name} is {one.state}" for one in known) or "none is registered"
        raise RefusedError(
            [f"there is no active instance for tenant {tenant} ({states}): `authzctl instance add NAME` registers one"]
        )
    return PinTenant("tenant.add", tenant, instance)


Entries = Mapping[str, Mapping[Network, Entry]]
"""List name -> its entries by network."""


def closing_concerns(plan: Plan, entries: Entries, now: float) -> Plan:
    """Return the plan with what is to be said of a scope that it closes, given the entries of all lists."""
    scope = plan.closes
    if scope is None or _lets_somebody_in(scope, entries, now):
        return plan
    told = f"no entry in the allow lists of scope {scope.name} counts now: the scope denies every address"
    if scope.name == "global":
        return replace(plan, concerns=(*plan.concerns, f"{told}, and so every request is denied"))
    return replace(plan, notes=(*plan.notes, told))


def missing_hints(list_name: str, missing: Iterable[Network], entries: Entries, now: float) -> tuple[str, ...]:
    """Say for entries that are not in a list what is: wider ones, narrower ones, the same in other lists."""
    hints = []
    listed = entries.get(list_name, {})
    for network in missing:
        covering = [other for other in listed if _within(network, other)]
        if covering:
            narrowest = max(covering, key=lambda other: other.prefix_length)
            hints.append(f"{network} is covered by {_entry_text(listed[narrowest], now)} in {list_name}")
        within = sorted(other for other in listed if _within(other, network))
        if within:
            more = f" and {len(within) - 3} more" if len(within) > 3 else ""
            hints.append(f"within {network}, {list_name} has {', '.join(map(str, within[:3]))}{more}")
        elsewhere = sorted(name for name, others in entries.items() if name != list_name and network in others)
        if elsewhere:
            hints.append(f"{network} is in {', '.join(elsewhere)}")
    return tuple(hints)


class _Draft:
    """A plan in the making."""

    def __init__(self, known: Known, now: float) -> None:
        self._known = known
        self._now = now
        self._steps: list[Step] = []
        self._writes: list[Write] = []
        self._checks: dict[RecordKey, Check] = {}
        self._problems: list[str] = []
        self._concerns: list[str] = []
        self._notes: list[str] = []
        self._closes: Scope | None = None

    def refuse(self, problem: str) -> None:
        self._problems.append(problem)

    def concern(self, danger: str) -> None:
        self._concerns.append(danger)

    def note(self, note: str) -> None:
        self._notes.append(note)

    def keep(self, key: RecordKey) -> None:
        record = self._known.record(key)
        self._steps.append(Step(key, Effect.UNCHANGED, record, record))

    def put(
        self, key: RecordKey, wished: Record, *, replace_: bool, same: Callable[[Record], bool] | None = None
    ) -> None:
        """Add a record; one that is there stays if it is the `same`, and is overwritten only on demand."""
        old = self._known.record(key)
        if old == wished or (isinstance(old, Record) and not replace_ and same and same(old)):
            self.keep(key)
        elif old is None or replace_:
            self._writes.append(Write(key, self._known.text(key), wished))
            self._steps.append(Step(key, Effect.REPLACED if old else Effect.ADDED, wished, old))
        elif isinstance(old, Unreadable):
            self.refuse(f"{key} is there and cannot be read ({old.problem}): --replace writes it anew")
        else:
            self.refuse(f"{key} is there already, {_difference(old, self._now)}: --replace writes it anew")

    def put_entries(self, list_name: str, entries: Iterable[Entry], *, replace_: bool) -> None:
        """Add entries; one that has expired is as good as none."""
        for entry in entries:
            key = entry_key(list_name, entry)
            old = self._known.record(key)
            expired = isinstance(old, Entry) and not old.counts_at(self._now)

            def same(found: Record, wished: Entry = entry) -> bool:
                if not isinstance(found, Entry):
                    return False
                return found.expires_at == wished.expires_at and wished.owner in ("", found.owner)

            self.put(key, entry, replace_=replace_ or expired, same=same)
            if entry.network.prefix_length < WIDEST_UNASKED[entry.network.version]:
                self._concerns.append(f"{entry.network} in {list_name} {size_text(entry.network)}")

    def put_scope(
        self,
        name: str,
        *,
        mode: Mode | None = None,
        enforcement: Enforcement | None = None,
        allow_lists: tuple[str, ...] | None = None,
        block_lists: tuple[str, ...] | None = None,
    ) -> None:
        """Set the given fields of a scope and keep the others."""
        key = _scope_key(name)
        old = self._known.record(key)
        given = (mode, enforcement, allow_lists, block_lists)
        if isinstance(old, Unreadable) and None in given:
            self.refuse(
                f"{key} cannot be read ({old.problem}), so nothing of it can be kept: `authzctl scope set {name}` with "
                "mode, enforcement, allow lists and block lists writes it anew"
            )
            return
        base = old if isinstance(old, Scope) else Scope(name)
        wished = Scope(
            name,
            base.mode if mode is None else mode,
            base.enforcement if enforcement is None else enforcement,
            base.allow_lists if allow_lists is None else allow_lists,
            base.block_lists if block_lists is None else block_lists,
        )
        for list_name in dict.fromkeys((*(allow_lists or ()), *(block_lists or ()))):
            self._rely_on(_list_key(list_name), f"`authzctl list add {list_name}` creates it")
        both = [list_name for list_name in wished.allow_lists if list_name in wished.block_lists]
        if both:
            self.refuse(f"scope {name} would both allow and block {', '.join(both)}: a block wins such a tie")
        self.put(key, wished, replace_=True)
        if wished != old and wished.mode is Mode.RESTRICTED and wished.enforcement is Enforcement.ENFORCE:
            self._closes = wished

    def rely_on_scope(self, name: str) -> None:
        """See to it that what is put into a scope has an effect."""
        kind, _, bare = name.partition(":")
        if kind == "resource":
            self._rely_on(
                RecordKey(RecordKind.RESOURCE, bare), f"`authzctl resource add {bare} --path /...` registers it"
            )
        elif kind == "tenant" and self._known.record(_tenant_key(bare)) is None:
            self._notes.append(f"tenant {bare} is not registered: this applies to whoever names it")

    def rely_on_instance(self, name: str) -> None:
        """See to it that tenants can be pinned to an instance."""
        key = _instance_key(name)
        self._rely_on(key, f"`authzctl instance add {name}` registers it")
        record = self._known.record(key)
        if isinstance(record, Instance) and record.state is not InstanceState.ACTIVE:
            self._concerns.append(f"instance {name} is {record.state}: it takes no new tenants by itself")

    def remove(self, key: RecordKey) -> None:
        self._writes.append(Write(key, self._known.text(key), None))
        self._steps.append(Step(key, Effect.REMOVED, None, self._known.record(key)))

    def finish(self) -> Plan:
        """Return the plan, or raise RefusedError with all problems."""
        records = len(self._writes) + len(self._checks)
        if records > MAX_WRITES_PER_CHANGE:
            self.refuse(f"{records} records are too many for one change: give at most {MAX_WRITES_PER_CHANGE} at once")
        if self._problems:
            raise RefusedError(dict.fromkeys(self._problems))
        if not self._writes:
            return Plan(tuple(self._steps), (), notes=tuple(self._notes))
        return Plan(
            tuple(self._steps),
            tuple(self._writes),
            tuple(self._checks.values()),
            tuple(self._concerns),
            tuple(self._notes),
            closes=self._closes,
        )

    def _rely_on(self, key: RecordKey, remedy: str) -> None:
        text = self._known.text(key)
        if text is None:
            self.refuse(f"{key} does not exist: {remedy}")
        else:
            self._checks[key] = Check(key, text)


def _plan_removal(list_name: str, networks: tuple[Network, ...], known: Known, now: float) -> Plan:
    keys = _entry_keys(list_name, networks)
    missing = tuple(network for key, network in zip(keys, networks, strict=True) if known.record(key) is None)
    if missing:
        raise MissingEntriesError(list_name, missing)
    draft = _Draft(known, now)
    for key in keys:
        draft.remove(key)
    return draft.finish()


def _entry_keys(list_name: str, networks: Iterable[Network]) -> tuple[RecordKey, ...]:
    return tuple(RecordKey(RecordKind.ENTRY, str(network), list_name) for network in networks)


def _scope_keys(name: str) -> tuple[RecordKey, ...]:
    """Return the keys of what gives a scope its meaning."""
    kind, _, bare = name.partition(":")
    if kind == "resource":
        return (RecordKey(RecordKind.RESOURCE, bare),)
    if kind == "tenant":
        return (_tenant_key(bare),)
    return ()


def _tenant_keys(tenant: str, instance: str | None) -> tuple[RecordKey, ...]:
    return (_tenant_key(tenant), *((_instance_key(instance),) if instance else ()))


def _list_key(name: str) -> RecordKey:
    return RecordKey(RecordKind.LIST, name)


def _scope_key(name: str) -> RecordKey:
    return RecordKey(RecordKind.SCOPE, name)


def _tenant_key(name: str) -> RecordKey:
    return RecordKey(RecordKind.TENANT, name)


def _instance_key(name: str) -> RecordKey:
    return RecordKey(RecordKind.INSTANCE, name)


def _lets_somebody_in(scope: Scope, entries: Entries, now: float) -> bool:
    return any(entry.counts_at(now) for name in scope.lists[Side.ALLOW] for entry in entries.get(name, {}).values())


def _difference(old: Record, now: float) -> str:
    """Say how the record that is there looks, as far as a wish can differ from it."""
    match old:
        case Entry():
            return (
                f"put there by {old.author} ({old.reason}), owner {old.owner or 'nobody'}, expires {_expiry(old, now)}"
            )
        case NamedList():
            return f"described as {old.description!r}, owner {old.owner or 'nobody'}"
        case Instance():
            return f"with weight {old.weight}, {old.state}"
        case Resource():
            paths = ", ".join(path.text for path in old.paths)
            return f"for paths {paths} on {', '.join(old.hosts) or 'any host'}"
        case Tenant():
            return _pin_text(old)
        case Scope():
            return f"{old.mode}, {old.enforcement}"


def _entry_text(entry: Entry, now: float) -> str:
    return f"{entry.network} ({entry.reason}; by {entry.author}, expires {_expiry(entry, now)})"


def _expiry(entry: Entry, now: float) -> str:
    return show_expiry(entry.expires_at, now)


def _pin_text(record: Record | Unreadable) -> str:
    if isinstance(record, Tenant) and record.instance is not None:
        return f"pinned to {record.instance}"
    return "pinned to an instance that cannot be read"


def hold_text(tenant: Tenant) -> str:
    """Say who holds a tenant, for a sentence that begins with it."""
    if tenant.hold is None:
        return f"held, nobody says by whom ({_pin_text(tenant)})"
    hold = tenant.hold
    return f"held by {hold.owner} since {show_moment(hold.since)} for a move to {hold.to} ({_pin_text(tenant)})"


def _still_under_way(tenant: Tenant) -> str:
    return f"tenant {tenant.id} is {hold_text(tenant)}: that move may still be under way"


def counted(number: int, noun: str) -> str:
    """Return `1 tenant` or `2,000 tenants`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(network: Network) -> str:
    """Say how many addresses a network covers, for a sentence that begins with it."""
    size = int(IPNetwork(str(network)).size)
    share = "every address there is" if network.prefix_length == 0 else f"{size:,} addresses"
    return f"covers {share} of IPv{network.version}"


def _first(network: Network) -> Address:
    return Address(network.version, network.first)


def _within(inner: Network, outer: Network) -> bool:
    return inner.prefix_length > outer.prefix_length and outer.holds(_first(inner))
