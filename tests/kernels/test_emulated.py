"""The CUDA programs, block by block on a processor; `slow` ones join every test of a backend.

What is here is their own: teams of a warp and of a block, where keys lie, how a batch is launched.
"""

import ctypes
import subprocess
import sys
from functools import partial

import pytest
import torch

from tests.fixtures.loss_batches import (
    Backend,
    make,
    oracle,
    oracle_mask,
    run,
    same_bits,
    tensors,
)
from tests.kernels import emulated_cuda
from tests.kernels.test_draw import GOLDEN_DRAWN, drawn_by, golden_outputs
from tests.kernels.test_parity import assert_close
from vlal_dist.config.sections import LossConfig
from vlal_dist.errors import ConfigError
from vlal_dist.kernels import cuda
from vlal_dist.kernels.arguments import pack
from vlal_dist.kernels.cpu import compiler
from vlal_dist.kernels.cuda import STATIC, plan_launch

EMULATED = Backend("cuda-emulated", "cpu", emulated_cuda.run)
LONG = 5000  # attributes for which a block works on a row


def test_golden():
    assert golden_outputs(EMULATED)[0] == GOLDEN_DRAWN


@pytest.mark.parametrize("mode", ["draw", "list", "ignore"])
def test_teams_of_a_block(mode):
    case = make(rows=5, attributes=LONG, annotated=0.02, density=0.3)
    case = case._replace(row_weight=torch.tensor([1.0, 0.0, 2.5, 1e-3, 1.0]))
    assert_close(run(EMULATED, case, mode), oracle(case, mode))


@pytest.mark.parametrize("over_unannotated", [False, True])
@pytest.mark.parametrize("attributes", [131, LONG])
def test_the_draw_of_both_teams(attributes, over_unannotated):
    case = make(rows=9, attributes=attributes, annotated=0.2)
    for num_ignore in (1, 30, attributes):
        given = {"num_ignore": num_ignore, "over_unannotated": over_unannotated}
        assert torch.equal(drawn_by(EMULATED, case, **given), oracle_mask(case, **given))


@pytest.mark.parametrize("attributes", [131, LONG])
def test_equal_keys_of_both_teams(attributes):
    """Ties within a warp, over warps and over what a team looks at in one go."""
    case = make(rows=3, attributes=attributes, density=1.1)
    case = case._replace(inverse_weight=torch.full_like(case.inverse_weight, 3.4e38))
    for num_ignore in (1, 40, attributes // 2, attributes - 1):
        given = {"num_ignore": num_ignore}
        assert torch.equal(drawn_by(EMULATED, case, **given), oracle_mask(case, **given))


@pytest.mark.parametrize(
    "attributes, most_shared", [(131, 8 * 144 + STATIC), (LONG, 5008 + STATIC)]
)
def test_keys_in_device_memory_draw_the_same(attributes, most_shared):
    case = make(rows=9, attributes=attributes)
    little = EMULATED._replace(run=partial(emulated_cuda.run, most_shared=most_shared))
    launch = {"rows": 9, "attributes": attributes, "drawable": attributes}
    assert not plan_launch(**launch, most_shared=most_shared).keys_shared
    assert same_bits(run(little, case), run(EMULATED, case))


def test_less_memory_where_the_greatest_set_is_known():
    case = make(rows=9, attributes=200, density=0.2)
    largest = int(case.feasible.indptr.diff().max())
    known = EMULATED._replace(run=partial(emulated_cuda.run, largest=largest))
    assert same_bits(run(known, case), run(EMULATED, case))


def test_launches():
    paper = plan_launch(rows=65, attributes=591, drawable=591, most_shared=232_448)
    assert paper == (cuda.WARP, 9, 8 * (592 + 2368), True)
    assert plan_launch(rows=64, attributes=591, drawable=0, most_shared=48_000).shared == 8 * 592
    long = plan_launch(rows=7, attributes=50_000, drawable=600, most_shared=232_448)
    assert long == (cuda.BLOCK, 7, 50_000 + 2400, True)
    spread = plan_launch(rows=7, attributes=50_000, drawable=50_000, most_shared=232_448)
    assert spread == (cuda.BLOCK, 7, 50_000, False)
    with pytest.raises(ConfigError, match=r"300000 attributes"):
        plan_launch(rows=7, attributes=300_000, drawable=0, most_shared=10**9)
    with pytest.raises(ConfigError, match=r"shared memory"):
        plan_launch(rows=7, attributes=50_000, drawable=0, most_shared=49_152)


@pytest.mark.parametrize("attributes", [4095, 4096, 4097, 65_537])
def test_counts_of_long_rows(attributes):
    """Codes are counted in bytes, four at a time."""
    case = make(rows=2, attributes=attributes, objects=1, density=0.5, annotated=0.3)
    for mode in ("ignore", "negatify", "mask"):
        assert torch.equal(run(EMULATED, case, mode)[3], oracle(case, mode)[3])


def test_what_the_program_declares_fits(tmp_path):
    """`plan_launch` leaves room for the shared memory of the program itself."""
    try:
        cuda.version()
    except ConfigError as error:
        pytest.skip(str(error))
    for team in (cuda.WARP, cuda.BLOCK):
        defines = cuda.program(0, "draw", LossConfig(), team)
        _, log = cuda.compile_program(defines, "sm_90")
        assert int(log.split(" bytes smem")[0].split()[-1]) <= STATIC


SANITIZED = """
import sys
sys.path.insert(0, {root!r})
from tests.kernels import emulated_cuda
from tests.fixtures.loss_batches import Backend, make, run
flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
load, emulated_cuda.load = emulated_cuda.load, lambda defines: load(defines, flags)
backend = Backend("sanitized", "cpu", emulated_cuda.run)
for attributes in (1, 3, 16, 33, 591, 5000):
    for mode in ("draw", "list", "mask", "ignore", "negatify"):
        for sparse in (False, True):
            case = make(rows=9, attributes=attributes, annotated=0.2)
            run(backend, case, mode, sparse=sparse, num_ignore=30, margin=0.05)
print("clean")
"""


@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_bounds(pytestconfig):
    """As compute-sanitizer looks; shared memory is as large as a launch asks for."""
    found = [
        subprocess.run(
            [*compiler(), f"-print-file-name=lib{name}.so"], capture_output=True, text=True
        )
        for name in ("asan", "ubsan")
    ]
    libraries = [one.stdout.strip() for one in found]
    if not all("/" in one for one in libraries):
        pytest.skip("the compiler has no sanitizers")
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED.format(root=str(pytestconfig.rootpath))],
        env={
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PATH": "/usr/bin:/bin",
            "HOME": str(pytestconfig.cache.mkdir("sanitized")),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "clean\n", done.stderr[-3000:]


def test_arguments_are_as_long_as_the_structure(tmp_path):
    """What Python packs is what C++ reads, field by field to the last."""
    source = tmp_path / "size.cpp"
    source.write_text(
        '#include "arguments.h"\n'
        'extern "C" long size() { return sizeof(Arguments); }\n'
        'extern "C" long last(const Arguments* a) { return a->threads; }\n'
    )
    library = tmp_path / "size.so"
    command = [*compiler(), "-shared", "-fPIC", "-I", str(emulated_cuda.SOURCES), str(source)]
    subprocess.run([*command, "-o", str(library)], check=True)
    case = make(rows=2, attributes=9)
    packed = pack(tensors(case, "draw"), "draw", LossConfig())
    loaded = ctypes.CDLL(str(library))
    assert loaded.size() == len(packed)
    loaded.last.argtypes = [ctypes.c_char_p]
    assert loaded.last(packed) == 1
