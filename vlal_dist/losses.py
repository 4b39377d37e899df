"""The losses of Table 1 as modules for a training loop of one's own.

`SelectiveLoss` is the paper's (Eq. (1), Eq. (3), Eq. (4) and the draw of Fig. 3); the others are
the rows that it is compared with. All are called alike, so that one can be put in the other's
place: `loss(logits, labels, object_id=..., likelihood=..., sample_id=..., epoch=...)`.

The fused operator computes them where it runs (`kernels/`), on CPU and CUDA, else its PyTorch
reference. They work under `torch.compile(fullgraph=True)`; they cannot be differentiated twice.

Shapes: B rows, A attributes, O objects.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels.arguments import Draw, FeasibleTable
from vlal_dist.kernels.operator import selective_loss
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.ignore_set import psl_ignored, top_ignore_set

Reduction = Literal["mean", "sum", "none"]
Unannotated = Literal["ignore", "negative"]

_REDUCTIONS = ("mean", "sum", "none")
_NUM_IGNORE: dict[str, int | Literal["all"]] = {"ignore": "all", "negative": 0}
"""What happens to unannotated pairs, as a number of ignored ones."""


class _TableLoss(nn.Module):
    """A row of Table 1."""

    feasible_indptr: Tensor
    feasible_index: Tensor
    feasible_mask: Tensor | None
    prior: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        reduction: Reduction,
        *,
        feasible: FeasibleSets | None = None,
        prior: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ConfigError(f"reduction is {reduction!r}; give one of {', '.join(_REDUCTIONS)}")
        if not isinstance(seed, int):
            raise ConfigError(f"seed is {seed!r}; give an integer")
        self.config, self.reduction = config, reduction
        self.seed = (seed + 2**63) % 2**64 - 2**63  # its low 64 bits, in two's complement
        self._options = config.model_dump_json()
        self._largest = 0
        mask = None
        if feasible is not None:
            if not isinstance(feasible, FeasibleSets):
                raise ConfigError(
                    f"feasible is of type {type(feasible).__name__}; give FeasibleSets, "
                    "such as FeasibleSets.from_labels(object_id, labels)"
                )
            self._largest = int(np.diff(feasible.indptr).max(initial=0))
            mask = torch.from_numpy(feasible.mask(int(feasible.indices.max(initial=-1)) + 1))
            self.register_buffer("feasible_indptr", torch.tensor(feasible.indptr), persistent=False)
            self.register_buffer("feasible_index", torch.tensor(feasible.indices), persistent=False)
        self.register_buffer("feasible_mask", mask, persistent=False)
        self.register_buffer("prior", prior, persistent=False)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        object_id: Tensor | None = None,
        likelihood: Tensor | None = None,
        sample_id: Tensor | None = None,
        epoch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch; what a loss does not need is not looked at.

        Values are checked where they are: on CUDA by an assertion on the device, without waiting.

        Args:
            logits: float32, bfloat16, float16 or float64 [B, A].
            labels: [B, A] of any integer or float type: +1 present, -1 absent, 0 unannotated.
            object_id: integers [B], each in 0..O-1; needed with `feasible`, else not used.
            likelihood: floating [B, A], g of Eq. (2) up to a factor for each row: >= 0, finite,
                0 where infeasible; needed where attributes are drawn. Attributes of likelihood 0
                are not drawn. No gradient flows to it.
            sample_id: integers [B], names of the samples, the same in every epoch.
            epoch: how often the samples have been visited before, or [B], by sample. With
                `sample_id`, the draw is a function of seed, sample_id and epoch alone, and that of
                `vlal train`; without both it comes from torch's default generator, alike in
                processes that are seeded alike.

        Returns:
            A scalar, or [B] with `reduction="none"`; float32, or float64 of float64 logits.

        Raises:
            ValueError: a tensor that does not fit or is missing, or a value that is not allowed
                (on CUDA: a device-side assertion).
        """
        if epoch is not None and not isinstance(epoch, Tensor):
            epoch = torch.full((), epoch, device=logits.device)
        arguments = (
            logits.detach(),
            labels.detach(),
            [
                object_id,
                None if likelihood is None else likelihood.detach(),
                sample_id,
                epoch,
                self.feasible_mask,
                self.prior,
            ],
            self.seed,
        )
        if torch.compiler.is_compiling():
            inputs = compiled_inputs(*arguments, self._options)
        else:
            inputs = _operator_inputs(*arguments, self.config)
        label, objects, chosen, uid, visit, seed = inputs
        ignored = chosen if chosen.dtype == torch.bool else Draw(None, chosen, uid, visit, seed)
        per_row = selective_loss(
            logits,
            label=label,
            object_id=objects,
            feasible=self._table(logits),
            ignored=ignored,
            loss=self.config,
        ).per_row
        if self.reduction == "none":
            return per_row
        total = per_row.sum()
        return total if self.reduction == "sum" else total / max(per_row.numel(), 1)

    def _table(self, logits: Tensor) -> FeasibleTable:
        """The sets; without any, one object for which every attribute is feasible."""
        if self.feasible_mask is not None:
            return FeasibleTable(self.feasible_indptr, self.feasible_index, self._largest)
        size = logits.shape[-1] if logits.dim() else 0
        index = torch.arange(size, dtype=torch.int32, device=logits.device)
        return FeasibleTable(torch.arange(2, device=logits.device) * size, index, size)

    def extra_repr(self) -> str:
        """Settings, as `print` shows them."""
        shown: dict[str, Any] = {"num_ignore": self.config.num_ignore, "gammas": self.config.gammas}
        shown |= {"margin": self.config.margin, "reduction": self.reduction}
        if self.feasible_mask is not None:
            shown["objects"] = len(self.feasible_mask)
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class SelectiveLoss(_TableLoss):
    """The paper's loss: likely attributes without an annotation are left out of it by draw.

    Each pair of row and attribute has one term: Eq. (1) where it is annotated; Eq. (3) where not,
    with an exponent of its own for attributes that the object can have and for others; and none
    where Fig. 3 drew it (Eq. (4)). `method/selective_loss.py` has the table.

    Args:
        num_ignore: NUM_IGNORE, attributes drawn per row (Fig. 3): 0 or more, or "all" feasible.
        feasible: Omega_o of every object (Sec. 2.2); None: every attribute is feasible.
        gammas: exponents of pairs annotated present, annotated absent, feasible, infeasible.
        margin: m in [0, 1): the probability p of pairs that are not annotated present is replaced
            by max(p - m, 0) (the authors' code; the paper prints no margin: 0).
        detach_focal: no gradient through the focusing weight (the authors' code).
        draw_over: the drawing set: all "feasible" attributes, where drawing an annotated one takes
            a place and has no effect, or those that are "unannotated".
        draw: "random", or the "top" ones by likelihood, the same at each visit.
        reduction: "mean" over rows of the sum over attributes, "sum" (the authors'), or "none" for
            the losses of rows. The mean of no rows is 0.
        seed: of draws by `sample_id` and `epoch` (`vlal train`: training.seed, 99).

    Raises:
        ConfigError: a setting is out of range (a ValueError).

    Example:
        >>> import torch, vlal_dist as vlal
        >>> loss = vlal.SelectiveLoss(num_ignore=2, gammas=(0, 0, 0, 0), margin=0)
        >>> logits = torch.zeros(1, 4, requires_grad=True)
        >>> labels = torch.tensor([[1, 0, 0, 0]])
        >>> likelihood = torch.tensor([[0.0, 0.5, 0.0, 0.5]])  # draws the second and the fourth
        >>> value = loss(logits, labels, likelihood=likelihood)
        >>> round(value.item(), 4)  # 2 pairs of log 2
        1.3863
        >>> value.backward()
        >>> logits.grad
        tensor([[-0.5000,  0.0000,  0.5000,  0.0000]])
    """

    def __init__(
        self,
        num_ignore: int | Literal["all"] = 30,
        *,
        feasible: FeasibleSets | None = None,
        gammas: Sequence[float] = (1, 2, 4, 7),
        margin: float = 0.05,
        detach_focal: bool = True,
        draw_over: Literal["feasible", "unannotated"] = "feasible",
        draw: Literal["random", "top"] = "random",
        reduction: Reduction = "mean",
        seed: int = 99,
    ) -> None:
        config = _loss_config(
            gammas,
            num_ignore=num_ignore,
            margin=margin,
            detach_focal=detach_focal,
            draw_over=draw_over,
            draw=draw,
        )
        super().__init__(config, reduction, feasible=feasible, seed=seed)


class CrossEntropyLoss(_TableLoss):
    """Binary cross-entropy over annotated pairs (Table 1: CE).

    Args:
        unannotated: "ignore" them, or count them as "negative".
        margin: as in `SelectiveLoss`; 0 gives the textbook's loss.
        reduction: as in `SelectiveLoss`.

    Raises:
        ConfigError: a setting is out of range (a ValueError).

    Example:
        >>> import torch, vlal_dist as vlal
        >>> loss = vlal.losses.CrossEntropyLoss(margin=0)
        >>> round(loss(torch.zeros(1, 3), torch.tensor([[1, -1, 0]])).item(), 4)
        1.3863
    """

    def __init__(
        self,
        unannotated: Unannotated = "ignore",
        *,
        margin: float = 0.05,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(_baseline(unannotated, (0, 0, 0), margin=margin), reduction)


class AsymmetricLoss(_TableLoss):
    """Asymmetric loss, ASL (Table 1; Ridnik et al., 2021).

    Args:
        unannotated: "ignore" them, or count them as "negative".
        gammas: exponents of pairs annotated present, annotated absent, and unannotated.
        margin, detach_focal, reduction: as in `SelectiveLoss`.

    Raises:
        ConfigError: a setting is out of range (a ValueError).

    Example:
        >>> import torch, vlal_dist as vlal
        >>> loss = vlal.losses.AsymmetricLoss("negative", gammas=(0, 1, 1), margin=0)
        >>> round(loss(torch.zeros(1, 3), torch.tensor([[1, -1, 0]])).item(), 4)
        1.3863
    """

    def __init__(
        self,
        unannotated: Unannotated = "ignore",
        *,
        gammas: Sequence[float] = (1, 2, 4),
        margin: float = 0.05,
        detach_focal: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        config = _baseline(unannotated, gammas, margin=margin, detach_focal=detach_focal)
        super().__init__(config, reduction)


class PartiallySelectiveLoss(_TableLoss):
    """Class-aware selective loss with partial annotations, PSL (Table 1; Ben-Baruch et al., 2022).

    Ignores unannotated pairs of attributes with a high prior, and those of highest probability
    over the rows given, which should be the whole batch: with several processes each chooses among
    its own rows, unlike `vlal train`.

    Args:
        prior: floating [A], mean probability of each attribute over training, of a model trained
            with unannotated pairs ignored.
        threshold: prior above which an attribute's unannotated pairs are ignored.
        topk: unannotated pairs ignored per row, over all rows.
        gammas: exponents of pairs annotated present, annotated absent, and unannotated.
        margin, detach_focal, reduction: as in `SelectiveLoss`.

    Raises:
        ConfigError: a setting is out of range (a ValueError).

    Example:
        >>> import torch, vlal_dist as vlal
        >>> prior = torch.tensor([0.1, 0.9, 0.2])
        >>> loss = vlal.losses.PartiallySelectiveLoss(prior, topk=0, gammas=(0, 0, 0), margin=0)
        >>> round(loss(torch.zeros(1, 3), torch.tensor([[1, 0, 0]])).item(), 4)
        1.3863
    """

    def __init__(
        self,
        prior: Tensor,
        *,
        threshold: float = 0.5,
        topk: int = 5,
        gammas: Sequence[float] = (1, 2, 4),
        margin: float = 0.05,
        detach_focal: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        prior = torch.as_tensor(prior).detach()
        if prior.dim() != 1 or not prior.is_floating_point() or not _within(prior, 0, 1):
            raise ConfigError(
                f"prior: {prior.dtype} {list(prior.shape)}; give floating [A], each in 0..1"
            )
        settings = {"margin": margin, "detach_focal": detach_focal}
        settings |= {"psl_threshold": threshold, "psl_topk": topk}
        super().__init__(_baseline("negative", gammas, **settings), reduction, prior=prior)


def _baseline(unannotated: str, gammas: Sequence[float], **settings: Any) -> LossConfig:
    """A row without feasible sets: unannotated pairs have one exponent."""
    if unannotated not in _NUM_IGNORE:
        raise ConfigError(f"unannotated is {unannotated!r}; give one of {', '.join(_NUM_IGNORE)}")
    three = _exponents(gammas, 3)
    return _loss_config((*three, three[2]), num_ignore=_NUM_IGNORE[unannotated], **settings)


def _loss_config(gammas: Sequence[float], **settings: Any) -> LossConfig:
    """The settings, checked.

    Raises:
        ConfigError: naming the argument.
    """
    names = ("gamma_positive", "gamma_negative", "gamma_feasible", "gamma_infeasible")
    given = dict(zip(names, _exponents(gammas, len(names)), strict=True))
    try:
        return LossConfig(**given, **settings)
    except ValueError as error:  # pydantic's, which lists what is wrong
        problems: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
        name = str(problems[0]["loc"][0]).removeprefix("psl_")
        shown = f"gammas: {name}" if name in names else name
        wanted = " or ".join(str(one["msg"]) for one in problems)
        raise ConfigError(f"{shown} is {problems[0]['input']!r}: {wanted}") from None


def _exponents(gammas: Sequence[float], number: int) -> tuple[float, ...]:
    """The exponents, as many as there must be."""
    given = tuple(gammas)
    if len(given) != number:
        raise ConfigError(f"gammas is {given!r}; give {number} exponents, each >= 0")
    return given


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Labels int8 [B, A]; object ids int64 [B]; ignored pairs bool [B, A], or inverse weights of a draw
float32 [B, A]; uids and visits int64 [B]; the seed int64 [1]."""


def _operator_inputs(
    logits: Tensor, labels: Tensor, given: Sequence[Tensor | None], seed: int, config: LossConfig
) -> Inputs:
    """What the operator takes, from what the caller gave.

    Args:
        logits, labels: of `forward`.
        given: object_id, likelihood, sample_id, epoch; the feasible sets' mask and PSL's prior.
        seed: of keyed draws.
        config: the loss.

    Raises:
        ValueError: as `forward`.
    """
    object_id, likelihood, sample_id, epoch, mask, prior = given
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits: {logits.dtype} {list(logits.shape)}; give floating [B, A]")
    label = _checked_labels(labels, logits)
    numbers = torch.arange(len(logits), device=logits.device)
    zeros = torch.zeros_like(numbers)
    objects = zeros if mask is None else _checked_objects(object_id, mask, logits)
    uid, visit, bits = numbers, zeros, numbers.new_zeros(1)
    if prior is not None:
        chosen = _psl_choice(logits, label, prior, config)
    elif config.num_ignore in (0, "all"):
        chosen = torch.zeros(logits.shape, device=logits.device)  # weights that are not read
    else:
        chosen = _inverse_likelihood(likelihood, objects, mask, logits, config.num_ignore)
        if config.draw == "top":
            drawable = torch.ones_like(chosen, dtype=torch.bool)
            if config.draw_over == "unannotated":
                drawable = label == 0
            chosen = top_ignore_set(
                inverse_weight=chosen, drawable=drawable, num_ignore=config.num_ignore
            )
        else:
            uid, visit, bits = _draw_key(sample_id, epoch, seed, numbers)
    return label, objects, chosen, uid, visit, bits


@torch.library.custom_op(
    "vlal::loss_inputs", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def compiled_inputs(
    logits: Tensor, labels: Tensor, given: Sequence[Tensor | None], seed: int, options: str
) -> Inputs:
    """`_operator_inputs` for torch.compile: its checks run with the compiled code.

    Args:
        logits, labels, given, seed: of `_operator_inputs`.
        options: the loss as JSON.
    """
    taken = {tensor.data_ptr() for tensor in (labels, *given) if tensor is not None}
    found = []
    for tensor in _operator_inputs(logits, labels, given, seed, _loss_of(options)):
        own = tensor.contiguous()  # and no memory of an input or of another output
        found.append(own.clone() if own.data_ptr() in taken else own)
        taken.add(own.data_ptr())
    label, objects, chosen, uid, visit, bits = found
    return label, objects, chosen, uid, visit, bits


@compiled_inputs.register_fake
def _(
    logits: Tensor, labels: Tensor, given: Sequence[Tensor | None], seed: int, options: str
) -> Inputs:
    config = _loss_of(options)
    masked = given[-1] is not None or (config.draw == "top" and config.num_ignore not in (0, "all"))
    by_row = [logits.new_empty(logits.shape[:1], dtype=torch.int64) for _ in range(3)]
    return (
        logits.new_empty(logits.shape, dtype=torch.int8),
        by_row[0],
        logits.new_empty(logits.shape, dtype=torch.bool if masked else torch.float32),
        by_row[1],
        by_row[2],
        logits.new_empty(1, dtype=torch.int64),
    )


_loss_of = cache(LossConfig.model_validate_json)


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """The labels as int8 [B, A]."""
    _check_form("labels", labels, tuple(logits.shape), logits.device, "integer or floating")
    code = labels.to(torch.int8)
    holds = _within(labels, -1, 1)
    if labels.is_floating_point():
        holds = holds & _equal(code.to(labels.dtype), labels)
    _require(holds, "labels: a value is not -1 (absent), 0 (unannotated) or +1 (present)")
    return code


def _checked_objects(object_id: Tensor | None, mask: Tensor, logits: Tensor) -> Tensor:
    """The object ids as int64 [B], each within the sets."""
    num_objects, width = mask.shape
    if width > logits.shape[1]:
        raise ValueError(
            f"logits: {logits.shape[1]} attributes, but the feasible sets name attribute "
            f"{width - 1}; give sets and logits of one vocabulary"
        )
    if mask.device != logits.device:
        raise ValueError(
            f"logits: on {logits.device}, but the feasible sets are on {mask.device}; "
            f"call loss.to({str(logits.device)!r})"
        )
    if object_id is None:
        raise ValueError("object_id: missing; give the object of each row, integers [B]")
    _check_form("object_id", object_id, (len(logits),), logits.device, "integer")
    message = f"object_id: an id is not in 0..{num_objects - 1}, the objects of the sets"
    _require(_within(object_id, 0, num_objects - 1), message)
    return object_id.to(torch.int64)


def _inverse_likelihood(
    likelihood: Tensor | None,
    object_id: Tensor,
    mask: Tensor | None,
    logits: Tensor,
    num_ignore: int | str,
) -> Tensor:
    """max g / g of each row, float32 [B, A]; what is not positive and finite cannot be drawn."""
    if likelihood is None:
        equal = "torch.ones_like(logits)"
        if mask is not None:
            equal = "1 in each row's feasible set and 0 elsewhere"
        raise ValueError(
            f"likelihood: missing, and {num_ignore} attributes are to be drawn; give g of Eq. (2), "
            f"floating [B, A], or {equal} to draw without weights, or num_ignore 0 or 'all'"
        )
    _check_form("likelihood", likelihood, tuple(logits.shape), logits.device, "floating")
    if likelihood.numel() == 0:
        return torch.zeros(logits.shape, device=logits.device)
    if likelihood.dtype not in (torch.float32, torch.float64):
        likelihood = likelihood.float()
    holds = _within(likelihood, 0, torch.finfo(likelihood.dtype).max)
    _require(holds, "likelihood: a value is negative or not finite")
    if mask is not None:
        width = mask.shape[1]
        drawable = likelihood.bool()
        outside = drawable[:, :width] & ~mask.index_select(0, object_id)
        _require(
            _within(outside.view(torch.uint8), 0, 0)
            & _within(drawable[:, width:].view(torch.uint8), 0, 0),
            "likelihood: a value outside of the row's feasible set is not 0; object_id or the "
            "order of the attributes is not that of the feasible sets",
        )
    # Above 0 also where all are 0, of which none can be drawn.
    most = likelihood.amax(1, keepdim=True).clamp(min=torch.finfo(likelihood.dtype).tiny)
    return (most / likelihood).to(torch.float32)


def _psl_choice(logits: Tensor, label: Tensor, prior: Tensor, config: LossConfig) -> Tensor:
    """Pairs that PSL ignores, bool [B, A]."""
    if len(prior) != logits.shape[1] or prior.device != logits.device:
        raise ValueError(
            f"logits: {logits.shape[1]} attributes on {logits.device}, but the prior has "
            f"{len(prior)} on {prior.device}; give one for each attribute, and call loss.to(device)"
        )
    probability = torch.sigmoid(logits.float())
    return psl_ignored(probability=probability, unannotated=label == 0, prior=prior, loss=config)


def _draw_key(
    sample_id: Tensor | None, epoch: Tensor | None, seed: int, numbers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Uid and visit of each row and the seed: those given, or of torch's default generator."""
    device = numbers.device
    if sample_id is None and epoch is None:
        bits = torch.randint(-(2**63), 2**63 - 1, (1,), device=device)
        return numbers, torch.zeros_like(numbers), bits
    if sample_id is None or epoch is None:
        absent = "sample_id" if sample_id is None else "epoch"
        raise ValueError(f"{absent}: missing; sample_id and epoch are given together or not at all")
    _check_form("sample_id", sample_id, tuple(numbers.shape), device, "integer")
    shape = tuple(numbers.shape) if epoch.dim() else ()
    _check_form("epoch", epoch, shape, device, "integer")
    visit = epoch.to(torch.int64).expand(numbers.shape).contiguous()
    bits = torch.full((1,), seed, device=device)
    return sample_id.to(torch.int64), visit, bits


def _check_form(
    name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, kind: str
) -> None:
    """Check what is known without looking at values."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {type(tensor).__name__}; give a tensor, {kind} {list(shape)}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name}: sparse or on meta; give a tensor that holds all its values")
    floating = tensor.is_floating_point()
    integer = not (floating or tensor.is_complex() or tensor.dtype == torch.bool)
    fits = (floating and "floating" in kind) or (integer and "integer" in kind)
    if not fits or tuple(tensor.shape) != shape or tensor.device != device:
        raise ValueError(
            f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; give {kind} "
            f"{list(shape)} on {device}"
        )


def _within(tensor: Tensor, low: float, high: float) -> Tensor | bool:
    """Whether all values lie there; NaN does not."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which have no aminmax
        tensor = tensor.to(torch.int64)
    least, most = torch.aminmax(tensor)
    if tensor.is_cpu:  # a tensor of one element costs more than a number
        return bool(low <= least.item() and most.item() <= high)
    return (least >= low) & (most <= high)


def _equal(one: Tensor, other: Tensor) -> Tensor | bool:
    """Whether all values are equal."""
    return torch.equal(one, other) if one.is_cpu else (one == other).all()


def _require(holds: Tensor | bool, message: str) -> None:
    """Raise unless it holds; on CUDA on the device, without waiting for it."""
    if isinstance(holds, Tensor) and holds.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)
