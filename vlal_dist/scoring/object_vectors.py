"""Object vectors: CLIP text vectors of the object names, by which `clean` finds similar objects.

`clean` needs them where `clean.feasible_top_k` is above 0 (profile `released`, Sec. 2.2), before
anything is packed. They need only names, so a first `clean` without neighbours gives the vocabulary
and a second one, into another root, reads the file.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from vlal_dist.config.sections import ScoringConfig
from vlal_dist.contents import parse_json
from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError
from vlal_dist.observability.logs import Progress
from vlal_dist.scoring.clip import ClipEncoder, load_clip
from vlal_dist.scoring.text_bank import check_texts
from vlal_dist.storage.store import open_store
from vlal_dist.vocabulary import OBJECT_VECTORS, Vocabulary

BATCH_SIZE = 64
"""Names per encoder call: fixed, because the shape of a batch decides the last bits of its rows."""

logger = logging.getLogger(__name__)


def make_object_vectors(path: str, *, instances: str, scoring: ScoringConfig) -> dict[str, object]:
    """Load a CLIP, encode the object names of an instances root, write the file.

    Runs on the CPU in fp32, whatever precision scores have: some thousand short texts take a minute
    or two, and repeating the command finds its own bytes.

    Args:
        path: local file to write; its folder is made. It appears whole or not at all, and never
            replaces another.
        instances: root written by `clean` (path or URL); a dataset root works too.
        scoring: `model`, `model_config_dir`, `weights`.

    Returns:
        Closing counts: `objects`, `dimensions`, `created` (False when the very same file was there
        already), `file`, `vocabulary_digest`.

    Raises:
        ConfigError: the path is remote or a folder; unknown model, absent weights.
        ConflictError: the path holds other bytes; they stay.
        DataError: the root holds no vocabulary.
        StorageError: the root cannot be read or the file not be written.
    """
    if "://" in path or Path(path).is_dir():
        raise ConfigError(
            f"--object-vectors {path!r} is {'a URL' if '://' in path else 'a folder'}; give a "
            "local file, such as runs/vaw/objects.safetensors, which clean reads too"
        )
    vocabulary = read_vocabulary(instances)
    plain = scoring.model_copy(update={"precision": "fp32", "compile": False})
    encoder = load_clip(plain, device="cpu", batch_size=BATCH_SIZE)
    data = encode_object_vectors(encoder, vocabulary)
    target = Path(path).absolute()
    try:
        created = open_store(str(target.parent)).create(target.name, data)
    except ConflictError:
        raise ConflictError(
            f"--object-vectors {path} holds other content: vectors of another vocabulary, model or "
            "kind of processor, or no vectors at all; delete it if nothing needs it, or give "
            "another file"
        ) from None
    if not created:
        logger.info("%s already holds exactly these vectors", path)
    return {
        "objects": len(vocabulary.objects),
        "dimensions": safetensors.numpy.load(data)[OBJECT_VECTORS].shape[1],
        "created": created,
        "file": path,
        "vocabulary_digest": vocabulary.digest,
    }


def read_vocabulary(root: str) -> Vocabulary:
    """The vocabulary of a root (path or URL) that `clean` wrote.

    Raises:
        DataError: there is none, or it is damaged.
        StorageError: the root cannot be read.
    """
    try:
        data = open_store(root).read("vocabulary.json")
    except NotFoundError:
        raise DataError(
            f"paths.instances: {root} holds no vocabulary.json; object vectors need the names that "
            "a first clean finds: run `vlal clean "
            f"--clean.feasible_top_k 0 --paths.instances {root}`"
        ) from None
    where = f"paths.instances: {root}/vocabulary.json"
    return Vocabulary.from_json(
        parse_json(data, dict[str, Any], where=where, remedy="run vlal clean again")
    )


def encode_object_vectors(encoder: ClipEncoder, vocabulary: Vocabulary) -> bytes:
    """One vector per object, as the file that `clean.object_vectors` names.

    The text is the bare object name, as far as the authors' code shows: the notebook of their kn-32
    sets loads CLIP vectors of the objects (`clip_obj_embs_d512.pth`), and their encoder tokenises
    its input without a prompt (PRIS-CV/seal: `partial-VAW-Clean.ipynb`, `encoder.py`; the call
    between the two is not published). "a photo of ..." is used for scoring crops only.

    Args:
        encoder: loaded CLIP.
        vocabulary: its object names are encoded, in id order.

    Returns:
        safetensors: `object_vectors` float32 [O, D], unit length, and `vocabulary_digest` in the
        header; nothing else, so that equal vectors are equal bytes.

    Raises:
        DataError: two names have the same tokens, because the model's context cuts one.
    """
    names, batches = vocabulary.objects, []
    check_texts(encoder, names, kind="object names", remedy="shorten them (clean.renames)")
    with Progress("object vectors", total=len(names), unit="names") as progress:
        for start in range(0, len(names), encoder.batch_size):
            some = names[start : start + encoder.batch_size]
            batches.append(encoder.encode_texts(some))
            progress.advance(len(some))
    return safetensors.numpy.save(
        {OBJECT_VECTORS: np.concatenate(batches)}, metadata={"vocabulary_digest": vocabulary.digest}
    )
