"""Damaged tars, one function per kind of damage; and what the training loader gives out of them.

The corpus is made from a small merged dataset. Which samples a damage touches is known without any
checksum: those whose bytes do not lie in their place any more.
"""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlal_dist.data.batch import Batch
from vlal_dist.data.batches import BatchMaker
from vlal_dist.data.block_cache import BlockCache
from vlal_dist.data.corpus import Corpus
from vlal_dist.data.dataset import Dataset, open_dataset, open_split
from vlal_dist.data.ledger import Ledger
from vlal_dist.data.likelihoods import tar_likelihoods
from vlal_dist.data.loader import TrainLoader
from vlal_dist.data.plan import Plan
from vlal_dist.data.reader import Reader
from vlal_dist.data.shards import BLOCK, tar_end
from vlal_dist.errors import VlalError
from vlal_dist.storage.s3 import S3Store
from vlal_dist.storage.store import open_store

SPLIT, SHARD = "train", 1
"""Where the damage is; the dataset has 4 shards of 18 samples."""
VICTIM = 11
"""The sample of the shard that a damage begins with; steps without damage go before its own."""


@dataclass(frozen=True)
class Tar:
    """A whole shard, and where its samples lie.

    Attributes:
        data: its bytes.
        other: the bytes of another shard of the split.
        samples: (start, stop) of each sample's range, bytes.
        parts: part name -> (start, stop) of its contents, of each sample.
    """

    data: bytes
    other: bytes
    samples: list[tuple[int, int]]
    parts: list[dict[str, tuple[int, int]]]

    def pieces(self) -> list[bytes]:
        """The range of each sample."""
        return [self.data[start:stop] for start, stop in self.samples]


def header_flip(tar: Tar) -> bytes:
    """A bit of the header that a sample begins with."""
    return _flipped(tar.data, tar.samples[VICTIM][0] + 1)


def inner_header_flip(tar: Tar) -> bytes:
    """A bit of the header before a sample's json."""
    start, _ = tar.parts[VICTIM]["json"]
    return _flipped(tar.data, start - BLOCK + 1)


def jpg_flip(tar: Tar) -> bytes:
    """A bit in the middle of a photo."""
    start, stop = tar.parts[VICTIM]["jpg"]
    return _flipped(tar.data, (start + stop) // 2)


def json_flip(tar: Tar) -> bytes:
    """A bit of a digit in a sample's labels: it becomes another digit, the json stays one."""
    start, stop = tar.parts[VICTIM]["json"]
    text = tar.data[start:stop]
    digit = next(
        n for n in range(text.index(b'"positive"'), len(text)) if text[n : n + 1].isdigit()
    )
    return _flipped(tar.data, start + digit)


def likelihood_flip(tar: Tar) -> bytes:
    """A bit of a number in a sample's log-likelihood."""
    _, stop = tar.parts[VICTIM]["likelihood.npy"]
    return _flipped(tar.data, stop - 3)


def cut_between_samples(tar: Tar) -> bytes:
    """The file ends where a sample begins."""
    return tar.data[: tar.samples[VICTIM][0]]


def cut_between_parts(tar: Tar) -> bytes:
    """The file ends after a sample's photo, before its json."""
    return tar.data[: tar.parts[VICTIM]["json"][0] - BLOCK]


def cut_in_member(tar: Tar) -> bytes:
    """The file ends within a photo."""
    start, stop = tar.parts[VICTIM]["jpg"]
    return tar.data[: (start + stop) // 2]


def zero_filled(tar: Tar) -> bytes:
    """The size is right, but from a sample on there is nothing: a write that a crash cut off."""
    start, _ = tar.samples[VICTIM]
    return tar.data[:start] + bytes(len(tar.data) - start)


def zero_length(tar: Tar) -> bytes:
    """An empty file."""
    del tar
    return b""


def other_shard(tar: Tar) -> bytes:
    """Another shard's bytes under this name."""
    return tar.other


def swapped(tar: Tar) -> bytes:
    """Two samples in each other's place."""
    pieces = tar.pieces()
    first, second = _equally_long(tar)
    pieces[first], pieces[second] = pieces[second], pieces[first]
    return b"".join(pieces) + tar.data[tar.samples[-1][1] :]


def overwritten(tar: Tar) -> bytes:
    """A sample's bytes over the next one, whose key so becomes a duplicate."""
    pieces = tar.pieces()
    first, second = next(
        (n, n + 1) for n, (a, b) in enumerate(pairwise(pieces)) if len(a) == len(b)
    )
    pieces[second] = pieces[first]
    return b"".join(pieces) + tar.data[tar.samples[-1][1] :]


def written_twice(tar: Tar) -> bytes:
    """A sample once more after the next one; all that follow are shifted."""
    pieces = tar.pieces()
    return _closed([*pieces[: VICTIM + 2], pieces[VICTIM], *pieces[VICTIM + 2 :]])


def missing_field(tar: Tar) -> bytes:
    """A sample without its json; all that follow are shifted."""
    start, stop = tar.parts[VICTIM]["json"]
    stop += -stop % BLOCK
    end = tar.samples[-1][1]
    return _closed([tar.data[: start - BLOCK], tar.data[stop:end]])


def html_page(tar: Tar) -> bytes:
    """The error page of a proxy, saved under the shard's name."""
    del tar
    return b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n" * 8


def trailing_garbage(tar: Tar) -> bytes:
    """All samples are whole, but the file goes on."""
    return tar.data + random.Random(0).randbytes(4096)


KINDS: dict[str, Callable[[Tar], bytes]] = {
    make.__name__: make
    for make in (
        header_flip,
        inner_header_flip,
        jpg_flip,
        json_flip,
        likelihood_flip,
        cut_between_samples,
        cut_between_parts,
        cut_in_member,
        zero_filled,
        zero_length,
        other_shard,
        swapped,
        overwritten,
        written_twice,
        missing_field,
        html_page,
        trailing_garbage,
    )
}


@dataclass(frozen=True)
class Damaged:
    """A damaged shard.

    Attributes:
        key: its key under the root.
        data: its bytes.
        resized: whether their number is another than the manifest's.
        uids: of the samples whose bytes are not in their place.
    """

    key: str
    data: bytes
    resized: bool
    uids: frozenset[int]


def damage(dataset: Dataset, kind: str) -> Damaged:
    """One shard of a local dataset, damaged; the dataset itself stays as it is."""
    split = open_split(dataset, SPLIT)
    store, index = split.store, split.index
    rows = [row for row in range(len(index)) if index.shard[row] == SHARD]
    samples = [(int(index.offset[r]), int(index.offset[r] + index.length[r])) for r in rows]
    parts = [
        {
            name: _extent(start, *(getattr(index, f"{column}_{what}")[row] for what in _EXTENT))
            for name, column in _COLUMNS.items()
        }
        for row, (start, _) in zip(rows, samples, strict=True)
    ]
    tar = Tar(
        data=store.read(split.shard_key(SHARD)),
        other=store.read(split.shard_key(SHARD + 1)),
        samples=samples,
        parts=parts,
    )
    data = KINDS[kind](tar)
    assert data != tar.data, kind
    lost = [tar.data[a:b] != data[a:b] for a, b in samples]
    return Damaged(
        key=split.shard_key(SHARD),
        data=data,
        resized=len(data) != len(tar.data),
        uids=frozenset(int(index.uid[r]) for r, gone in zip(rows, lost, strict=True) if gone),
    )


def damaged_copy(dataset: Dataset, folder: Path, kind: str) -> Damaged:
    """Copy a local dataset to `folder`, one shard damaged."""
    shutil.copytree(dataset.url, folder)
    found = damage(dataset, kind)
    shard = folder / found.key
    shard.chmod(0o644)
    shard.write_bytes(found.data)
    return found


def upload(dataset: Dataset, url: str) -> None:
    """What training reads of a local dataset, copied to another root."""
    store, folder = open_store(url), Path(dataset.url)
    names = ("dataset.json", "vocabulary.json", "feasible.npz")
    files = [*(folder / SPLIT).glob("*.*"), *(folder / SPLIT / "shards").iterdir()]
    for path in [*(folder / name for name in names), *files]:
        store.create(path.relative_to(folder).as_posix(), path)


def open_remote(url: str, folder: Path) -> Dataset:
    """A dataset on S3; its reads take a second of silence for a fault."""
    dataset = open_dataset(url, cache=folder / "cache")
    return replace(dataset, store=S3Store(url, read_timeout_s=1.0))


def name_of(url: str, key: str) -> dict[str, str]:
    """Where an object is, in the words of boto3."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": f"{prefix}/{key}"}


@dataclass
class Given:
    """What one rank was given in an epoch, up to its end or an error.

    Attributes:
        rows: position in the epoch -> uid, and digest of all that the batch holds of it.
        trained, left_out: ledgers of what was given, and of what was not.
        damaged: uid -> what is wrong with it.
        error: what ended the epoch.
        numbers: of the loader.
    """

    rows: dict[int, tuple[int, str]] = field(default_factory=dict)
    trained: Ledger = field(default_factory=Ledger)
    left_out: Ledger = field(default_factory=Ledger)
    damaged: dict[int, str] = field(default_factory=dict)
    error: VlalError | None = None
    numbers: dict[str, float] = field(default_factory=dict)


def open_loader(
    dataset: Dataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    quarantine: bool = False,
    cache: BlockCache | None = None,
) -> TrainLoader:
    """The training stream of a rank: 9 steps of 8 samples, in an order that no layout changes."""
    corpus = Corpus([open_split(dataset, SPLIT)])
    maker = BatchMaker(
        Reader(corpus, cache=cache),
        feasible=dataset.feasible,
        num_attributes=len(dataset.vocabulary.attributes),
        image_size=64,
        normalize=False,
        threads=2,
        read_likelihoods=tar_likelihoods,
        leave_out_damaged=quarantine,
    )
    return TrainLoader(
        maker,
        Plan(corpus, seed=3),
        batch_size=8,
        accumulation=1,
        rank=rank,
        world_size=world_size,
        seed=3,
        lanes=8,
        micro_batches=4,
        epoch_end="exact",
        prefetch_steps=2,
    )


def read_epoch(loader: TrainLoader, epoch: int = 0, *, quarantined: Iterable[int] = ()) -> Given:
    """Go through an epoch of a rank."""
    given = Given()
    try:
        for step in loader.epoch(epoch, 0, frozenset(quarantined)):
            for batch, positions in zip(step.micro_batches, step.sample_index, strict=True):
                given.rows.update(zip(positions.tolist(), _contents(batch), strict=True))
                given.trained += Ledger.of(batch.uid.numpy().view("uint64"), batch.visit.numpy())
            given.left_out += step.left_out
            given.damaged |= {one.uid: str(one) for one in step.damaged}
    except VlalError as error:
        given.error = error
    given.numbers = loader.numbers()
    return given


def read_ranks(dataset: Dataset, *, world_size: int = 1, **options: Any) -> list[Given]:
    """The first epoch of all ranks, one after the other."""
    given = []
    for rank in range(world_size):
        loader = open_loader(dataset, rank=rank, world_size=world_size, **options)
        given.append(read_epoch(loader))
        loader.close()
    return given


def all_rows(given: Sequence[Given]) -> dict[int, tuple[int, str]]:
    """The rows of all ranks in the order of the epoch; no position was given twice."""
    rows = [item for one in given for item in one.rows.items()]
    assert len(rows) == len({position for position, _ in rows})
    return dict(sorted(rows))


def _contents(batch: Batch) -> list[tuple[int, str]]:
    """uid, and digest of every tensor's row, the row of the ragged weights included."""
    named = {name: tensor.contiguous().numpy() for name, tensor in batch.tensors().items()}
    indptr, weight = named.pop("weight_indptr", None), named.pop("inverse_weight", None)
    rows = [[tensor[n] for tensor in named.values()] for n in range(len(batch))]
    if indptr is not None and weight is not None:
        for n, row in enumerate(rows):
            row.append(weight[indptr[n] : indptr[n + 1]])
    digests = [hashlib.sha256(b"".join(t.tobytes() for t in row)) for row in rows]
    uids = batch.uid.numpy().view("uint64").tolist()
    return [(uid, digest.hexdigest()) for uid, digest in zip(uids, digests, strict=True)]


_COLUMNS = {"jpg": "jpg", "json": "json", "likelihood.npy": "likelihood"}
_EXTENT = ("offset", "length")


def _extent(base: int, offset: int, length: int) -> tuple[int, int]:
    return base + int(offset), base + int(offset) + int(length)


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _equally_long(tar: Tar) -> tuple[int, int]:
    """Two samples, not neighbours, that take the same room."""
    lengths = [stop - start for start, stop in tar.samples]
    return next(
        (a, b) for a in range(len(lengths)) for b in range(a + 2, len(lengths))
        if lengths[a] == lengths[b]
    )  # fmt: skip


def _closed(pieces: list[bytes]) -> bytes:
    data = b"".join(pieces)
    return data + tar_end(len(data))
