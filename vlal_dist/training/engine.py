"""DeepSpeed engine: forward, backward, reduction, optimizer step. Only this module imports it.

Behaviour of 0.19.8 that we rely on, tested by `tests/training/test_gradients.py`:

- `gradient_allreduce_op: sum` skips every division by the world size, for ZeRO 0, 1 and 2.
- `backward(loss, scale_wrt_gas=False)` skips the division by the accumulation steps.
- `gradient_clipping` is 1.0 by default; 0 turns it off.
- `set_gradient_accumulation_boundary` says which backward pass reduces; DeepSpeed's own counter of
  micro-steps is then unused, so the number of micro-batches of a step is ours to choose.
- With ZeRO 0 `backward` ends with `allreduce_gradients()`, which does nothing before the boundary.
  Within `no_sync()` it leaves that out, and we call it afterwards: the same sum, timed by itself.
"""

import gc
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlal_dist.config.sections import TrainingConfig
from vlal_dist.errors import ConfigError, extras_named
from vlal_dist.training.optimizer_state import (
    adam_tensors,
    check_adam,
    gather_adam,
    restore_adam,
    scatter_adam,
)
from vlal_dist.training.ranks import Ranks


class Engine:
    """A model, its Adam, and the reduction of gradients over ranks.

    Args:
        model: (image, object_id) -> logits; moved to the ranks' device, rank 0's weights win.
        groups: parameter groups, each with `name`, `params`, `lr`, `weight_decay`.
        ranks: this process among its peers (the process group exists).
        config: `batch_size`, `zero_stage`, `precision` (`auto`: bf16 on a GPU).
        micro_batches: forward passes of each rank in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        ranks: Ranks,
        config: TrainingConfig,
        *,
        micro_batches: int,
    ) -> None:
        # torch's Adam adds the decay to the gradient (coupled L2, as the authors'); DeepSpeed's
        # own FusedAdam would decouple it, and compile at first use.
        self.optimizer = torch.optim.Adam(groups)
        self.zero_stage = config.zero_stage
        settings: dict[str, object] = {
            "train_micro_batch_size_per_gpu": -(
                -config.batch_size // (ranks.world_size * micro_batches)
            ),
            "gradient_accumulation_steps": micro_batches,
            "gradient_allreduce_op": "sum",
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default would clip to norm 1
        }
        on_gpu = ranks.device.type == "cuda"
        if config.precision == "bf16" or (config.precision == "auto" and on_gpu):
            # No module is "safe" to reduce in bfloat16: gradients are summed in float32.
            settings["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        self._engine, *_ = _import_deepspeed(ranks.device).initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        self.module = cast(nn.Module, self._engine.module)

    def __call__(self, image: Tensor, object_id: Tensor) -> Tensor:
        """Logits [B, A]."""
        return cast(Tensor, self._engine(image, object_id))

    @property
    def reduces_apart(self) -> bool:
        """Whether `reduce` sums the gradients over ranks; with ZeRO 1 and 2 `backward` does."""
        return self.zero_stage == 0

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a micro-batch; `last`: of a step, which `reduce` must follow."""
        self._engine.set_gradient_accumulation_boundary(last)
        with self._engine.no_sync() if self.reduces_apart else nullcontext():
            self._engine.backward(loss, scale_wrt_gas=False)

    def reduce(self) -> None:
        """Sum the gradients of a step over ranks, if `backward` has not."""
        if self.reduces_apart:
            self._engine.allreduce_gradients()

    def step(self) -> None:
        """Apply the summed gradient and clear it."""
        self._engine.step()

    def gradients(self) -> list[Tensor]:
        """Summed gradients after the last backward pass; with ZeRO 1 and 2 this rank's pieces."""
        if self.zero_stage:
            groups = self._engine.optimizer.averaged_gradients.values()
            return [piece for group in groups if group is not None for piece in group]
        found = [parameter.grad for parameter in self.module.parameters()]
        return [gradient for gradient in found if gradient is not None]

    def optimizer_tensors(self, *, keep: bool) -> dict[str, Tensor]:
        """Adam's whole state (optimizer_state.py), equal for any ZeRO stage; every rank must call.

        Args:
            keep: whether this rank needs it; otherwise it may get nothing.
        """
        if self.zero_stage:
            return gather_adam(self.module, self._engine.optimizer, keep=keep)
        return adam_tensors(self.module, self.optimizer) if keep else {}

    def restore_optimizer(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Undo `optimizer_tensors`, of any stage and world size; restore the weights before.

        Raises:
            DataError: a parameter's state is missing.
        """
        check_adam(self.module, tensors, where=where)
        if self.zero_stage:
            scatter_adam(self.module, self._engine.optimizer, tensors)
        else:
            restore_adam(self.module, self.optimizer, tensors)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of each parameter group by its `name`."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rates[group["name"]]


def leave_ranks() -> None:
    """Destroy the process group; call it when no engine is referenced any more.

    Destroying a process group that an engine still holds can abort the finished process
    ("terminate called without an active exception"): with bfloat16 9 of 56 exits did, none of 48
    after the engine had been collected.
    """
    gc.collect()
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()  # also lets go of the groups that DeepSpeed keeps
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, without its compilation on first use."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    modules = cast("dict[str, Any]", sys.modules)
    # Its unused autotuner imports mlflow where it is installed: 1.3 s of each rank.
    hides_mlflow = modules.setdefault("mlflow", None) is None
    try:
        with extras_named():
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"DeepSpeed cannot be imported ({error}); run: pip install 'vlal-dist[train]'"
        ) from None
    finally:
        if hides_mlflow:
            del modules["mlflow"]
    # On CPU it would compile a shared-memory all-reduce (30 s, g++, ninja) that only its inference
    # uses; marked as incompatible, training stays on torch's gloo.
    compatible = cast("dict[str, bool]", deepspeed.ops.__compatible_ops__)
    compatible["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
