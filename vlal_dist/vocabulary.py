"""Vocabulary: object and attribute names with their ids, attribute groups, and a digest.

Ids are positions in the sorted tuples of names. The digest covers names and order alone, so
datasets that share a vocabulary can be mixed, and files of another vocabulary are refused.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from vlal_dist.contents import shown
from vlal_dist.errors import DataError

PREVALENCES = ("head", "medium", "tail")
_COLUMNS = ("objects", "attributes", "attribute_type", "prevalence")
OBJECT_VECTORS = "object_vectors"
"""Tensor in the file of object vectors: float32 [O, D], CLIP text vectors, rows in id order."""


@dataclass(frozen=True)
class Vocabulary:
    """Object and attribute names, and attribute groups.

    Attributes:
        objects: object names, id = position.
        attributes: attribute names, id = position.
        attribute_type: parent type of each attribute (VAW: color, material, ..., other).
        prevalence: head, medium or tail, of each attribute.
    """

    objects: tuple[str, ...]
    attributes: tuple[str, ...]
    attribute_type: tuple[str, ...]
    prevalence: tuple[str, ...]

    def __post_init__(self) -> None:
        for kind, names in (("object", self.objects), ("attribute", self.attributes)):
            if not names:
                raise DataError(f"vocabulary: it has no {kind}; clean the names again")
            if len(set(names)) != len(names):
                raise DataError(f"vocabulary: an {kind} name occurs twice; clean the names again")
        for kind, per_attribute in (("type", self.attribute_type), ("prevalence", self.prevalence)):
            if len(per_attribute) != len(self.attributes):
                raise DataError(
                    f"vocabulary: {len(per_attribute)} entries of {kind} for "
                    f"{len(self.attributes)} attributes; write the vocabulary again with clean"
                )

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the names in order."""
        names = [list(self.objects), list(self.attributes)]
        return hashlib.sha256(json.dumps(names, ensure_ascii=True).encode()).hexdigest()

    @cached_property
    def object_ids(self) -> dict[str, int]:
        """Object name -> id."""
        return {name: index for index, name in enumerate(self.objects)}

    @cached_property
    def attribute_ids(self) -> dict[str, int]:
        """Attribute name -> id."""
        return {name: index for index, name in enumerate(self.attributes)}

    def groups(self) -> dict[str, list[int]]:
        """Group name -> attribute ids: `overall`, head/medium/tail, then types by name."""
        groups: dict[str, list[int]] = {"overall": list(range(len(self.attributes)))}
        for name in PREVALENCES:
            groups[name] = [i for i, value in enumerate(self.prevalence) if value == name]
        for name in sorted(set(self.attribute_type)):
            groups[name] = [i for i, value in enumerate(self.attribute_type) if value == name]
        return groups

    def to_json(self) -> dict[str, object]:
        """Plain values for `vocabulary.json`."""
        return {
            "objects": list(self.objects),
            "attributes": list(self.attributes),
            "attribute_type": list(self.attribute_type),
            "prevalence": list(self.prevalence),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "Vocabulary":
        """Read `to_json`'s values (other keys are ignored).

        Raises:
            DataError: a key is missing, or the digest does not match the names.
        """
        columns = [_names(values, key) for key in _COLUMNS]
        stated = values.get("digest")
        vocabulary = cls(*columns)
        if vocabulary.digest != stated:
            raise DataError(
                f"vocabulary.json records digest {shown(stated)}, but its names have "
                f"{vocabulary.digest}: it was edited; run vlal clean again"
            )
        return vocabulary


def _names(values: dict[str, object], key: str) -> tuple[str, ...]:
    """A list of texts in `vocabulary.json`."""
    names = values.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"vocabulary.json: {key} is missing or malformed: {shown(names)}, not a list of names; "
            "run vlal clean again"
        )
    if key == "prevalence" and not set(names) <= set(PREVALENCES):
        other = next(name for name in names if name not in PREVALENCES)
        raise DataError(
            f"vocabulary.json: prevalence {shown(other)} is none of {', '.join(PREVALENCES)}; "
            "run vlal clean again"
        )
    return tuple(names)
