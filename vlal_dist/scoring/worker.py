"""A scoring process: its dataset, model and text bank, and the warm-up that sizes its batches.

Run once per dataset and scorer, by one worker on the crops of one shard; what it finds is stored
with the settings that all workers adopt.

`ScoringJob` is plain data that travels to the workers; `ShardScorer` is what each makes of it. Its
`score` may be called by two threads at once: then one shard is read, decoded and written while the
other is encoded.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlal_dist.data.format.dataset import Dataset, Split, open_dataset, open_split
from vlal_dist.data.format.sample_reader import SampleReader
from vlal_dist.data.format.scores import quarantined_of, score_key
from vlal_dist.errors import ConfigError, DataError
from vlal_dist.scoring.clip import ClipEncoder, Seconds, Turns, load_clip
from vlal_dist.scoring.embed import embed_crops, prepare_row, shard_rows, stored_embeddings
from vlal_dist.scoring.identity import ScorerIdentity, ScoreSettings
from vlal_dist.scoring.quality import check_shard, measure_shard
from vlal_dist.scoring.shard_task import ShardResult, commit_scores
from vlal_dist.scoring.text_bank import TextBank, ensure_bank
from vlal_dist.storage.store import open_store

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
    reader: SampleReader,
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


def never() -> bool:
    """Nobody asks this worker to stop."""
    return False


@dataclass(frozen=True)
class ScoringJob:
    """What a worker needs to know; plain values, no credentials.

    Attributes:
        dataset: dataset root, absolute path or URL.
        cache: local folder for index files of a remote root, absolute.
        scores: score root, absolute path or URL.
        model: open_clip model name.
        model_config_dir: folder of further model configs, or None.
        weights: weights file or tag.
        templates: prompt templates.
        scorer_digest: what the driver computed; each worker must find the same.
        precision, device, compiled, threads, temperature: see `ScoreSettings`.
        embeddings: score root whose embeddings are taken instead of images; None: none.
        embeddings_manifest: its `scores.json`, as text.
    """

    dataset: str
    cache: str
    scores: str
    model: str
    model_config_dir: str | None
    weights: str | None
    templates: tuple[str, ...]
    scorer_digest: str
    precision: str
    device: str
    compiled: bool
    threads: int
    temperature: float
    embeddings: str | None = None
    embeddings_manifest: str = "{}"


class ShardScorer:
    """One worker's open model and dataset.

    Args:
        job: what to score.
        stopped: asked between batches.

    Raises:
        ConfigError: weights or GPU absent on this node.
        DataError: dataset or weights here are not those of the driver.
    """

    def __init__(self, job: ScoringJob, *, stopped: Callable[[], bool] = never) -> None:
        self.job, self.stopped = job, stopped
        if job.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "these scores are computed on cuda and this node has no usable GPU; run where "
                "there is one, or score with scoring.device cpu into a new paths.scores"
            )
        self._threads_before = torch.get_num_threads()
        self._set_threads()
        self.dataset = open_dataset(job.dataset, cache=Path(job.cache))
        self.encoder = load_clip(
            model=job.model,
            model_config_dir=job.model_config_dir,
            weights=job.weights,
            precision=job.precision,
            device=job.device,
            batch_size=1,
            compiled=job.compiled,
        )
        found = identify(self.encoder, self.dataset, model=job.model, templates=job.templates)
        if found.digest != job.scorer_digest:
            raise DataError(
                f"scorer digest {found.digest} on this node, {job.scorer_digest} on the driver; "
                f"dataset {job.dataset} or weights {job.weights} differ between nodes: give all "
                "of them the same files"
            )
        self.store = open_store(job.scores)
        self._header = {
            "scorer_digest": job.scorer_digest,
            "feasible_digest": self.dataset.feasible.digest,
            "vocabulary_digest": self.dataset.vocabulary.digest,
            "temperature": repr(job.temperature),
        }
        self._stored = None if job.embeddings is None else open_store(job.embeddings)
        self._manifest: dict[str, Any] = json.loads(job.embeddings_manifest)
        self._splits: dict[str, tuple[Split, SampleReader]] = {}
        self._bank: TextBank | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._turns = Turns()
        self._lock = threading.Lock()

    def warm_up(
        self, split: str, shard: int, batch_size: int | None, decode_threads: int | None
    ) -> WarmUp:
        """Measure on the crops of one shard; see `warm_up.warm_up`."""
        self._set_threads()
        opened, reader = self._open(split)
        return warm_up(
            self.encoder,
            reader,
            shard_rows(opened, shard),
            cpus=float(self.job.threads),
            batch_size=batch_size,
            decode_threads=decode_threads,
        )

    def prepare_text(self, settings: ScoreSettings) -> int:
        """Make sure that the text bank is committed, and hold it; returns its pairs."""
        self._set_threads()
        return len(self._prepared(settings))

    def score(self, split: str, shard: int, settings: ScoreSettings) -> ShardResult:
        """Score one shard and commit its score file, unless it is there.

        Raises:
            DataError: the shard was altered, or no crop of it can be used.
            StorageError: dataset or score root cannot be used.
            Stopped: `stopped()` became true; nothing is committed.
        """
        self._set_threads()
        opened, reader = self._open(split)
        sha256 = opened.shards[shard].sha256
        key = score_key(split, shard_sha256=sha256, scorer_digest=self.job.scorer_digest)
        if self.store.exists(key):
            return self.check(split, shard)
        bank, rows, seconds = self._prepared(settings), shard_rows(opened, shard), Seconds()
        if self._stored is not None:
            embedded = stored_embeddings(
                self._stored, opened, shard, rows=rows, manifest=self._manifest
            )
        else:
            assert self._pool is not None
            embedded = embed_crops(
                reader,
                rows,
                encoder=self.encoder,
                pool=self._pool,
                turns=self._turns,
                seconds=seconds,
                stopped=self.stopped,
            )
        committed = commit_scores(
            embedded,
            opened,
            shard,
            store=self.store,
            bank=bank,
            feasible=self.dataset.feasible,
            header=self._header,
            seconds=seconds,
        )
        scores = committed.scores
        return ShardResult(
            split,
            shard,
            samples=len(rows),
            images=0 if self._stored is not None else len(rows) - len(embedded.poison),
            created=committed.created,
            identical=committed.identical,
            quality=measure_shard(
                self.dataset,
                opened,
                shard,
                indptr=scores.indptr,
                similarity=scores.similarity,
                temperature=self.job.temperature,
            ),
            quarantined=quarantined_of(scores.header),
            seconds=seconds,
        )

    def check(self, split: str, shard: int) -> ShardResult:
        """Read back a score file that was there already, and measure its quality.

        Raises:
            DataError: absent, damaged, or not of this shard's samples.
        """
        opened, _ = self._open(split)
        quality, quarantined = check_shard(
            self.dataset,
            opened,
            shard,
            store=self.store,
            manifest=self._header,
            temperature=self.job.temperature,
            cache=Path(self.job.cache),
        )
        samples = opened.shards[shard].samples
        return ShardResult(split, shard, samples, 0, False, True, quality, quarantined, Seconds())

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
        with self._lock:
            if split not in self._splits:
                opened = open_split(self.dataset, split)
                self._splits[split] = opened, SampleReader(opened)
            return self._splits[split]

    def _prepared(self, settings: ScoreSettings) -> TextBank:
        """The text bank, with everything set as all workers have it; once."""
        with self._lock:
            if self._bank is None:
                self.encoder.batch_size = settings.batch_size
                self._pool = ThreadPoolExecutor(
                    settings.decode_threads, thread_name_prefix="decode"
                )
                self._bank = ensure_bank(
                    self.store,
                    self.encoder,
                    self.dataset.vocabulary,
                    self.dataset.feasible,
                    templates=self.job.templates,
                    scorer_digest=self.job.scorer_digest,
                    stopped=self.stopped,
                )
            return self._bank


def identify(
    encoder: ClipEncoder, dataset: Dataset, *, model: str, templates: tuple[str, ...]
) -> ScorerIdentity:
    """The identity of a loaded model with a dataset's feasible sets."""
    return ScorerIdentity(
        model=model,
        weights_digest=encoder.weights_digest,
        preprocessing_digest=encoder.preprocessing_digest,
        templates=templates,
        feasible_digest=dataset.feasible.digest,
        vocabulary_digest=dataset.vocabulary.digest,
        precision=encoder.precision,
    )
