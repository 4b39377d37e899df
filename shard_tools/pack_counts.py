"""What `pack` counts as it goes, a finished shard at a time."""

from pathlib import Path

from shard_tools.assemble import ShardPart
from vlal_dist.observability.names import PACK, PACK_RESULTS
from vlal_dist.observability.textfiles import TextFile

RESULTS = {
    "missing": "missing",
    "unreadable": "bad_image",
    "not an image": "bad_image",
    "too large": "bad_image",
    "truncated or damaged": "bad_image",
    "zero size": "bad_box",
    "box outside": "bad_box",
    "box too large": "bad_box",
}
"""Reason of a reject -> label `result`; any other reason is `other`."""


class PackCounts:
    """Counts finished shards; of a run that goes on, those of the runs before too.

    Args:
        textfiles: folder of node_exporter's collector; None: the counts are kept only.
        root: the dataset root, as an absolute path or URL.

    Attributes:
        instances: result -> instances; with the last shard they are all rows of the input.
        shards: `written` by this run, or `skipped` because an earlier one did -> shards.
        size_bytes: of their tars.
    """

    def __init__(self, textfiles: str | None, *, root: str) -> None:
        self.instances = dict.fromkeys(PACK_RESULTS, 0)
        self.shards = {"written": 0, "skipped": 0}
        self.size_bytes = 0
        self._root = root
        self._file = TextFile(Path(textfiles), what="packing", root=root) if textfiles else None
        self._write()

    def add(self, part: ShardPart) -> None:
        """Count a finished shard, and say so."""
        self.instances["written"] += part.samples
        for reject in part.rejects:
            self.instances[RESULTS.get(reject["reason"], "other")] += 1
        self.shards["skipped" if part.found else "written"] += 1
        self.size_bytes += part.size_bytes
        self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        readings: dict[tuple[str, ...], float] = {
            ("vlal_pack_bytes_total", self._root): self.size_bytes
        }
        for result, count in self.instances.items():
            readings["vlal_pack_instances_total", self._root, result] = count
        for result, count in self.shards.items():
            readings["vlal_pack_shards_total", self._root, result] = count
        self._file.write(PACK, readings)
