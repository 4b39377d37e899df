"""Write a packed split below OUT in the formats of the peers, without touching a JPEG's bytes.

OUT then holds `webdataset` (a link to our tars, which it reads as they are), and for each of
`litdata` and `streaming` a dataset `bytes` (JPEG bytes as plain bytes) and a dataset `jpeg` (the
same bytes in the peer's JPEG type, which it decodes itself). Chunks are 64 MB, both peers' default.
"""

import argparse
import os
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

PEERS = ("webdataset", "litdata", "streaming")
CHUNK_BYTES = 1 << 26


def read_samples(shards: list[str]) -> Iterator[dict[str, bytes]]:
    """`jpg` and `json` of every sample of some tars, in order."""
    for shard in shards:
        sample: dict[str, bytes] = {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                part = member.name.partition(".")[2]
                file = tar.extractfile(member)
                if part in ("jpg", "json") and file is not None:
                    sample[part] = file.read()
                if len(sample) == 2:
                    yield sample
                    sample = {}


def to_streaming(shards: list[str], out: Path, *, column: str) -> None:
    """An MDS dataset whose `jpg` has type `column`: `bytes`, or `jpeg`."""
    from PIL import Image
    from streaming import MDSWriter

    columns = {"jpg": column, "json": "bytes"}
    with (
        MDSWriter(out=str(out), columns=columns, size_limit=CHUNK_BYTES) as writer,
        tempfile.NamedTemporaryFile(suffix=".jpg") as file,
    ):
        for sample in read_samples(shards):
            if column == "bytes":
                writer.write(sample)
                continue
            # Its JPEG type keeps the bytes of an image that was opened from a file, and encodes
            # any other one again.
            Path(file.name).write_bytes(sample["jpg"])
            with Image.open(file.name) as image:
                writer.write({"jpg": image, "json": sample["json"]})


def to_litdata(shards: list[str], out: Path, *, column: str) -> None:
    """An optimised dataset whose `jpg` is bytes, or litdata's JPEG type."""
    import litdata

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{scratch}/chunks"
        os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{scratch}/data"
        # Inputs are numbers: litdata would copy paths to a cache of its own first.
        litdata.optimize(
            fn=partial(litdata_samples, shards, column == "jpeg"),
            inputs=list(range(len(shards))),
            output_dir=str(out),
            chunk_bytes=CHUNK_BYTES,
            num_workers=1,
            reorder_files=False,
            verbose=False,
        )


def litdata_samples(shards: list[str], typed: bool, number: int) -> Iterator[dict[str, Any]]:
    """The samples of one tar, as litdata shall store them."""
    import litdata

    for sample in read_samples([shards[number]]):
        # Without a cap on quality the bytes are kept.
        jpg = litdata.Jpeg(bytes=sample["jpg"], max_quality=None) if typed else sample["jpg"]
        yield {"jpg": jpg, "json": sample["json"]}


def check_kept(shards: list[str], chunks: list[Path]) -> None:
    """Find the JPEG bytes of each sample, in order, in the chunks."""
    data, position, following = b"", 0, iter(chunks)
    for sample in read_samples(shards):
        while (found := data.find(sample["jpg"], position)) < 0:
            try:
                data, position = next(following).read_bytes(), 0
            except StopIteration:
                raise SystemExit(f"{chunks}: JPEG bytes are absent or altered") from None
        position = found + len(sample["jpg"])


def convert(peer: str, shards: list[str], out: Path) -> None:
    """Write what one peer reads below `out`; what is there already stays."""
    folder = out / peer
    if peer == "webdataset":
        if not folder.is_symlink():
            folder.symlink_to(Path(shards[0]).parent, target_is_directory=True)
        return
    write, suffix = (to_litdata, "bin") if peer == "litdata" else (to_streaming, "mds")
    for column in ("bytes", "jpeg"):
        target = folder / column
        if not (target / "index.json").exists():
            write(shards, target, column=column)
            check_kept(shards, sorted(target.glob(f"*.{suffix}")))


def main() -> None:
    """Convert the training split for some peers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dataset", type=Path, help="a packed dataset root")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    given = parser.parse_args()
    shards = sorted(map(str, (given.dataset / "train/shards").resolve().glob("*.tar")))
    if not shards:
        raise SystemExit(f"{given.dataset}/train/shards holds no tars")
    given.out.mkdir(parents=True, exist_ok=True)
    for peer in given.peers:
        convert(peer, shards, given.out)


if __name__ == "__main__":
    main()
