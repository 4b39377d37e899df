"""A scoring worker: its open dataset, model and text bank, and the warm-up that sizes its batches.

The warm-up runs once per dataset and scorer, by one worker on the crops of one shard; its result is
stored with the settings that all workers adopt.
"""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from vlal_dist.data.format.dataset import Split, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import quarantined_of
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.scoring.clip import ClipEncoder, PhaseSeconds, load_clip
from vlal_dist.scoring.embed import (
    EncoderLock,
    SplitShard,
    embed_crops,
    prepare_crop,
    stored_embeddings,
)
from vlal_dist.scoring.identity import ScoreSettings, ScoringJob, identify
from vlal_dist.scoring.quality import check_shard, measure_shard
from vlal_dist.scoring.shard_task import ShardResult, commit_scores, shard_scores
from vlal_dist.scoring.text_bank import TextBank, ensure_bank
from vlal_dist.storage.store import open_store


class ShardScorer:
    """One worker's open model and dataset.

    `score` may be called by two threads at once: then one shard is read, decoded and written while
    the other is encoded.

    Args:
        job: what to score.
        stop: set it to end `score` before the next batch.

    Raises:
        ConfigError: weights or GPU absent on this node.
        DataError: dataset or weights here are not those of the driver.
    """

    def __init__(self, job: ScoringJob, *, stop: threading.Event | None = None) -> None:
        self.job, self.stop = job, stop or threading.Event()
        if job.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "these scores are computed on cuda and this node has no usable GPU; run where "
                "there is one, or score with scoring.device cpu into a new paths.scores"
            )
        self._threads_before = torch.get_num_threads()
        self._set_threads()
        self.dataset = open_dataset(job.dataset, cache=Path(job.cache))
        self.encoder = load_clip(job.scoring, device=job.device)
        found = identify(self.encoder, self.dataset, job.scoring)
        if found != job.identity:
            raise DataError(
                f"scorer digest {found.digest} on this node, {job.identity.digest} on the driver; "
                f"dataset {job.dataset} or weights {job.scoring.weights} differ between nodes: "
                "give all of them the same files"
            )
        self.store = open_store(job.scores)
        embeddings = job.scoring.embeddings
        self._embeddings = None if embeddings is None else open_store(embeddings)
        self._splits: dict[str, tuple[Split, SampleReader]] = {}
        self._bank: TextBank | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._encoder_lock = EncoderLock()
        self._opening = threading.Lock()

    def warm_up(self, split: str, shard: int) -> "WarmUp":
        """Measure on the crops of one shard; see `warm_up`."""
        self._set_threads()
        opened, reader = self._open(split)
        return warm_up(self.encoder, reader, SplitShard(opened, shard).rows, self.job)

    def prepare_text(self, settings: ScoreSettings) -> int:
        """Make sure that the text bank is committed, and keep it; returns its pairs."""
        self._set_threads()
        return len(self._prepared(settings))

    def score(self, split: str, shard: int, settings: ScoreSettings) -> ShardResult:
        """Score one shard and commit its score file, unless it is there.

        Raises:
            DataError: the shard was altered, or no crop of it can be used.
            StorageError: dataset or score root cannot be used.
            Stopped: `stop` was set; nothing is committed.
        """
        self._set_threads()
        opened, reader = self._open(split)
        here = SplitShard(opened, shard)
        if self.store.exists(self.job.score_key(split, here.sha256)):
            return self.check(split, shard)
        bank, seconds = self._prepared(settings), PhaseSeconds()
        if self._embeddings is not None:
            embedded = stored_embeddings(self._embeddings, here, self.job.embeddings_manifest)
            images = 0
        else:
            assert self._pool is not None
            embedded = embed_crops(
                reader,
                here.rows,
                encoder=self.encoder,
                pool=self._pool,
                lock=self._encoder_lock,
                seconds=seconds,
                stop=self.stop,
            )
            images = len(here.rows) - len(embedded[1])
        started = time.perf_counter()
        header = {**self.job.digests, "temperature": repr(self.job.temperature)}
        scores = shard_scores(
            embedded, here, bank=bank, feasible=self.dataset.feasible, header=header
        )
        created, identical = commit_scores(self.store, split, scores)
        seconds.write += time.perf_counter() - started
        return ShardResult(
            split,
            shard,
            samples=len(here.rows),
            images=images,
            created=created,
            identical=identical,
            quality=measure_shard(self.dataset, here, scores, temperature=self.job.temperature),
            quarantined=quarantined_of(scores.header),
            seconds=seconds,
        )

    def check(self, split: str, shard: int) -> ShardResult:
        """Read back a score file that was there already, and measure its quality.

        Raises:
            DataError: absent, damaged, or not of this shard's samples.
        """
        here = SplitShard(self._open(split)[0], shard)
        quality, quarantined = check_shard(
            self.dataset,
            here,
            store=self.store,
            manifest=self.job.digests,
            temperature=self.job.temperature,
            cache=Path(self.job.cache),
        )
        return ShardResult(
            split, shard, len(here.rows), 0, False, True, quality, quarantined, PhaseSeconds()
        )

    def close(self) -> None:
        """End the threads, and give the process back those of torch."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads_before)

    def _set_threads(self) -> None:
        """In every thread that computes: OpenMP keeps the number by thread, and another number
        gives other last bits.
        """
        torch.set_num_threads(self.job.threads)

    def _open(self, split: str) -> tuple[Split, SampleReader]:
        with self._opening:
            if split not in self._splits:
                opened = open_split(self.dataset, split)
                self._splits[split] = opened, SampleReader(opened)
            return self._splits[split]

    def _prepared(self, settings: ScoreSettings) -> TextBank:
        """The text bank; the first call adopts the settings and starts the decoding threads."""
        with self._opening:
            if self._bank is None:
                self.encoder.batch_size = settings.batch_size
                self._pool = ThreadPoolExecutor(
                    settings.decode_threads, thread_name_prefix="decode"
                )
                self._bank = ensure_bank(
                    self.store,
                    self.encoder,
                    self.dataset,
                    templates=self.job.scoring.templates,
                    scorer_digest=self.job.identity.digest,
                    stop=self.stop,
                )
            return self._bank


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
    """What a warm-up chose and measured.

    Attributes:
        batch_size: crops per encoder call.
        decode_threads: threads that keep up with the encoder.
        encode_per_s: crops per second of the encoder at that batch size.
        decode_per_s: crops per second that one thread fetches, decodes and preprocesses.
        images_per_s: predicted rate of one worker.
    """

    batch_size: int
    decode_threads: int
    encode_per_s: float
    decode_per_s: float
    images_per_s: float


def warm_up(encoder: ClipEncoder, reader: SampleReader, rows: range, job: ScoringJob) -> WarmUp:
    """Measure decoding and encoding for some seconds, and choose what the config leaves open.

    Args:
        encoder: the model; its `batch_size` is set to the chosen one.
        reader: reads the split.
        rows: of the shard whose crops are taken.
        job: `threads` are the processors of a worker.

    Raises:
        DataError: none of the crops can be used.
    """
    cpus, batch_size = job.threads, job.scoring.batch_size
    started, crops = time.perf_counter(), []
    for row in rows[:_CROPS]:
        pixels = prepare_crop(reader, row, encoder).pixels
        crops += [] if pixels is None else [pixels]
    decode_per_s = len(rows[:_CROPS]) / (time.perf_counter() - started)
    if not crops:
        raise DataError(f"{reader.split.store.url}: none of the first crops can be used")
    candidates = CANDIDATES if batch_size is None else (batch_size,)
    encoder.batch_size, encode_per_s = _best_batch(encoder, crops, candidates)
    if encoder.device == "cpu":
        # Decoding and encoding share the processors.
        images_per_s = 1 / (1 / encode_per_s + 1 / (decode_per_s * cpus))
        threads = cpus
    else:
        threads = min(_MOST_THREADS, int(encode_per_s / decode_per_s) + 1)
        images_per_s = min(encode_per_s, decode_per_s * threads)
    threads = job.scoring.decode_threads or threads
    return WarmUp(encoder.batch_size, threads, encode_per_s, decode_per_s, images_per_s)


def _best_batch(
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
    encoder.encode_batch(batch, seconds=PhaseSeconds())
    started, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started < _TRIAL_S:
        encoder.encode_batch(batch, seconds=PhaseSeconds())
        calls += 1
    return size * calls / (time.perf_counter() - started)
