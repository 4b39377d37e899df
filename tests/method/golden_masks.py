"""Bits and draws that every backend must reproduce.

Regenerate (only when the draw is meant to change; every stored run changes with it):

    python -m tests.method.golden_masks > tests/method/golden_masks.txt
"""

import numpy as np
import torch

from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.likelihood import inverse_weights
from vlal_dist.method.philox import unit_exponential

HEADER = """\
# Written by: python -m tests.method.golden_masks > tests/method/golden_masks.txt
# clock WORD BITS: float32 bits of unit_exponential. weight DISTANCE_BITS BITS: of inverse_weights.
# mask SEED VISIT UID NUM_ATTRIBUTES NUM_IGNORE IDS: of golden_case, see golden_masks.py.
"""

# Both ends, both sides of the seam at U = 1 - sqrt(1/2), and numbers between.
WORDS = [0, 1, 255, 256, 65535, 1 << 24, 1 << 31, 0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFF00]
WORDS += [1257966786 + step for step in range(0, 60, 6)] + [
    k * 0x9E3779B1 % 2**32 for k in range(1, 21)
]
DISTANCES = [0.0, 1e-30, 1e-7, 0.34657, 0.34658, 0.5, 1.0, 10.0, 55.5, 88.0, 88.72, 88.73, 1e30]

SEEDS = (0, 99, -1, 2**40 + 7)
UIDS = (0, 1, 2**32, 2**63 - 1, -1, -(2**63))
SHAPES = ((1, 1), (3, 2), (17, 5), (64, 30), (131, 30))


def golden_case(uid: int, num_attributes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse weights and drawing set [1, A] made of integers alone."""
    mixed = (np.arange(1, num_attributes + 1) * 2654435761 + (uid & 0xFFFF) * 40503) % 4096
    log_likelihood = (mixed.astype(np.float32) * np.float32(-1 / 1024))[None]
    inverse = inverse_weights(log_likelihood[0], np.array([0, num_attributes]))
    drawable = mixed % 3 != 0
    return torch.from_numpy(inverse)[None], torch.from_numpy(drawable)[None]


def bits(values: np.ndarray) -> list[str]:
    return [f"{value:08x}" for value in values.view(np.uint32)]


def render() -> str:
    lines = []
    clocks = unit_exponential(torch.tensor(WORDS)).numpy()
    lines += [f"clock {word} {text}" for word, text in zip(WORDS, bits(clocks), strict=True)]
    distance = np.array(DISTANCES, np.float32)
    weights = inverse_weights(-distance, np.array([0, len(distance)]))
    for given, found in zip(bits(distance), bits(weights), strict=True):
        lines.append(f"weight {given} {found}")
    for seed in SEEDS:
        for visit, uid in enumerate(UIDS):
            for num_attributes, num_ignore in SHAPES:
                inverse, drawable = golden_case(uid, num_attributes)
                mask = sample_ignore_set(
                    inverse_weight=inverse,
                    drawable=drawable,
                    num_ignore=num_ignore,
                    uid=torch.tensor([uid]),
                    visit=torch.tensor([visit]),
                    seed=seed,
                )
                ids = ",".join(str(int(i)) for i in mask[0].nonzero()) or "-"
                lines.append(f"mask {seed} {visit} {uid} {num_attributes} {num_ignore} {ids}")
    return HEADER + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
