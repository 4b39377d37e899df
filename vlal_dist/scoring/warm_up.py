"""A short measured warm-up: how many crops per encoder call, and how many threads decode for it.

Run once per dataset and scorer, by one worker on the crops of one shard; what it finds is stored
with the settings that all workers adopt.
"""

import itertools
import time
from dataclasses import dataclass

import torch

from vlal_dist.data.rows import RowReader
from vlal_dist.errors import DataError
from vlal_dist.scoring.clip import ClipEncoder
from vlal_dist.scoring.embed import prepare_row
from vlal_dist.scoring.seconds import Seconds

CANDIDATES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Crops per encoder call that are tried, upwards."""
ENOUGH = 0.97
"""Share of the best rate at which the smaller batch is taken: it waits and pads less."""
_TRIAL_S = 0.3
_LONGEST_S = 10.0
_CROPS = 64
_MOST_THREADS = 16


@dataclass(frozen=True)
class WarmUp:
    """What was found.

    Attributes:
        batch_size: crops per encoder call.
        decode_threads: threads that keep up with the encoder.
        encode_per_s: crops per second of the encoder at that batch size.
        decode_per_s: crops per second that one thread fetches, decodes and preprocesses.
        images_per_s: what one worker is expected to reach.
    """

    batch_size: int
    decode_threads: int
    encode_per_s: float
    decode_per_s: float
    images_per_s: float


def warm_up(
    encoder: ClipEncoder,
    reader: RowReader,
    rows: range,
    *,
    cpus: float,
    batch_size: int | None,
    decode_threads: int | None,
) -> WarmUp:
    """Measure decoding and encoding for some seconds, and choose.

    Args:
        encoder: the model; its `batch_size` is set to what is chosen.
        reader: reads the split.
        rows: of the shard whose crops are taken.
        cpus: processors that the worker may use.
        batch_size, decode_threads: given: not chosen.

    Raises:
        DataError: none of the crops can be used.
    """
    started, crops = time.perf_counter(), []
    for row in rows[:_CROPS]:
        one = prepare_row(reader, row, encoder)
        crops += [] if one.pixels is None else [one.pixels]
    decode_per_s = len(rows[:_CROPS]) / (time.perf_counter() - started)
    if not crops:
        raise DataError(f"{reader.split.store.url}: none of the first crops can be used")
    candidates = CANDIDATES if batch_size is None else (batch_size,)
    chosen, encode_per_s = _best(encoder, crops, candidates)
    encoder.batch_size = chosen
    if encoder.device == "cpu":
        # Decoding and encoding share the processors.
        images_per_s = 1 / (1 / encode_per_s + 1 / (decode_per_s * max(1.0, cpus)))
        threads = max(1, round(cpus))
    else:
        threads = min(_MOST_THREADS, int(encode_per_s / decode_per_s) + 1)
        images_per_s = min(encode_per_s, decode_per_s * threads)
    return WarmUp(chosen, decode_threads or threads, encode_per_s, decode_per_s, images_per_s)


def _best(
    encoder: ClipEncoder, crops: list[torch.Tensor], candidates: tuple[int, ...]
) -> tuple[int, float]:
    """The smallest batch size that is nearly as fast as the fastest, and its crops per second."""
    rates: dict[int, float] = {}
    began = time.perf_counter()
    for size in candidates:
        try:
            rates[size] = _rate(encoder, crops, size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        slower = rates[size] < ENOUGH * max(rates.values())
        if slower or time.perf_counter() - began > _LONGEST_S:
            break
    enough = ENOUGH * max(rates.values())
    chosen = min(size for size, rate in rates.items() if rate >= enough)
    return chosen, rates[chosen]


def _rate(encoder: ClipEncoder, crops: list[torch.Tensor], size: int) -> float:
    """Crops per second at a batch size; the first call (compiling, allocating) is not counted."""
    encoder.batch_size = size
    batch = list(itertools.islice(itertools.cycle(crops), size))
    encoder.encode_batch(batch, seconds=Seconds())
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < _TRIAL_S:
        encoder.encode_batch(batch, seconds=Seconds())
        calls += 1
    return size * calls / (time.perf_counter() - started)
