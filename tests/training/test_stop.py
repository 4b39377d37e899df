import os
import signal

import pytest

from vlal_dist.processes import handled
from vlal_dist.training.stop import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_a_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = StopRequest([])
    with handled(SIGNALS, stop.receive):
        assert not stop.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # a second one does no harm
        assert stop.requested and stop.received == number.name
    assert signal.getsignal(number) is before
