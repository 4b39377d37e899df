"""Scale of the objective: the same gradient for any W, accumulation, ZeRO stage and row count.

Real gloo processes under a real DeepSpeed engine against one process in float64 without either.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fixtures import tiny_model
from tests.fixtures.rank_processes import run_ranks
from vlal_dist.data.loading.batch import Batch
from vlal_dist.method.ignore_set import sample_ignore_set
from vlal_dist.method.selective_loss import assign_terms, selective_loss

# A full batch; then the epoch's shorter last one, which leaves ranks and micro-batches uneven; one
# sample, where ranks and micro-batches have none.
SAMPLES = (12, 5, 1)

pytestmark = pytest.mark.deepspeed


def case(name: str, **changes: Any) -> dict[str, Any]:
    plain = {"zero": 0, "loss": "selective", "micro_batches": 1, "batch_norm": "eval"}
    return {"name": name, "samples": SAMPLES, "kernel": "auto", **plain, **changes}


def cases_of(world_size: int) -> list[dict[str, Any]]:
    found = [
        case(f"w{world_size}-m{m}-z{zero}", micro_batches=m, zero=zero)
        for m, zero in itertools.product((world_size, 2 * world_size), (0, 1, 2))
    ]
    # M does not divide by W, or W by M: micro-batches are recut.
    found.append(case(f"w{world_size}-recut", micro_batches=1 if world_size == 2 else 4))
    found.append(case(f"w{world_size}-reference", micro_batches=world_size, kernel="reference"))
    found += [
        case(f"w{world_size}-{loss}", loss=loss, micro_batches=world_size)
        for loss in ("psl", "ce_ignoring")
    ]
    for samples in (12, 1):
        name = f"w{world_size}-train{samples}"
        found.append(case(name, batch_norm="train", micro_batches=world_size, samples=(samples,)))
    found.append(case(f"w{world_size}-nan", micro_batches=2, samples=(12,), nan_row=7))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gradients")
    for world_size in (1, 2):
        (out / f"cases-{world_size}.json").write_text(json.dumps(cases_of(world_size)))
        run_ranks("tests.training.gradient_worker", str(out), world_size=world_size)
    return out


def dense(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Omega_o and the inverse weights of each row: bool and float32 [B, A]."""
    sets = tiny_model.feasible_sets()
    feasible = torch.from_numpy(sets.mask(tiny_model.ATTRIBUTES)[batch.object_id.numpy()])
    weight = torch.zeros(feasible.shape)
    assert batch.inverse_weight is not None
    weight[feasible] = batch.inverse_weight  # ascending within a row, in both
    return feasible, weight


def reference(loss: str) -> dict[str, torch.Tensor]:
    """Gradients and weights by autograd and Adam written out, in float64, one row set a step."""
    model = tiny_model.SmallClassifier().double().eval()
    average = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    square = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    start = 0
    for number, samples in enumerate(SAMPLES):
        batch = tiny_model.in_float64(tiny_model.rows(np.arange(start, start + samples)))
        start += samples
        feasible, weight = dense(batch)
        if loss == "selective":
            ignored = sample_ignore_set(
                inverse_weight=weight,
                drawable=feasible,
                num_ignore=2,
                uid=batch.uid,
                visit=batch.visit,
                seed=99,
            )
        else:
            ignored = batch.label == 0
        logits = model(batch.image, batch.object_id)
        per_row = selective_loss(
            logits,
            assign_terms(batch.label, feasible, ignored),
            loss=tiny_model.loss_config(loss),
        ).per_row
        model.zero_grad()
        (6 / tiny_model.BATCH * per_row.sum()).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                found[f"gradient{number}.{name}"] = parameter.grad.clone()
                decay = tiny_model.DECAY if parameter.ndim > 1 else 0.0
                gradient = parameter.grad + decay * parameter  # coupled L2
                average[name].mul_(0.9).add_(gradient, alpha=0.1)
                square[name].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                mean = average[name] / (1 - 0.9 ** (number + 1))
                spread = (square[name] / (1 - 0.999 ** (number + 1))).sqrt()
                parameter -= tiny_model.RATE * mean / (spread + 1e-8)
    found.update({f"weight.{n}": p.detach().clone() for n, p in model.named_parameters()})
    return found


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        if name in found:
            torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradient_and_adam_equal_the_single_process_sum(results: Path, world_size: int) -> None:
    expected, pairs = reference("selective"), []
    for one in cases_of(world_size):
        if one["loss"] != "selective" or one["batch_norm"] == "train" or "nan_row" in one:
            continue
        for rank in range(world_size):
            found = load_file(results / f"{one['name']}-{rank}.safetensors")
            assert any(name.startswith("gradient2.") for name in found) or one["zero"]
            # Passes and sum of each step; in one with ZeRO 1 and 2.
            assert found["times"].shape == ((0,) if one["zero"] else (len(SAMPLES), 2))
            check(found, expected)
            assert found["rows"].item() == sum(SAMPLES)
            assert found["pairs"].sum().item() == sum(SAMPLES) * tiny_model.ATTRIBUTES
            pairs.append(found["pairs"])
    assert all(torch.equal(one, pairs[0]) for one in pairs) and pairs[0].min() > 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_ce_ignoring_too(results: Path, world_size: int) -> None:
    check(load_file(results / f"w{world_size}-ce_ignoring-0.safetensors"), reference("ce_ignoring"))


def test_psl_chooses_over_the_global_batch(results: Path) -> None:
    alone = load_file(results / "w1-psl-0.safetensors")
    del alone["times"]
    for rank in (0, 1):
        together = load_file(results / f"w2-psl-{rank}.safetensors")
        check(together, {name: value.double() for name, value in alone.items()})
        assert torch.equal(together["pairs"], alone["pairs"])
    assert alone["pairs"][4] > 0


@pytest.mark.parametrize("samples", [12, 1])
def test_batch_norm_statistics_are_the_mean_over_ranks(results: Path, samples: int) -> None:
    expected = []
    for rank in (0, 1):
        model = tiny_model.SmallClassifier()
        for index in tiny_model.step(
            start=0, samples=samples, micro_batches=2, rank=rank, world_size=2
        ).sample_index:
            batch = tiny_model.rows(index)
            if len(batch):  # a rank without rows leaves its statistics as they were
                model(batch.image, batch.object_id)
        assert model.bn.running_mean is not None and model.bn.running_var is not None
        expected.append(torch.stack([model.bn.running_mean, model.bn.running_var]))
    mean, variance = (expected[0] + expected[1]) / 2
    for rank in (0, 1):
        found = load_file(results / f"w2-train{samples}-{rank}.safetensors")
        torch.testing.assert_close(found["weight.bn.running_mean"], mean)
        torch.testing.assert_close(found["weight.bn.running_var"], variance)
        assert int(found["weight.bn.num_batches_tracked"]) == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_row(
    results: Path, world_size: int
) -> None:
    uid = int(tiny_model.rows(np.array([7])).uid)
    for rank in range(world_size):
        message = (results / f"w{world_size}-nan-{rank}.txt").read_text()
        assert f"step 1: the loss is not finite in rows with uid [{uid}]" in message
