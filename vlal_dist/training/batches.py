"""The streams of a run: training batches in the plan's order, validation batches in the split's."""

import logging

from vlal_dist.data.batches import BatchMaker
from vlal_dist.data.block_cache import BlockCache
from vlal_dist.data.corpus import Corpus
from vlal_dist.data.decoded import DecodedImages
from vlal_dist.data.loader import TrainLoader
from vlal_dist.data.plan import Plan
from vlal_dist.data.reader import Reader
from vlal_dist.errors import ConfigError
from vlal_dist.training.checkpoint import Checkpoint
from vlal_dist.training.ranks import Ranks
from vlal_dist.training.settings import RunSettings
from vlal_dist.training.sources import Sources

logger = logging.getLogger(__name__)


def make_batches(
    settings: RunSettings, sources: Sources, ranks: Ranks, *, train: bool
) -> BatchMaker:
    """What makes the batches of the training corpus, or of the validation split."""
    if settings.decode == "gpu" and ranks.device.type != "cuda":
        raise ConfigError(f"data.decode gpu: this rank runs on {ranks.device}; set data.decode cpu")
    if settings.decode == "gpu" and settings.damage == "quarantine":
        raise ConfigError(
            "data.decode gpu finds damage too late for data.damage quarantine: set cpu"
        )
    corpus = sources.corpus if train else Corpus([sources.validation])
    return BatchMaker(
        Reader(corpus, cache=_block_cache(settings, corpus)),
        feasible=sources.dataset.feasible,
        num_attributes=len(sources.dataset.vocabulary.attributes),
        image_size=settings.image_size,
        normalize=settings.normalize,
        threads=settings.decode_threads,
        read_likelihoods=sources.read_likelihoods if train else None,
        leave_out_damaged=train and settings.damage == "quarantine",
        pinned=ranks.device.type == "cuda",
        decode_later=train and settings.decode == "gpu",
        decoded=_decoded(settings, corpus),
    )


def _decoded(settings: RunSettings, corpus: Corpus) -> DecodedImages | None:
    """Memory for decoded crops, where the settings want one; validation has its own, as large."""
    if not settings.decoded_bytes:
        return None
    return DecodedImages(
        side=settings.image_size,
        num_rows=len(corpus),
        limit_bytes=settings.decoded_bytes,
    )


def _block_cache(settings: RunSettings, corpus: Corpus) -> BlockCache | None:
    """The disk cache of this node, where the settings want one and a split is remote."""
    if not settings.cache_bytes or not corpus.remote:
        return None
    return BlockCache(
        settings.cache, limit_bytes=settings.cache_bytes, largest_bytes=corpus.largest_block
    )


def make_loader(
    settings: RunSettings, sources: Sources, found: Checkpoint | None, ranks: Ranks
) -> TrainLoader:
    """The stream; lanes and micro-batches are those of the first start."""
    first = found.state.binding if found else None
    loader = TrainLoader(
        make_batches(settings, sources, ranks, train=True),
        Plan(sources.corpus, seed=settings.seed, passes=sources.passes, factor=sources.factor),
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=settings.seed,
        lanes=first.lanes if first else settings.lanes,
        micro_batches=first.micro_batches if first else 0,
        window_blocks=settings.window_blocks,
        epoch_end=settings.epoch_end,
        flip=settings.flip,
        prefetch_steps=settings.prefetch_steps,
    )
    if loader.micro_batches % ranks.world_size:
        logger.info(
            "the %d micro-batches of a step are recut for %d ranks: BatchNorm sees other groups",
            loader.micro_batches,
            ranks.world_size,
        )
    return loader
