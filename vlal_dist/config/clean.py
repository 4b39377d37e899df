"""Knobs of `shard_tools clean`: Sec. 3.1 of the paper and the authors' cleaning notebook."""

from typing import Literal

from pydantic import Field

from vlal_dist.config.section import Section


class CleanSection(Section):
    """From annotation files to instances, vocabulary and feasible sets."""

    annotations: dict[str, list[str]] = Field(
        default_factory=dict,
        description="split name -> annotation JSON files, in reading order (paths)",
    )
    attribute_types: str | None = Field(
        None, description="JSON: type -> attribute names (path; VAW's attribute_types.json)"
    )
    attribute_parent_types: str | None = Field(
        None, description="JSON: parent type -> types (path; VAW's attribute_parent_types.json)"
    )
    head_tail: str | None = Field(
        None,
        description="JSON: head/medium/tail -> attribute names (path); absent: by training "
        "positives in VAW's shares 47/40/13 %",
    )
    min_side: float = Field(
        50.0, ge=0, description="smallest box width and height kept (pixels; Sec. 3.1)"
    )
    merge: Literal["wordnet", "table", "none"] = Field(
        "wordnet", description="how object names are merged (Sec. 3.1; authors' notebook)"
    )
    wordnet_dir: str = Field(
        "/usr/share/wordnet", description="folder of WordNet 3.0's index/data/exc files (path)"
    )
    merge_table: str | None = Field(
        None, description="saved merge table, JSON name -> representative (path; merge: table)"
    )
    renames: dict[str, str] = Field(
        default_factory=dict, description="object names rewritten after the merge (notebook)"
    )
    deleted_attributes: list[str] = Field(
        default_factory=list, description="attributes removed everywhere (notebook's 29)"
    )
    require_positive: bool = Field(
        True, description="drop instances left without a positive (needed for 170,407)"
    )
    hide: Literal["none", "vaw_density"] = Field(
        "none",
        description="training labels that are hidden, before anything is derived from them; "
        "vaw_density: an instance keeps 1 + Poisson(0.8) positives and Poisson(1.2) negatives, at "
        "most its own, as many as VAW's training crops carry (1.8 and 1.2); none: nothing is",
    )
    hide_seed: int = Field(
        0, ge=0, description="which labels are hidden; another seed is another dataset"
    )
    feasible_splits: list[str] = Field(
        default_factory=lambda: ["train"],
        description="splits whose annotations define feasibility (Sec. 2.2)",
    )
    feasible_top_k: int = Field(
        0, ge=0, description="neighbours per list for enlarged sets, 0: off (released: kn-32 -> 3)"
    )
    feasible_votes: int = Field(
        2, ge=1, description="votes that admit an attribute to an enlarged set (released: kn-32)"
    )
    object_vectors: str | None = Field(
        None,
        description="written by `score_clip --object-vectors`: safetensors with `object_vectors` "
        "float32 [O, D], CLIP text vectors of the object names in id order, and vocabulary_digest "
        "in its header (path; needed when feasible_top_k > 0)",
    )
    expected: dict[str, dict[str, int]] = Field(
        default_factory=dict,
        description="step -> counts to compare with; the first that departs is named",
    )
    max_rejected: float = Field(
        0.001, ge=0, le=1, description="share of rejected instances that is still success"
    )
