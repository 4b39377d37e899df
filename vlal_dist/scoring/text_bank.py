"""The text bank: one unit vector per feasible (object, attribute) pair, computed once per scorer.

The first worker to need it encodes the different prompts, averages templates and commits the file;
all others, on any node and in any later run, read those very bytes.

Legend: S feasible pairs, T templates, D embedding width.
"""

import bisect
import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from threading import Event

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from vlal_dist.data.format.dataset import Dataset
from vlal_dist.errors import (
    ConfigError,
    ConflictError,
    DataError,
    NotFoundError,
    Stopped,
    VlalError,
    bounded,
)
from vlal_dist.remarks import remark
from vlal_dist.scoring.clip import ClipEncoder
from vlal_dist.storage.store import Store

logger = logging.getLogger(__name__)

SHORTEN = (
    "shorten the longest attribute or object name (clean.renames, or the annotation files; then "
    "clean and pack again), or scoring.templates"
)
"""Remedy of prompts that are too long."""

Templates = Sequence[str] | Mapping[str, Sequence[str]]
"""Templates of all attributes, or by attribute type."""
DEFAULT = "default"
"""Key of the templates of attribute types that are not named."""

TextBank = npt.NDArray[np.float32]
"""float32 [S, D], unit length; row s is pair s of the feasible sets (CSR order)."""


def ensure_bank(
    store: Store,
    encoder: ClipEncoder,
    dataset: Dataset,
    *,
    templates: Templates,
    scorer_digest: str,
    stop: Event,
) -> TextBank:
    """The bank that is committed in the score root; encoded and committed if there is none.

    Raises:
        ConfigError, Stopped: as `encode_bank`.
        DataError: as `encode_bank` and `read_bank`.
    """
    num_pairs = len(dataset.feasible.indices)
    with contextlib.suppress(NotFoundError):
        return read_bank(store, scorer_digest=scorer_digest, num_pairs=num_pairs)
    bank = encode_bank(encoder, dataset, templates, stop=stop)
    data = safetensors.numpy.save({"embedding": bank}, metadata={"scorer_digest": scorer_digest})
    try:
        store.create(bank_key(scorer_digest), data)
        return bank
    except ConflictError:  # another worker's came first, and stands
        return read_bank(store, scorer_digest=scorer_digest, num_pairs=num_pairs)


def bank_key(scorer_digest: str) -> str:
    """Storage key of the text bank of one scorer."""
    return f"text-{scorer_digest[:16]}.safetensors"


def read_bank(store: Store, *, scorer_digest: str, num_pairs: int) -> TextBank:
    """Read a committed bank of S = `num_pairs` vectors.

    Raises:
        NotFoundError: none is committed yet.
        DataError: damaged, or of another length.
    """
    key = bank_key(scorer_digest)
    try:
        bank: TextBank = safetensors.numpy.load(store.read(key))["embedding"]
    except VlalError:
        raise
    except Exception as error:  # tensors of others raise any type, OverflowError too
        raise DataError(
            f"{store.url}/{key} is damaged ({bounded(repr(error))}); delete it and rerun"
        ) from None
    if bank.dtype != np.float32 or not np.isfinite(bank).all():
        raise DataError(f"{store.url}/{key} holds no float32 vectors; delete it and rerun")
    if bank.ndim != 2 or len(bank) != num_pairs:
        raise DataError(
            f"{store.url}/{key} holds {bank.shape} vectors, the feasible sets have {num_pairs} "
            "pairs; delete it and rerun"
        )
    return bank


def encode_bank(
    encoder: ClipEncoder, dataset: Dataset, templates: Templates, *, stop: Event
) -> TextBank:
    """Encode each different prompt once; a pair's vector is the mean over templates, normalised.

    Raises:
        ConfigError: a template that cannot be filled.
        DataError: no object has a feasible attribute.
        Stopped: `stop` was set.
    """
    prompts, position = build_prompts(dataset, templates)
    if not prompts:
        raise DataError("no object has a feasible attribute, so there is nothing to score")
    logger.info("text bank: %d prompts for %d pairs", len(prompts), len(position))
    batches = []
    for start in range(0, len(prompts), encoder.batch_size):
        if stop.is_set():
            raise Stopped("stopped while encoding prompts; repeat the command to start them again")
        batches.append(encoder.encode_texts(prompts[start : start + encoder.batch_size]))
    vectors = np.concatenate(batches)
    total = np.zeros((len(position), vectors.shape[1]), dtype=np.float32)
    for column in position.T:
        total += vectors[column]
    bank: TextBank = total / np.linalg.norm(total, axis=1, keepdims=True)
    return bank


def build_prompts(
    dataset: Dataset, templates: Templates
) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Fill every template for every feasible pair.

    Args:
        dataset: its vocabulary names the pairs of its feasible sets.
        templates: texts with `{attribute}` and, usually, `{object}`; or such texts by type.

    Returns:
        The different prompts, in the order of their first use; and int32 [S, T], which of them
        pair s has under template t. With lists of several lengths T is their common multiple.

    Raises:
        ConfigError: a template that `check_templates` refuses, or an unknown attribute type.
    """
    check_templates(templates)
    names = dataset.vocabulary
    lists = templates_by_type(templates)
    if unknown := sorted(set(lists) - {DEFAULT, *names.attribute_type}):
        known = bounded(", ".join(sorted(set(names.attribute_type))))
        raise ConfigError(
            f"scoring.templates.{bounded(unknown[0])}: no such attribute type; types of this "
            f"dataset (clean.attribute_types): {known}"
        )
    # A shorter list is repeated, which leaves the mean of its vectors what it is.
    count = math.lcm(*map(len, lists.values()))
    whole = {kind: [*some] * (count // len(some)) for kind, some in lists.items()}
    of = [whole.get(kind, whole[DEFAULT]) for kind in names.attribute_type]
    number: dict[str, int] = {}
    position = [
        [
            number.setdefault(
                template.format(attribute=names.attributes[attribute_id], object=object_name),
                len(number),
            )
            for template in of[attribute_id]
        ]
        for object_id, object_name in enumerate(names.objects)
        for attribute_id in dataset.feasible.of(object_id).tolist()
    ]
    shape = (len(position), count)
    return list(number), np.array(position, dtype=np.int32).reshape(shape)


def check_prompts(encoder: ClipEncoder, dataset: Dataset, templates: Templates) -> None:
    """Refuse prompts that the model's tokenizer cannot tell apart; warn of those that it cuts.

    Args:
        encoder: the model.
        dataset: names the feasible pairs.
        templates: texts with `{attribute}`.

    Raises:
        ConfigError: prompts are equal after the cut, and a template alone is too long.
        DataError: as `check_texts`; or two attributes of an object have equal tokens in every
            template, so that their likelihoods would be equal.
    """
    prompts, position = build_prompts(dataset, templates)
    if not prompts:
        return
    every = [one for some in templates_by_type(templates).values() for one in some]
    least = [template.format(attribute="a", object="a") for template in every]
    too_long = [every[place] for place in np.flatnonzero(encoder.tokens(least)[1]).tolist()]
    try:
        same = check_texts(
            encoder,
            prompts,
            kind="prompts",
            remedy=SHORTEN,
        )
    except DataError:
        if not too_long:
            raise
        raise ConfigError(
            f"scoring.templates: {shortened(too_long[0])} is longer than the "
            f"{encoder.context_length} tokens that the model reads, and different attributes give "
            "the same prompt; shorten it"
        ) from None
    names, sets = dataset.vocabulary, dataset.feasible
    objects = np.repeat(np.arange(sets.num_objects), np.diff(sets.indptr))
    rows = np.column_stack([objects, same[position]])
    _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which.reshape(-1)] != np.arange(len(rows)))
    if len(again):
        pair, other = again[0], first[which.reshape(-1)[again[0]]]
        one, two = (names.attributes[sets.indices[place]] for place in (other, pair))
        raise DataError(
            f"{len(again)} attributes have the tokens of another attribute of their object, as "
            "tokenizers drop case, spaces and some punctuation: their likelihoods would be equal. "
            f"The first are {shortened(one)} and {shortened(two)} of "
            f"{shortened(names.objects[objects[pair]])}; make them one attribute in the "
            "annotation files, or delete one (clean.deleted_attributes), then clean and pack again"
        )


def check_texts(
    encoder: ClipEncoder, texts: Sequence[str], *, kind: str, remedy: str
) -> npt.NDArray[np.int64]:
    """Warn of texts that are cut at the model's context length; refuse those that are equal then.

    Args:
        encoder: the model.
        texts: different texts.
        kind: what they are, plural.
        remedy: what the user can do.

    Returns:
        int64 [n]: place of the first text with the same tokens.

    Raises:
        DataError: two different texts have the same tokens because one is cut.
    """
    ids, cut = encoder.tokens(texts)
    seen: dict[bytes, int] = {}
    same = np.array([seen.setdefault(row.tobytes(), place) for place, row in enumerate(ids)])
    equal = np.flatnonzero((same != np.arange(len(texts))) & (cut | cut[same]))
    if len(equal):
        one, two = texts[same[equal[0]]], texts[equal[0]]
        raise DataError(
            f"{len(equal)} {kind} are the same as others to the model, which reads "
            f"{encoder.context_length} tokens and no more: the first are {shortened(one)} and "
            f"{shortened(two)}; {remedy}"
        )
    _remark_on_cut(encoder, texts, cut, kind=kind, remedy=remedy)
    return same


def remark_on_cut_prompts(encoder: ClipEncoder, dataset: Dataset, templates: Templates) -> None:
    """Warn of cut prompts where `check_prompts` has passed before; reads the long ones alone.

    A token is a byte or more, so a text of fewer bytes than the model reads tokens is not cut.
    """
    prompts = build_prompts(dataset, templates)[0]
    room = encoder.context_length - 2  # less the marks of beginning and end
    cut = np.array([len(text.encode()) > room for text in prompts], dtype=np.bool_)
    if cut.any():
        cut[cut] = encoder.tokens([prompts[place] for place in np.flatnonzero(cut).tolist()])[1]
    _remark_on_cut(encoder, prompts, cut, kind="prompts", remedy=SHORTEN)


def _remark_on_cut(
    encoder: ClipEncoder,
    texts: Sequence[str],
    cut: npt.NDArray[np.bool_],
    *,
    kind: str,
    remedy: str,
) -> None:
    """Warn of cut texts: how many, and what the model does not see of the first."""
    if not cut.any():
        return
    first = texts[int(np.argmax(cut))]
    words = first.split()
    whole = bisect.bisect_left(
        range(1, len(words)),
        True,
        key=lambda end: bool(encoder.tokens([" ".join(words[:end])])[1][0]),
    )
    remark(
        logger,
        "scoring.templates",
        "%d of %d %s are longer than the %d tokens that the model reads; the first is %s, of "
        "which it does not see all of %s; %s",
        cut.sum(),
        len(texts),
        kind,
        encoder.context_length,
        shortened(first),
        shortened(" ".join(words[whole:])),
        remedy,
    )


def shortened(text: str) -> str:
    """A text in quotes, its middle left out where it is long."""
    return repr(text if len(text) <= 90 else f"{text[:40]} ... {text[-45:]}")


def templates_by_type(templates: Templates) -> dict[str, Sequence[str]]:
    """Lists of templates by attribute type; a plain list is that of `DEFAULT`."""
    return dict(templates) if isinstance(templates, Mapping) else {DEFAULT: templates}


def check_templates(templates: Templates) -> None:
    """Refuse templates that cannot be filled from an attribute and an object name.

    Raises:
        ConfigError: no template, anything but `{attribute}` and `{object}` in braces, or no
            `{attribute}`; a mapping without `default`.
    """
    lists = templates_by_type(templates)
    if DEFAULT not in lists:
        raise ConfigError(
            f"scoring.templates lacks {DEFAULT}: give the list of the other attribute types"
        )
    if not all(lists.values()):
        raise ConfigError("scoring.templates is empty; give at least one prompt template")
    for template in (one for some in lists.values() for one in some):
        rest = template.replace("{{", "").replace("}}", "")  # braces as they are written in prompts
        if set("{}") & set(rest.replace("{attribute}", "").replace("{object}", "")):
            raise ConfigError(
                f"scoring.templates: {template!r}: allowed are {{attribute}} and {{object}}, "
                "nothing else in braces"
            )
        if "{attribute}" not in rest:
            raise ConfigError(
                f"scoring.templates: {template!r} lacks {{attribute}}: all attributes of an "
                "object would score the same; add it"
            )
