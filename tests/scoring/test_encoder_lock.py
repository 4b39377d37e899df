"""The encoder lock: one shard at a time, the one started first before all others."""

import threading
import time

from vlal_dist.scoring.embed import EncoderLock


def test_the_lowest_ticket_goes_first_and_alone() -> None:
    lock, entered, inside = EncoderLock(), [], []
    tickets = [lock.ticket() for _ in range(6)]
    assert tickets == sorted(set(tickets))

    def pass_through(ticket: int) -> None:
        with lock.hold(ticket):
            inside.append(ticket)
            assert len(inside) == 1
            entered.append(ticket)
            time.sleep(0.01)
            inside.remove(ticket)

    threads = [threading.Thread(target=pass_through, args=(t,)) for t in tickets[:0:-1]]
    with lock.hold(tickets[0]):
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(lock._waiting) < len(threads) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert entered == []
    for thread in threads:
        thread.join()
    assert entered == tickets[1:]


def test_an_error_inside_releases_the_lock() -> None:
    lock = EncoderLock()
    first, second = lock.ticket(), lock.ticket()
    try:
        with lock.hold(first):
            raise OSError("lost")
    except OSError:
        pass
    with lock.hold(second):
        pass
