"""One at a time, the shard begun first before all others."""

import threading
import time

from vlal_dist.scoring.clip import Turns


def test_the_lowest_ticket_goes_first_and_alone() -> None:
    turns, entered, inside = Turns(), [], []
    tickets = [turns.ticket() for _ in range(6)]
    assert tickets == sorted(set(tickets))

    def pass_through(ticket: int) -> None:
        with turns.turn(ticket):
            inside.append(ticket)
            assert len(inside) == 1
            entered.append(ticket)
            time.sleep(0.01)
            inside.remove(ticket)

    threads = [threading.Thread(target=pass_through, args=(t,)) for t in tickets[:0:-1]]
    with turns.turn(tickets[0]):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(turns._waiting) < len(threads) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert entered == []
    for thread in threads:
        thread.join()
    assert entered == tickets[1:]


def test_a_turn_that_fails_lets_the_next_one_pass() -> None:
    turns = Turns()
    first, second = turns.ticket(), turns.ticket()
    try:
        with turns.turn(first):
            raise OSError("lost")
    except OSError:
        pass
    with turns.turn(second):
        pass
