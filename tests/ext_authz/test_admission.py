"""What waits, in which order, and who has to go."""

from authz_server.ext_authz.admission import MAX_WAITING, MIN_WAITING, Backlog, Call, Memory


def calls(*numbers: int) -> list[Call]:
    return [(number, b"") for number in numbers]


class TestBacklog:
    """Bounded; newest first in need; late ones are shed."""

    def test_oldest_first_while_there_is_time(self) -> None:
        backlog = Backlog(0.1)
        backlog.add(1.00, calls(1, 2, 3))
        backlog.add(1.01, calls(4))
        assert backlog.take(1.02, 2) == (calls(1, 2), [])
        assert backlog.take(1.02, 2) == (calls(3), [])
        assert round(backlog.waited, 3) == 0.02
        assert backlog.take(1.02, 2) == (calls(4), [])
        assert round(backlog.waited, 3) == 0.01
        assert backlog.take(1.02, 2) == ([], [])
        assert backlog.waiting == 0

    def test_newest_first_when_the_oldest_have_waited_for_half_of_their_time(self) -> None:
        backlog = Backlog(0.1)
        backlog.add(1.00, calls(1, 2))
        backlog.add(1.04, calls(3, 4, 5))
        assert backlog.take(1.06, 2) == (calls(3, 4), [])
        assert backlog.take(1.06, 2) == (calls(5), [])
        assert backlog.take(1.06, 2) == (calls(1, 2), [])

    def test_what_has_waited_for_too_long_is_shed(self) -> None:
        backlog = Backlog(0.1)
        backlog.add(1.00, calls(1, 2))
        backlog.add(1.05, calls(3))
        assert backlog.take(1.11, 9) == (calls(3), calls(1, 2))
        assert (backlog.waiting, backlog.shed) == (0, 2)

    def test_full_is_what_can_be_decided_in_half_of_the_time(self) -> None:
        backlog = Backlog(0.1)
        for _ in range(100):
            backlog.note_pace(10, 10 * 0.0005)  # 0.05 s: 100 checks
        backlog.add(1.0, calls(*range(99)))
        assert not backlog.full
        backlog.add(1.0, calls(99, 100))
        assert backlog.full
        backlog.take(1.0, 50)
        assert not backlog.full

    def test_the_limit_has_bounds_whatever_the_pace(self) -> None:
        for seconds, bound in ((0.0, MAX_WAITING), (1.0, MIN_WAITING)):
            backlog = Backlog(0.1)
            for _ in range(100):
                backlog.note_pace(1, seconds)
            backlog.add(1.0, calls(*range(bound - 1)))
            assert not backlog.full
            backlog.add(1.0, calls(0))
            assert backlog.full


class TestMemory:
    """A bound; what stalls goes first."""

    def test_bounded_and_given_back(self) -> None:
        memory = Memory(lambda: False, max_bytes=10)
        assert memory.reserve(6)
        assert not memory.reserve(5)
        memory.release(6)
        assert memory.reserve(10)

    def test_evicts_until_there_is_room(self) -> None:
        evicted = []

        def evict() -> bool:
            evicted.append(3)
            memory.release(3)
            return True

        memory = Memory(evict, max_bytes=10)
        assert memory.reserve(9)
        assert memory.reserve(6)
        assert evicted == [3, 3]
