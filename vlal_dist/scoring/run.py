"""Score what is pending and sum up what became of it, whoever does the work: Ray's actors or us."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from vlal_dist.errors import DataError
from vlal_dist.scoring.actors import UNDER_WAY, Call
from vlal_dist.scoring.identity import ScoreSettings
from vlal_dist.scoring.plan import Task
from vlal_dist.scoring.quality import QualityTotals
from vlal_dist.scoring.result import ShardResult
from vlal_dist.scoring.seconds import Seconds
from vlal_dist.scoring.worker import ShardScorer

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """Who does the work: `actors.ActorPool`, or `LocalWorkers`."""

    @property
    def retried(self) -> int:
        """Calls given out again after a lost worker."""

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """Results of the calls as they finish, in any order."""


class LocalWorkers:
    """This process alone, two shards under way as in an actor."""

    retried = 0

    def __init__(self, scorer: ShardScorer) -> None:
        self._scorer = scorer

    def run(self, calls: Sequence[Call]) -> Iterator[Any]:
        """See `Workers.run`."""
        with ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="shard") as pool:
            under_way: set[Future[Any]] = set()
            try:
                for method, arguments in calls:
                    under_way.add(pool.submit(getattr(self._scorer, method), *arguments))
                    if len(under_way) >= UNDER_WAY:
                        done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                        yield from (one.result() for one in done)
                while under_way:
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in done)
            finally:
                for one in under_way:
                    one.cancel()


@dataclass
class Outcome:
    """What became of all shards, summed up as they come.

    Attributes:
        quality: of the likelihoods.
        allowed: crops that may be unusable before the run stops.
        scored, skipped: shards committed by this run, and those that were there.
        samples: split -> samples covered.
        images: crops encoded.
        quarantined: split -> uid in hex -> why its crop could not be used.
        spent: where the workers' time went.
    """

    quality: QualityTotals
    allowed: int
    scored: int = 0
    skipped: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    images: int = 0
    quarantined: dict[str, dict[str, str]] = field(default_factory=dict)
    spent: Seconds = field(default_factory=Seconds)

    def add(self, result: ShardResult) -> None:
        """Add one shard.

        Raises:
            DataError: more crops are unusable than the run allows.
        """
        self.scored += result.created
        self.skipped += not result.created
        self.images += result.images
        self.samples[result.split] = self.samples.get(result.split, 0) + result.samples
        self.quality.add(result.quality)
        for name, seconds in asdict(result.seconds).items():
            setattr(self.spent, name, getattr(self.spent, name) + seconds)
        if result.quarantined:
            here = self.quarantined.setdefault(result.split, {})
            here |= {f"{uid:016x}": why for uid, why in result.quarantined.items()}
            self._check_quarantined()
        if not result.identical:
            logger.warning(
                "shard %d of %s was scored twice with different last bits (unequal devices?); the "
                "first file stands",
                result.shard,
                result.split,
            )

    def _check_quarantined(self) -> None:
        found = sum(map(len, self.quarantined.values()))
        if found > self.allowed:
            uid, why = next(one for some in self.quarantined.values() for one in some.items())
            raise DataError(
                f"{found} crops cannot be used, scoring.max_quarantined allows {self.allowed}; "
                f"the first is uid {uid}: {why}. Correct the photos and pack again, or raise it"
            )


def score_all(
    workers: Workers,
    *,
    pending: Sequence[Task],
    present: Sequence[Task],
    settings: ScoreSettings,
    outcome: Outcome,
    advance: Callable[[int], None],
) -> None:
    """Check the shards that have a score file, score the others, sum up.

    Args:
        workers: who does it.
        pending, present: shards without and with a score file.
        settings: shared by all workers.
        outcome: added to.
        advance: told the samples of each shard that is done.

    Raises:
        VlalError: what a worker raised; DataError where too many crops are unusable.
    """
    if pending:
        list(workers.run([("prepare_text", (settings,))]))  # one encodes the prompts, all read them
    calls: list[Call] = [("score", (*task, settings)) for task in pending]
    for result in workers.run([*calls, *(("check", task) for task in present)]):
        outcome.add(result)
        advance(result.samples)
