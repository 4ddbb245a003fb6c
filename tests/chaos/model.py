"""What each check may answer at any moment, from what has been acknowledged; it knows nothing of the servers' code.

While a change is under way both what was and what will be may be answered, and each server goes from one to the other
once. When a change has arrived everywhere, only what it says may be answered by a check that begins after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_SHOWN = 10


class Subject(NamedTuple):
    """What a check is about: a client address, or the tenant that a request names."""

    address: str = "198.51.100.1"
    tenant: str = ""

    def __str__(self) -> str:
        return self.tenant or self.address


@dataclass
class _Era:
    """A time in which the same answers may be given."""

    since: float
    answers: frozenset[str]


@dataclass
class _Seen:
    """The last answer of one server about one subject, and how often it has changed within the era."""

    era: _Era
    answer: str
    ended: float
    changes: int = 0


@dataclass
class Model:
    """What may be answered, and whether it was."""

    checks: int = 0
    wrong: list[str] = field(default_factory=list)
    """The first wrong answers, for people."""
    wrong_in_all: int = 0
    exclusive: dict[Subject, tuple[str, str]] = field(default_factory=dict)
    """Of a subject, what no server may answer any more once any server has answered the other."""
    first: dict[tuple[str, Subject, str], float] = field(default_factory=dict)
    """When a server has first answered something about a subject."""
    _left: set[Subject] = field(default_factory=set)
    _eras: dict[Subject, list[_Era]] = field(default_factory=dict)
    _seen: dict[tuple[str, Subject], _Seen] = field(default_factory=dict)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        return tuple(self._eras)

    def answers(self, subject: Subject) -> frozenset[str]:
        """What may be answered now."""
        return self._eras[subject][-1].answers

    def settle(self, now: float, answers: Mapping[Subject, str]) -> None:
        """From now on this is the only right answer."""
        for subject, answer in answers.items():
            self._begin(now, subject, frozenset({answer}))

    def widen(self, now: float, answers: Mapping[Subject, str]) -> None:
        """From now on this may be answered as well."""
        for subject, answer in answers.items():
            self._begin(now, subject, self.answers(subject) | {answer})

    def widen_all(self, now: float, subject: Subject, answers: set[str]) -> None:
        """From now on all of these may be answered as well."""
        self._begin(now, subject, self.answers(subject) | answers)

    def exclude(self, subject: Subject, before: str, after: str) -> None:
        """From now on, whoever first answers what comes after ends what was before, for all servers."""
        self.exclusive[subject] = (before, after)
        self._left.discard(subject)

    def _begin(self, now: float, subject: Subject, answers: frozenset[str]) -> None:
        eras = self._eras.setdefault(subject, [])
        if not eras or eras[-1].answers != answers:
            eras.append(_Era(now, answers))

    def judge(self, server: str, subject: Subject, answer: str, started: float, ended: float) -> None:
        """Take note of an answer to a check that took from one moment to another."""
        self.checks += 1
        self.first.setdefault((server, subject, answer), ended)
        eras = self._eras[subject]
        first = next((number for number in reversed(range(len(eras))) if eras[number].since <= started), 0)
        allowed = frozenset[str]().union(*(era.answers for era in eras[first:] if era.since <= ended))
        if answer not in allowed:
            self._note(f"{server} answered {answer} about {subject} instead of {' or '.join(sorted(allowed))}")
        elif first == len(eras) - 1:
            self._note_exclusive(server, subject, answer)
            self._note_order(server, subject, answer, started, ended)

    def _note_exclusive(self, server: str, subject: Subject, answer: str) -> None:
        before, after = self.exclusive.get(subject, ("", ""))
        if answer == after:
            self._left.add(subject)
        elif answer == before and subject in self._left:
            self._note(f"{server} answered {answer} about {subject} after somebody had answered {after}")

    def _note_order(self, server: str, subject: Subject, answer: str, started: float, ended: float) -> None:
        """Going back and forth is wrong also where each answer for itself would be right."""
        era = self._eras[subject][-1]
        last = self._seen.get((server, subject))
        if last is None or last.era is not era:
            self._seen[server, subject] = _Seen(era, answer, ended)
        elif answer == last.answer:
            last.ended = max(last.ended, ended)
        elif started > last.ended:  # else nobody knows which came first
            changes = last.changes + 1
            self._seen[server, subject] = _Seen(era, answer, ended, changes)
            if changes >= len(era.answers):
                self._note(f"{server} went back and forth about {subject}: {answer} after {last.answer}")

    def _note(self, what: str) -> None:
        self.wrong_in_all += 1
        if len(self.wrong) < _SHOWN:
            self.wrong.append(what)
