"""How a batch is laid on a GPU: teams, blocks, shared memory, and the programs' arguments.

Nothing here touches a GPU, so that the emulated programs of the tests are launched the same way.
"""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from vlal_dist.errors import ConfigError
from vlal_dist.kernels import nvrtc
from vlal_dist.kernels.arguments import KINDS, Asked, Outputs, Tensors, draw_alone, pack

THREADS = 256
_LONG_ROW = 4096
"""Attributes above which a whole block works on a row."""


class Launch(NamedTuple):
    """How the rows of a batch are laid on the device.

    Attributes:
        team: lanes that work on a row.
        blocks: of `THREADS` threads.
        shared: bytes of shared memory of a block.
        keys_shared: whether the race keys have their place there, or in device memory.
    """

    team: int
    blocks: int
    shared: int
    keys_shared: bool


def plan_launch(*, rows: int, attributes: int, drawable: int, most_shared: int) -> Launch:
    """Teams, blocks and memory for a batch.

    Args:
        rows: B >= 1.
        attributes: A >= 1.
        drawable: attributes of the greatest feasible set; 0 without a draw.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: the codes of one row do not fit, one byte for each attribute.
    """
    team = nvrtc.WARP if attributes <= _LONG_ROW else nvrtc.BLOCK
    teams = THREADS // team
    codes, keys = (attributes + 15) // 16 * 16, (4 * drawable + 15) // 16 * 16
    # A lane counts the codes of four attributes at a time, in bytes.
    if teams * codes + STATIC > most_shared or attributes > 255 * 4 * team:
        raise ConfigError(f"{attributes} attributes exceed this GPU's shared memory")
    keys_shared = teams * (codes + keys) + STATIC <= most_shared
    shared = teams * (codes + keys) if keys_shared else teams * codes
    return Launch(team, -(-rows // teams), shared, keys_shared)


STATIC = 1024
"""Shared memory that the program itself declares, at most."""


class Prepared(NamedTuple):
    """A call, ready to be launched.

    Attributes:
        settings: what the program of the rows is compiled for.
        launch: how it is launched; the program of the totals is one block.
        arguments: of both programs.
        outputs: losses, gradient, sums and counts, not written yet.
        held: what must live until the launch.
    """

    settings: nvrtc.Settings
    launch: Launch
    arguments: bytes
    outputs: Outputs
    held: list[Tensor]


def prepare(
    tensors: Tensors, *, largest: int, most_shared: int, **asked: Unpack[Asked]
) -> Prepared:
    """Outputs and arguments of a batch that is not empty.

    Args:
        tensors, largest, asked: of `cuda.run`.
        most_shared: bytes of shared memory that a block can have.

    Raises:
        ConfigError: a row is too long.
    """
    logits = tensors["logits"]
    assert logits is not None
    rows, attributes = logits.shape
    draws = asked["mode"] == "draw" and asked["num_ignore"] > 0
    drawable = (largest or attributes) if draws else 0
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    outputs = outputs_for(tensors)
    made = dict(zip(("per_row", "gradient", "sums", "counts"), outputs, strict=True))
    made["partial"] = logits.new_empty(launch.blocks, 9, dtype=torch.float32)
    if not launch.keys_shared:
        made["keys"] = logits.new_empty(rows, drawable, dtype=torch.int32)
    arguments = pack({**tensors, **made}, attributes=attributes, largest=drawable, **asked)
    settings = nvrtc.Settings.of(asked, kind=KINDS[logits.dtype], team=launch.team)
    return Prepared(settings, launch, arguments, outputs, list(made.values()))


def prepare_draw(
    tensors: Tensors,
    attributes: int,
    num_ignore: int,
    over_unannotated: bool,
    *,
    largest: int,
    most_shared: int,
) -> tuple[nvrtc.Settings, Launch, bytes, list[Tensor]]:
    """Program, launch, arguments and what must live until then, of a draw without a loss."""
    object_id = tensors["object_id"]
    assert object_id is not None
    drawable, rows = largest or attributes, len(object_id)
    launch = plan_launch(
        rows=rows, attributes=attributes, drawable=drawable, most_shared=most_shared
    )
    made: dict[str, Tensor] = {}
    if not launch.keys_shared:
        made["keys"] = object_id.new_empty(rows, drawable, dtype=torch.int32)
    asked = draw_alone(num_ignore, over_unannotated)
    arguments = pack({**tensors, **made}, attributes=attributes, largest=drawable, **asked)
    settings = nvrtc.Settings.of(asked, kind=0, team=launch.team)
    return settings, launch, arguments, list(made.values())


def outputs_for(tensors: Tensors) -> Outputs:
    """Losses, gradient, sums and counts, to be written."""
    logits, gradient = tensors["logits"], tensors.get("gradient")
    assert logits is not None
    return (
        logits.new_empty(len(logits), dtype=torch.float32),
        logits.new_empty(logits.shape) if gradient is None else gradient,
        logits.new_empty(5, dtype=torch.float64),
        logits.new_empty(5, dtype=torch.int64),
    )
