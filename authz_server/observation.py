"""What the decision log and spans have in common: what they tell of a decision, and how many of them a second."""

from authz_server.policy.decision import Allowed, Decision


def facts_of(decision: Decision) -> dict[str, str]:
    """Return what was decided, for whom and by which list; facts that it lacks are left out."""
    facts = {"outcome": "ok" if isinstance(decision, Allowed) else "denied", "reason": decision.reason.value}
    if decision.tenant is not None:
        facts["tenant"] = decision.tenant
    if isinstance(decision, Allowed) and decision.instance is not None:
        facts |= {"instance": decision.instance, "affinity": decision.affinity.value}
    if deciding := decision.deciding:
        facts["scope"] = deciding.scope
        if deciding.match:
            facts["list"] = deciding.match.list_name
    return facts


class PerSecond:
    """A number of things that may be done in any one second of the clock. For one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._second = 0
        self._left = limit

    def take(self, now: float) -> bool:
        """Tell whether one more may be done at `now`, in seconds; if so, it counts."""
        if int(now) != self._second:
            self._second, self._left = int(now), self._limit
        if self._left <= 0:
            return False
        self._left -= 1
        return True
