import time

import pytest
import torch

from vlal_dist.training.step import StepClock


def test_passes_and_sum_of_each_step_are_timed_apart() -> None:
    clock = StepClock(torch.device("cpu"))
    for passes_s, sum_s in ((0.05, 0.0), (0.0, 0.1)):
        clock.begin(sampled=False)
        time.sleep(passes_s)
        clock.mark()
        time.sleep(sum_s)
        clock.mark()
    (first, second) = clock.take()
    assert first == (pytest.approx(0.05, abs=0.04), pytest.approx(0.0, abs=0.04))
    assert second == (pytest.approx(0.0, abs=0.04), pytest.approx(0.1, abs=0.04))
    assert clock.take() == []


def test_a_step_that_did_not_end_is_not_counted() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin(sampled=True)
    clock.mark()
    assert clock.take() == []
    clock.begin(sampled=True)
    clock.mark()
    clock.mark()
    assert len(clock.take()) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_by_events_in_sampled_steps_only() -> None:
    clock, long = StepClock(torch.device("cuda")), 1 << 30  # cycles: most of a second

    def step(*, sampled: bool) -> float:
        started = time.monotonic()
        clock.begin(sampled=sampled)
        torch.cuda._sleep(long)
        clock.mark()
        clock.mark()
        return time.monotonic() - started

    assert step(sampled=True) < 0.1  # the host did not wait
    assert clock.take() == []
    torch.cuda.synchronize()
    ((passes_s, sum_s),) = clock.take()
    assert passes_s > 0.2 and sum_s < 0.01
    step(sampled=False)
    torch.cuda.synchronize()
    assert clock.take() == []
