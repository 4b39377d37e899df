"""The text bank: one unit vector per feasible (object, attribute) pair, computed once per scorer.

The first worker to need it encodes the different prompts, averages templates and commits the file;
all others, on any node and in any later run, read those very bytes.
"""

import logging
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from vlal_dist.errors import ConfigError, ConflictError, DataError, NotFoundError, Stopped
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.clip import ClipEncoder
from vlal_dist.storage.store import Store
from vlal_dist.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

TextBank = npt.NDArray[np.float32]
"""float32 [S, D], unit length; row s is pair s of the feasible sets (CSR order)."""


def bank_key(scorer_digest: str) -> str:
    """Storage key of the text bank of one scorer."""
    return f"text-{scorer_digest[:16]}.safetensors"


def encode_bank(
    encoder: ClipEncoder,
    vocabulary: Vocabulary,
    feasible: FeasibleSets,
    *,
    templates: Sequence[str],
    stopped: Callable[[], bool],
) -> TextBank:
    """Encode each different prompt once; a pair's vector is the mean over templates, normalised.

    Raises:
        ConfigError: a template that cannot be filled.
        DataError: no object has a feasible attribute.
        Stopped: `stopped()` became true.
    """
    prompts = build_prompts(vocabulary, feasible, templates=templates)
    if not prompts.text:
        raise DataError("no object has a feasible attribute, so there is nothing to score")
    logger.info("text bank: %d prompts for %d pairs", len(prompts.text), len(prompts.position))
    batches = []
    for start in range(0, len(prompts.text), encoder.batch_size):
        if stopped():
            raise Stopped("stopped while encoding prompts; the same command starts them again")
        batches.append(encoder.encode_texts(prompts.text[start : start + encoder.batch_size]))
    vectors = np.concatenate(batches)
    total = np.zeros((len(prompts.position), vectors.shape[1]), dtype=np.float32)
    for column in prompts.position.T:
        total += vectors[column]
    bank: TextBank = total / np.linalg.norm(total, axis=1, keepdims=True)
    return bank


def commit_bank(store: Store, bank: TextBank, *, scorer_digest: str) -> TextBank:
    """Commit the bank, and return the one that stands (another worker's, if it came first)."""
    data = safetensors.numpy.save({"embedding": bank}, metadata={"scorer_digest": scorer_digest})
    try:
        store.create(bank_key(scorer_digest), data)
        return bank
    except ConflictError:
        return read_bank(store, scorer_digest=scorer_digest, num_pairs=len(bank))


def read_bank(store: Store, *, scorer_digest: str, num_pairs: int) -> TextBank:
    """Read a committed bank.

    Args:
        store: score root.
        scorer_digest: whose bank.
        num_pairs: S, feasible pairs of the dataset.

    Raises:
        NotFoundError: nobody committed it yet.
        DataError: damaged, or of another length.
    """
    key = bank_key(scorer_digest)
    try:
        bank: TextBank = safetensors.numpy.load(store.read(key))["embedding"]
    except (safetensors.SafetensorError, KeyError) as error:
        raise DataError(f"{store.url}/{key} is damaged ({error}); delete it and rerun") from None
    if bank.ndim != 2 or len(bank) != num_pairs:
        raise DataError(
            f"{store.url}/{key} holds {bank.shape} vectors, the feasible sets have {num_pairs} "
            "pairs; delete it and rerun"
        )
    return bank


def ensure_bank(
    store: Store,
    encoder: ClipEncoder,
    vocabulary: Vocabulary,
    feasible: FeasibleSets,
    *,
    templates: Sequence[str],
    scorer_digest: str,
    stopped: Callable[[], bool],
) -> TextBank:
    """Read the committed bank, or encode and commit it; raises as the functions above."""
    try:
        return read_bank(store, scorer_digest=scorer_digest, num_pairs=len(feasible.indices))
    except NotFoundError:
        bank = encode_bank(encoder, vocabulary, feasible, templates=templates, stopped=stopped)
        return commit_bank(store, bank, scorer_digest=scorer_digest)


PLACEHOLDERS = ("attribute", "object")


@dataclass(frozen=True)
class Prompts:
    """The different prompts, and which of them belong to each feasible pair.

    Attributes:
        text: different prompts, in the order of their first use.
        position: int32 [S, T], prompt of pair s (order of the feasible sets) under template t.
    """

    text: tuple[str, ...]
    position: npt.NDArray[np.int32]


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that cannot be filled from an attribute and an object name.

    Raises:
        ConfigError: no template, unbalanced braces, an unknown placeholder, or no `{attribute}`.
    """
    if not templates:
        raise ConfigError("scoring.templates is empty; give at least one prompt template")
    for template in templates:
        try:
            fields = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(
                f"scoring.templates: {template!r}: {error}; write {{attribute}} and {{object}}"
            ) from None
        names = [name for _, name, _, _ in fields if name is not None]
        plain = all(not spec and not conversion for _, _, spec, conversion in fields)
        unknown = [name for name in names if name not in PLACEHOLDERS]
        if unknown or not plain:
            raise ConfigError(
                f"scoring.templates: {template!r} holds "
                + (f"the placeholder {{{unknown[0]}}}" if unknown else "a format specification")
                + "; allowed are {attribute} and {object}, nothing else in braces"
            )
        if "attribute" not in names:
            raise ConfigError(
                f"scoring.templates: {template!r} lacks {{attribute}}: all attributes of an "
                "object would score the same; add it"
            )


def build_prompts(
    vocabulary: Vocabulary, feasible: FeasibleSets, *, templates: Sequence[str]
) -> Prompts:
    """Fill every template for every feasible pair, in the order of the feasible sets.

    Args:
        vocabulary: names of objects and attributes.
        feasible: attribute ids of each object, CSR over objects.
        templates: texts with `{attribute}` and, usually, `{object}`.

    Raises:
        ConfigError: a template that `check_templates` refuses.
    """
    check_templates(templates)
    number: dict[str, int] = {}
    position = np.empty((len(feasible.indices), len(templates)), dtype=np.int32)
    pair = 0
    for object_id, object_name in enumerate(vocabulary.objects):
        for attribute_id in feasible.of(object_id).tolist():
            attribute_name = vocabulary.attributes[attribute_id]
            for column, template in enumerate(templates):
                text = template.format(attribute=attribute_name, object=object_name)
                position[pair, column] = number.setdefault(text, len(number))
            pair += 1
    return Prompts(text=tuple(number), position=position)
