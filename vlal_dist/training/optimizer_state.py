"""Adam's state as one tensor per parameter, for any ZeRO stage and number of ranks.

ZeRO 1 and 2 flatten each parameter group and give every rank one piece of it, with the optimizer
state of that piece. DeepSpeed's own checkpoints keep these pieces as pickles that only the same
number of ranks can read. Here each parameter's state is put together from the pieces (one
all-reduce a tensor), so that the files equal those of ZeRO 0.

`get_full_hp_param` and `set_full_hp_param` are what DeepSpeed's documented `safe_get_full_...` and
`safe_set_full_...` call; `tests/training/test_zero.py` tests what we rely on in 0.19.8.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlal_dist.errors import DataError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_adam(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse an incomplete state; an empty one is that of a run without a step.

    Shapes fit where the weights of the same checkpoint fit the model.

    Raises:
        DataError: a parameter's state is missing.
    """
    names = [f"{n}.{key}" for n, _ in model.named_parameters() for key in ("step", *MOMENTS)]
    missing = [name for name in names if name not in tensors]
    if tensors and missing:
        raise DataError(
            f"{where}: the optimizer's state lacks {', '.join(missing[:3])}; resume an earlier one"
        )


def adam_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """NAME.step, NAME.exp_avg, NAME.exp_avg_sq of each parameter, on the CPU.

    Nothing before the first step.
    """
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_adam(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undo `adam_tensors`; the tensors have passed `check_adam`."""
    for name, parameter in model.named_parameters() if tensors else ():
        optimizer.state[parameter] = {
            "step": tensors[f"{name}.step"].clone(),  # torch's Adam counts steps on the CPU
            **{k: tensors[f"{name}.{k}"].to(parameter.device, copy=True) for k in MOMENTS},
        }


def gather_adam(model: nn.Module, zero: Any, *, keep: bool) -> dict[str, Tensor]:
    """`adam_tensors` under ZeRO 1 and 2; every rank must call.

    Args:
        model: with the names of the parameters.
        zero: DeepSpeed's optimizer.
        keep: whether this rank needs the tensors; otherwise it gets none.
    """
    if not zero.optimizer.state.get(zero.single_partition_of_fp32_groups[0]):
        return {}  # before the first step
    _link(zero)
    found: dict[str, Tensor] = {}
    for name, parameter, flat in _parameters(model, zero):
        whole = {key: parameter.get_full_hp_param(key) for key in MOMENTS}
        if keep:
            found |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in whole.items()}
            found[f"{name}.step"] = zero.optimizer.state[flat]["step"].detach().cpu().clone()
    return found


def scatter_adam(model: nn.Module, zero: Any, tensors: Mapping[str, Tensor]) -> None:
    """Undo `gather_adam`; also copies the model's present weights into ZeRO's float32 pieces.

    Args:
        model: with the weights of the checkpoint.
        zero: DeepSpeed's optimizer.
        tensors: have passed `check_adam`; empty: the run has not made a step.
    """
    for _, parameter, flat in _parameters(model, zero):
        parameter.set_full_hp_param(parameter.data.float())
        if tensors and flat not in zero.optimizer.state:
            zero.optimizer.state[flat] = {key: torch.zeros_like(flat.data) for key in MOMENTS}
    if not tensors:
        return
    _link(zero)
    for name, parameter, flat in _parameters(model, zero):
        for key in MOMENTS:
            parameter.set_full_hp_param(tensors[f"{name}.{key}"].to(parameter.device), key)
        # One count for the group: Adam steps all of its parameters together.
        zero.optimizer.state[flat]["step"] = tensors[f"{name}.step"].clone()


def _parameters(model: nn.Module, zero: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameter, this rank's flat piece of its group; in an order that all ranks share."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            yield names[parameter], parameter, flat


def _link(zero: Any) -> None:
    """Link parameters to the pieces of their state.

    DeepSpeed does so once, after the step of the first group, when the other groups have no state.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
