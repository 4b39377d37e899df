"""Adam's state as flat tensors, for any ZeRO stage and number of ranks.

ZeRO flattens each parameter group and gives every rank one piece of it, with the optimizer state of
that piece. DeepSpeed's own checkpoints keep these pieces, as pickles that only the same number of
ranks can read. Here each parameter's state is put together from the pieces (one all-reduce a
tensor), so that the files are those of ZeRO 0 and a run may change both its stage and its ranks.

`get_full_hp_param` and `set_full_hp_param` are what DeepSpeed's documented `safe_get_full_...` and
`safe_set_full_...` call; `tests/training/test_zero.py` holds what we rely on in 0.19.8.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlal_dist.errors import DataError

KEYS = ("step", "exp_avg", "exp_avg_sq")


class AdamLike(Protocol):
    """What is needed of an optimizer: per-parameter state."""

    state: Any


def adam_tensors(model: nn.Module, optimizer: AdamLike) -> dict[str, Tensor]:
    """The state, on the CPU; nothing before the first step."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def check_adam(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse a state that is not this model's; none at all is that of a run without a step.

    Raises:
        DataError: a parameter's state is missing or has another shape.
    """
    for name, parameter in model.named_parameters() if tensors else ():
        missing = [f"{name}.{key}" for key in KEYS if f"{name}.{key}" not in tensors]
        if missing:
            raise DataError(
                f"{where}: the optimizer's state lacks {', '.join(missing)}; resume an earlier one"
            )
        for key in KEYS[1:]:
            if (found := tensors[f"{name}.{key}"].shape) != parameter.shape:
                raise DataError(
                    f"{where}: the optimizer's state holds {name} as {tuple(found)}, the model has "
                    f"{tuple(parameter.shape)}; use the model settings of the run"
                )


def restore_adam(model: nn.Module, optimizer: AdamLike, tensors: Mapping[str, Tensor]) -> None:
    """Put `adam_tensors`' values back; `check_adam` has seen them."""
    for name, parameter in model.named_parameters() if tensors else ():
        step, average, square = (tensors[f"{name}.{key}"] for key in KEYS)
        optimizer.state[parameter] = {
            "step": step.clone(),  # torch's Adam counts steps on the CPU
            "exp_avg": average.to(parameter.device, copy=True),
            "exp_avg_sq": square.to(parameter.device, copy=True),
        }


MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_adam(model: nn.Module, zero: Any, *, keep: bool) -> dict[str, Tensor]:
    """Every parameter's Adam state as NAME.exp_avg, NAME.exp_avg_sq, NAME.step; every rank calls.

    Args:
        model: whose parameters are named.
        zero: DeepSpeed's ZeRO 1 or 2 optimizer.
        keep: whether this rank wants the tensors (on the CPU); otherwise they are empty.

    Returns:
        Nothing before the first step.
    """
    if not _has_stepped(zero):
        return {}
    _link(zero)
    found: dict[str, Tensor] = {}
    for name, parameter, flat in _parameters(model, zero):
        for key in MOMENTS:
            whole = parameter.get_full_hp_param(key)
            if keep:
                found[f"{name}.{key}"] = whole.detach().cpu().contiguous()
        if keep:
            found[f"{name}.step"] = zero.optimizer.state[flat]["step"].detach().cpu().clone()
    return found


def scatter_adam(model: nn.Module, zero: Any, tensors: Mapping[str, Tensor]) -> None:
    """Put what `gather_adam` found, and the model's present weights, into this rank's pieces.

    Args:
        model: with the weights of the checkpoint.
        zero: DeepSpeed's ZeRO 1 or 2 optimizer.
        tensors: of names and shapes that fit the model; none: the run has not made a step.
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


def own_gradients(zero: Any) -> list[Tensor]:
    """This rank's pieces of the summed gradient, after the last backward pass of a step."""
    groups = zero.averaged_gradients.values()
    return [piece for group in groups if group is not None for piece in group]


def _parameters(model: nn.Module, zero: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, parameter, this rank's flat piece of its group; in an order that all ranks share."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            yield names[parameter], parameter, flat


def _has_stepped(zero: Any) -> bool:
    return bool(zero.optimizer.state.get(zero.single_partition_of_fp32_groups[0]))


def _link(zero: Any) -> None:
    """Show parameters their state's pieces.

    DeepSpeed does so once, after the step of the first group, when the other groups have no state.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
