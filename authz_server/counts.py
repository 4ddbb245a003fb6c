"""What is counted at every check, as plain numbers, which `metrics` shows to Prometheus when it is asked.

A counter of its library takes ten times as long, most of it for a lock. So counting is for one thread, the one that
answers checks; reading is for any.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

from authz_server.policy.affinity import Affinity
from authz_server.policy.decision import Allowed, Decision
from authz_server.policy.reasons import Reason

_SCOPE_KINDS: Final[tuple[str, ...]] = ("global", "tenant", "resource")
_PINNED: Final = Affinity.PINNED
_SECONDS: Final[tuple[float, ...]] = (0.00002, 0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
_WAIT_SECONDS: Final[tuple[float, ...]] = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
)


class Durations:
    """A histogram."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        """In seconds."""
        self.counts = [0] * (len(bounds) + 1)
        """By the first bound that is not exceeded; the last holds the others."""
        self.seconds = 0.0
        """Of all together."""

    def count(self, seconds: float, times: int) -> None:
        """Count a duration that was seen so often."""
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.seconds += seconds * times


class CheckCounts:
    """Reasons, durations, and where instances came from. All numbers are there from the beginning."""

    def __init__(self) -> None:
        self.reasons = dict.fromkeys(Reason, 0)
        self.sources = dict.fromkeys(Affinity, 0)
        """Of allowed checks."""
        self.shadow_denials = dict.fromkeys(_SCOPE_KINDS, 0)
        """What scopes in shadow would have denied, by the kind of scope."""
        self.durations = Durations(_SECONDS)
        """From the first byte read to the last byte written."""
        self.waits = Durations(_WAIT_SECONDS)
        """Of checks that were begun."""
        self._tenants: dict[str, int] = {}

    def count(self, decisions: Sequence[Decision], seconds: float) -> None:
        """Count answered checks, each of which took so long."""
        reasons, sources, tenants = self.reasons, self.sources, self._tenants
        for decision in decisions:
            reasons[decision.reason] += 1
            if isinstance(decision, Allowed):
                affinity, tenant = decision.affinity, decision.tenant
                sources[affinity] += 1
                if affinity is _PINNED and tenant is not None:
                    tenants[tenant] = tenants.get(tenant, 0) + 1
            for outcome in decision.shadow_denials:
                self.shadow_denials[outcome.scope.partition(":")[0]] += 1
        self.durations.count(seconds, len(decisions))

    def count_wait(self, seconds: float, checks: int) -> None:
        """Count checks whose decision began, after so long."""
        self.waits.count(seconds, checks)

    def tenants(self) -> dict[str, int]:
        """Return how many allowed checks pinned tenants had since the last `take_tenants`.

        Only pinned ones, so that made-up tenant ids grow nothing.
        """
        return self._tenants.copy()  # in one step of the interpreter: another thread may still add to it

    def take_tenants(self) -> dict[str, int]:
        """Return the same, and begin anew."""
        taken, self._tenants = self._tenants, {}
        return taken.copy()
