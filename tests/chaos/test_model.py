"""The model notices wrong answers; else the scenarios would show nothing."""

from chaos.model import Model, Subject

ONE, OTHER = Subject("203.0.113.1"), Subject(tenant="acme")


def model() -> Model:
    model = Model()
    model.settle(0, {ONE: "allowed", OTHER: "queue-1"})
    return model


def test_what_is_settled_is_the_only_right_answer() -> None:
    known = model()
    known.judge("a", ONE, "allowed", 1, 2)
    known.judge("a", OTHER, "queue-1", 1, 2)
    assert (known.checks, known.wrong) == (2, [])
    known.judge("a", ONE, "blocked", 1, 2)
    assert known.wrong == ["a answered blocked about 203.0.113.1 instead of allowed"]


def test_while_a_change_is_under_way_both_are_right_and_each_server_changes_once() -> None:
    known = model()
    known.widen(10, {ONE: "blocked"})
    for server, answers in {"a": ["allowed", "blocked", "blocked"], "b": ["allowed", "allowed"]}.items():
        for number, answer in enumerate(answers):
            known.judge(server, ONE, answer, 11 + number, 11.5 + number)
    assert known.wrong == []
    known.judge("a", ONE, "allowed", 20, 21)
    assert known.wrong == ["a went back and forth about 203.0.113.1: allowed after blocked"]


def test_what_overlaps_has_no_order() -> None:
    known = model()
    known.widen(10, {ONE: "blocked"})
    known.judge("a", ONE, "blocked", 11, 13)
    known.judge("a", ONE, "allowed", 12, 14)
    known.judge("a", ONE, "blocked", 15, 16)
    assert known.wrong == []


def test_a_check_that_began_before_a_change_was_settled_may_still_say_what_was() -> None:
    known = model()
    known.widen(10, {ONE: "blocked"})
    known.settle(20, {ONE: "blocked"})
    known.judge("a", ONE, "allowed", 19, 21)
    assert known.wrong == []
    known.judge("a", ONE, "allowed", 20, 21)
    assert known.wrong_in_all == 1


def test_a_check_before_a_change_does_not_know_of_it() -> None:
    known = model()
    known.widen(10, {ONE: "blocked"})
    known.judge("a", ONE, "blocked", 8, 9)
    assert known.wrong_in_all == 1


def test_what_excludes_the_other_does_so_on_all_servers() -> None:
    known = model()
    known.exclude(OTHER, "queue-1", "queue-2")
    known.widen(10, {OTHER: "queue-2"})
    known.judge("a", OTHER, "queue-1", 11, 12)
    known.judge("b", OTHER, "queue-2", 12, 13)
    assert known.wrong == []
    known.judge("a", OTHER, "queue-1", 12, 14)
    assert known.wrong == ["a answered queue-1 about acme after somebody had answered queue-2"]
