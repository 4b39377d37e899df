"""What the ranks of `run_ranks` import, once for all of them: it takes longer than all they do."""

import importlib

import torch

from tests.kernels import cases as kernel_cases
from tests.training import cases
from vlal_dist.training import ranks, step
from vlal_dist.training.engine import _import_deepspeed

__all__ = ["cases", "kernel_cases", "ranks", "step"]

_import_deepspeed(torch.device("cpu"))
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # by every ZeRO stage
