"""What waits, in which order, and who has to go."""

from authz_server.ext_authz.admission import MAX_WAITING, MIN_WAITING, Backlog, Memory


def numbers(groups: list[tuple[float, list[int]]]) -> list[int]:
    return [number for _, calls in groups for number in calls]


class TestBacklog:
    """Bounded; newest first in need; late ones are shed."""

    def test_oldest_first_while_there_is_time(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        backlog.add(1.00, [1, 2, 3])
        backlog.add(1.01, [4])
        assert backlog.take(1.02, 2) == ([(1.00, [1, 2])], [])
        assert backlog.take(1.02, 2) == ([(1.00, [3]), (1.01, [4])], [])
        assert backlog.take(1.02, 2) == ([], [])
        assert backlog.waiting == 0

    def test_newest_first_when_the_oldest_have_waited_for_half_of_their_time(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        backlog.add(1.00, [1, 2])
        backlog.add(1.04, [3, 4, 5])
        assert backlog.take(1.06, 2) == ([(1.04, [3, 4])], [])
        assert backlog.take(1.06, 2) == ([(1.04, [5]), (1.00, [1])], [])
        assert backlog.take(1.06, 2) == ([(1.00, [2])], [])

    def test_what_has_waited_for_too_long_is_shed(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        backlog.add(1.00, [1, 2])
        backlog.add(1.05, [3])
        assert backlog.take(1.11, 9) == ([(1.05, [3])], [1, 2])
        assert (backlog.waiting, backlog.shed) == (0, 2)

    def test_there_is_room_for_what_can_be_decided_in_half_of_the_time(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        for _ in range(200):
            backlog.note_pace(10, 10 * 0.0005)  # 0.05 s: 100 checks
        backlog.add(1.0, list(range(98)))
        assert backlog.room in (1, 2)
        backlog.add(1.0, [98, 99, 100])
        assert backlog.room == 0

    def test_in_need_there_is_half_as_much_room_and_a_while_later_all_of_it(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        for _ in range(200):
            backlog.note_pace(10, 10 * 0.0005)  # 100 checks
        backlog.add(1.0, list(range(101)))
        backlog.take(1.0, 40)
        assert backlog.room == 0
        backlog.take(1.01, 41)
        assert backlog.room in (29, 30)
        backlog.take(1.12, 1)
        assert backlog.room > 78

    def test_in_need_as_many_may_wait_as_always_may(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        backlog.note_pace(10_000, 10_000.0)
        backlog.add(1.0, list(range(MIN_WAITING)))
        backlog.take(1.0, 1)
        assert backlog.room == 1

    def test_a_process_that_is_stopped_now_and_then_knows_its_pace(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        for _ in range(50):
            backlog.note_pace(10, 0.0005)
            backlog.note_pace(1, 0.0195)  # 11 calls in 20 ms
        assert 0.001 < backlog.seconds_each < 0.003

    def test_the_limit_has_bounds_whatever_the_pace(self) -> None:
        for seconds, bound in ((0.0, MAX_WAITING), (1.0, MIN_WAITING)):
            backlog: Backlog[int] = Backlog(0.1)
            for _ in range(300):
                backlog.note_pace(1, seconds)
            backlog.add(1.0, list(range(bound - 1)))
            assert backlog.room == 1
            backlog.add(1.0, [0])
            assert backlog.room == 0

    def test_it_is_shut_in_need_only_and_opened_again(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        assert not backlog.shut(1.0)
        backlog.add(1.0, list(range(MAX_WAITING)))
        backlog.take(1.01, 600)
        assert backlog.room == MAX_WAITING // 2 - (MAX_WAITING - 600)
        assert backlog.shut(1.02)
        assert backlog.room == 0
        backlog.open(1.02)
        assert backlog.room == MAX_WAITING // 2 - (MAX_WAITING - 600)
        assert not backlog.shut(1.13)
        assert backlog.room == 600

    def test_it_is_not_shut_for_ever(self) -> None:
        backlog: Backlog[int] = Backlog(0.1)
        backlog.add(0.0, list(range(MAX_WAITING)))
        backlog.take(0.0, 100)
        tries = [backlog.shut(number * 0.05) for number in range(100)]
        assert tries.count(True) == tries.index(False) == 32
        backlog.open(5.0)
        backlog.add(5.0, list(range(100)))
        assert backlog.shut(5.0)


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
