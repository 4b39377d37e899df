"""The actor that benchmarks/scoring/score.py measures: the real one, on a core of its own.

In a module of its own, which Ray's workers import by name.
"""

from pathlib import Path

from benchmarks.scoring.cores import Places
from vlal_dist.scoring.identity import stored_settings
from vlal_dist.scoring.ray_cluster import ScoringActor
from vlal_dist.storage.store import open_store


class PinnedActor(ScoringActor):
    """Takes a core, opens, reads the text bank, and waits for the others."""

    def open(self) -> int:
        """See `ScoringActor.open`."""
        places = Places.read(Path(self.job.scores).parent)
        places.take()
        pid = super().open()
        settings = stored_settings(open_store(self.job.scores), self.job)
        assert settings is not None
        self.scorer.prepare_text(settings)
        places.wait()
        return pid
