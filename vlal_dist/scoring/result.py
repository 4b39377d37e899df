"""What a worker tells the driver of one shard."""

from dataclasses import dataclass

from vlal_dist.scoring.quality import ShardQuality
from vlal_dist.scoring.seconds import Seconds


@dataclass(frozen=True)
class ShardResult:
    """What became of one shard.

    Attributes:
        split: split name.
        shard: position in the split.
        samples: samples of the shard.
        images: crops encoded by this call.
        created: whether this call committed the file; False if it was there already.
        identical: whether the file that stands has the bytes computed here (True when nothing was
            computed).
        quality: of the likelihoods.
        quarantined: uid -> why its crop could not be used.
        seconds: where the time went.
    """

    split: str
    shard: int
    samples: int
    images: int
    created: bool
    identical: bool
    quality: ShardQuality
    quarantined: dict[int, str]
    seconds: Seconds
