"""Vocabulary: object and attribute names with their ids, attribute groups, and a digest.

Ids are positions in the sorted tuples of names. The digest covers names and order alone, so
datasets that share a vocabulary can be mixed, and files of another vocabulary are refused.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

from vlal_dist.errors import DataError

PREVALENCES = ("head", "medium", "tail")
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
        try:
            columns = [
                tuple(str(name) for name in values[key])  # type: ignore[attr-defined]
                for key in ("objects", "attributes", "attribute_type", "prevalence")
            ]
            stated = values["digest"]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"vocabulary.json: {error} is missing or malformed; run vlal clean again"
            ) from None
        vocabulary = cls(*columns)
        if vocabulary.digest != stated:
            raise DataError(
                f"vocabulary.json records digest {stated}, but its names have {vocabulary.digest}: "
                "it was edited; run vlal clean again"
            )
        return vocabulary
