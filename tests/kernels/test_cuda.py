"""The operator on a GPU; without one, its launches on a driver made here.

With a GPU every test of a backend runs on it too (`loss_batches.FUSED`); here are streams, graphs,
torch.compile and devices that are not the current one.
"""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from tests.fixtures.loss_batches import draw_of, loss_config, make, oracle, same_bits, tensors
from tests.kernels import emulated_cuda
from vlal_dist.kernels import cuda
from vlal_dist.kernels.arguments import LAYOUT, Draw, FeasibleTable
from vlal_dist.kernels.operator import selective_loss

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
LOSS = loss_config(margin=0.05, detach_focal=True)


class Driver:
    """Launches programs by emulation; reads the arguments where the real one would."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most")
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="optin"
    )
    fine = SimpleNamespace(value=0, name="CUDA_SUCCESS")

    def __init__(self):
        self.launched = []

    def cuModuleLoadData(self, cubin):  # the driver's names
        return self.fine, tuple(cubin.decode().split())

    def cuModuleGetFunction(self, module, name):
        return self.fine, (module, name)

    def cuFuncSetAttribute(self, kernel, attribute, value):
        assert attribute == "most" and value <= 232_448
        return (self.fine,)

    def cuDeviceGet(self, index):
        return self.fine, index

    def cuDeviceGetAttribute(self, name, device):
        return self.fine, {"optin": 232_448}[name]

    def cuLaunchKernel(self, kernel, *launch):
        (defines, name), (*sizes, shared, stream, address, extra) = kernel, launch
        self.launched.append((name, tuple(sizes), shared))
        assert (stream, extra) == (11, 0)
        totals = name == b"vlal_totals"
        pointers = (ctypes.c_void_p * (2 if totals else 1)).from_address(address)
        blocks = ctypes.c_int64.from_address(pointers[1]).value if totals else sizes[0]
        emulated_cuda.load(defines)(ctypes.string_at(pointers[0], LAYOUT.size), blocks)
        return (self.fine,)


@pytest.fixture
def driver(monkeypatch, tmp_path):
    made = Driver()
    stream = SimpleNamespace(cuda_stream=11, synchronize=lambda: None)

    def compiled(defines, architecture):
        assert architecture == "sm_90"
        path = tmp_path / "program"
        path.write_text(" ".join(defines))
        return path

    monkeypatch.setattr(cuda, "compiled", compiled)
    monkeypatch.setattr(cuda, "_driver", lambda: made)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda.load.cache_clear()
    cuda._most_shared.cache_clear()
    yield made
    cuda.load.cache_clear()
    cuda._most_shared.cache_clear()


@pytest.mark.parametrize("attributes", [131, 5000])
def test_a_launch_passes_what_the_programs_read(driver, attributes):
    case = make(rows=11, attributes=attributes, annotated=0.2)
    given = tensors(case, "draw")
    found = cuda.run(given, "draw", LOSS)
    assert same_bits(found, emulated_cuda.run(given, "draw", LOSS))
    assert torch.equal(found[3], oracle(case, margin=0.05, detach_focal=True)[3])
    blocks = 2 if attributes == 131 else 11
    names = [(name, sizes) for name, sizes, _ in driver.launched]
    assert names == [
        (b"vlal_rows", (blocks, 1, 1, 256, 1, 1)),
        (b"vlal_totals", (1, 1, 1, 256, 1, 1)),
    ]


def test_nothing_is_launched_for_nothing(driver):
    case = make(rows=0, attributes=5)
    losses, _, sums, counts = cuda.run(tensors(case, "draw"), "draw", LOSS)
    assert losses.shape == (0,) and not sums.any() and not counts.any()
    assert driver.launched == []


def moved(case, device="cuda"):
    """The arguments of `selective_loss` on a device."""
    return {
        "label": case.label.to(device),
        "object_id": case.object_id.to(device),
        "feasible": FeasibleTable(*(t.to(device) for t in case.feasible[:2])),
        "ignored": Draw(*(t.to(device) for t in draw_of(case))),
        "loss": loss_config(),
    }


@on_gpu
def test_gradient_of_the_device():
    case = make(rows=100, attributes=591, objects=9)
    leaf = case.logits.cuda().requires_grad_()
    found = selective_loss(leaf, **moved(case))
    (found.per_row.sum() * 0.5).backward()
    losses, gradient, _, counts = oracle(case)
    torch.testing.assert_close(found.per_row.detach().cpu().double(), losses, rtol=1e-5, atol=0)
    assert (leaf.grad.cpu().double() - 0.5 * gradient).norm() <= 1e-6 * gradient.norm()
    assert torch.equal(found.counts.cpu(), counts)


@on_gpu
def test_a_graph_replays_with_another_visit():
    case = make(rows=100, attributes=591, objects=9)
    given, logits = moved(case), case.logits.cuda()
    selective_loss(logits, **given)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = selective_loss(logits, **given).per_row
    for visit in (1, 2):
        given["ignored"].visit.fill_(visit)
        graph.replay()
        assert torch.equal(captured, selective_loss(logits, **given).per_row)


@on_gpu
def test_two_streams_at_once():
    case = make(rows=3000, attributes=591, objects=9)
    given, logits = moved(case), case.logits.cuda()
    wanted = selective_loss(logits, **given)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(selective_loss(logits, **given))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, wanted, strict=True))


@on_gpu
def test_compiled_is_eager():
    case = make(rows=100, attributes=591, objects=9)
    given, leaf = moved(case), case.logits.cuda().requires_grad_()

    def step(logits):
        return selective_loss(logits * 2, **given).per_row.sum()

    wanted = torch.autograd.grad(step(leaf), leaf)[0]
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(leaf), leaf)[0]
    assert torch.equal(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_a_device_that_is_not_the_current_one():
    case = make(rows=20, attributes=100)
    wanted = selective_loss(case.logits.cuda(), **moved(case)).per_row
    found = selective_loss(case.logits.to("cuda:1"), **moved(case, "cuda:1")).per_row
    assert torch.equal(found.cpu(), wanted.cpu())
