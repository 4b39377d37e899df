"""Adam's state as flat tensors: PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step."""

from collections.abc import Mapping
from typing import Any, Protocol

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
