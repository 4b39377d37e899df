"""Damaged shards and S3 faults: our loader beside plain webdataset.

Makes the corpus of tests/fixtures/damaged_tars.py, and the faults of tests/fixtures/fault_proxy.py
before a real Ceph gateway (moto where Ceph is not installed). Both loaders read the same tars, in
this process, one epoch in order. The table goes to docs/benchmarks/damage.md.

webdataset is used as its documentation shows: WebDataset, decode("pil"), to_tuple with every field
of a sample, the same handler in each stage; from S3 through `pipe:curl` on presigned URLs.

damage_s3.py has the faults of S3, damage_runs.py runs both loaders under each fault, and
damage_cells.py says what counts as detected; damage at rest is tests/fixtures/damaged_tars.py's.
"""

import datetime
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import webdataset as wds

from benchmarks.damage.cells import Cell, Row
from benchmarks.damage.runs import at_rest, over_s3, read_clean
from benchmarks.damage.s3 import S3_FAULTS, Bucket, s3_client, s3_server
from tests.fixtures.damaged_tars import KINDS, upload

PAGE = Path(__file__).resolve().parents[2] / "docs/benchmarks/damage.md"


def page(damaged: list[Row], faults: list[Row], server: str) -> str:
    """The whole page: a line per fault, then the sums of each loader."""
    lines = [
        "# Damaged shards and S3 faults",
        "",
        f"Measured {datetime.date.today()} by `python -m benchmarks.damage.damage`, five minutes "
        f"(Ceph where it is installed, else moto). Here: {server}; webdataset {wds.__version__}.",
        "",
        *NOTES,
        "",
        "| | ours, `strict` | ours, `quarantine` | webdataset, default | `warn_and_continue` |",
        "|---|---|---|---|---|",
    ]
    for title, rows in (("At rest, on a local disk", damaged), ("Between loader and S3", faults)):
        lines.append(f"| *{title}* | | | | |")
        for row in rows:
            cells = " | ".join(cell.text for cell in row.cells)
            lines.append(f"| **{row.name}**: {row.what} | {cells} |")
    rows = [*damaged, *faults]
    lines.append("| *All together* | | | | |")
    for name, counts in SUMS.items():
        columns = zip(*(row.cells for row in rows), strict=True)
        cells = " | ".join(f"**{sum(map(counts, column))} of {len(rows)}**" for column in columns)
        lines.append(f"| **{name}** | {cells} |")
    return "\n".join([*lines, ""])


SUMS: dict[str, Callable[[Cell], bool]] = {
    "detected, healed or harmless": lambda cell: cell.told or cell.whole,
    "every sample given out, as packed": lambda cell: cell.whole,
    "samples lost, altered or doubled without a word": lambda cell: not cell.told | cell.whole,
}
NOTES = (
    'One of 4 shards of 18 samples is damaged, or met by a fault. "n of 72" is how many samples '
    "of an epoch were given out with the bytes that were packed; then come those that were altered "
    "or given twice, and what was said about it.",
    "",
    "- Ours: the trainer's look at the sizes of all shards at the start, then the loader. `strict` "
    "stops before the step that holds a damaged sample. `quarantine` is the loader's result; the "
    "trainer warns of a shard of another size at the start, and refuses a missing one in both "
    "modes.",
    '- webdataset: `WebDataset`, `decode("pil")`, `to_tuple("jpg", "json", "likelihood.npy")`, '
    "with the same handler in each stage; from S3 through `pipe:curl -s -f -L` on presigned URLs. "
    "It takes names from the tar, so two swapped samples and garbage after the end do it no harm. "
    "How many samples come before an error over S3 varies with timing.",
    "- Detected: an error or a warning. Healed or harmless: every sample came once, as packed. "
    "With `warn_and_continue` a detected fault still ends as a shorter epoch.",
)


def main() -> None:
    """Everything, then the page."""
    logging.getLogger("vlal_dist").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clean = read_clean(folder / "small")
        damaged = [at_rest(clean, kind, folder / kind) for kind in KINDS]
        with s3_server(folder / "server") as (server, endpoint):
            os.environ["AWS_ENDPOINT_URL"] = endpoint
            client = s3_client()
            client.create_bucket(Bucket="damage")
            bucket = Bucket(server, endpoint, "s3://damage/small", client)
            upload(clean.dataset, bucket.url)
            faults = [over_s3(clean, bucket, f, folder / f.name) for f in S3_FAULTS]
    text = page(damaged, faults, server)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
