"""Prompts of the feasible (object, attribute) pairs (Sec. 2.2): every pair times every template.

The authors' notebook encoded every prompt again for every image. Here each different prompt occurs
once, and only pairs that are feasible occur at all: CLIP never sees "a photo of wooden sky".
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vlal_dist.errors import ConfigError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.vocabulary import Vocabulary

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
