"""Labels and likelihoods of a whole batch equal those of single samples; buffers are reused."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlal_dist.data.loading.batch_builder import ImageBuffers, label_rows
from vlal_dist.data.loading.likelihoods import (
    join_likelihoods,
    rescaled_tar_likelihoods,
    tar_likelihoods,
)
from vlal_dist.errors import DataError

WIDTH = 12
ids = st.lists(st.integers(0, WIDTH - 1), max_size=WIDTH, unique=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(ids, ids), max_size=9))
def test_labels_row_by_row(samples: list[tuple[list[int], list[int]]]) -> None:
    parts = [json.dumps({"positive": p, "negative": n, "x": "y"}).encode() for p, n in samples]
    label = label_rows([memoryview(part) for part in parts], WIDTH)
    assert label.shape == (len(samples), WIDTH) and label.dtype == np.int8
    for row, (positive, negative) in zip(label, samples, strict=True):
        for attribute in range(WIDTH):
            expected = -1 if attribute in negative else 1 if attribute in positive else 0
            assert row[attribute] == expected


@pytest.mark.parametrize("text", [b'{"positive": [3', b"", b"<html>"])
def test_a_broken_json_is_an_error(text: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        label_rows([b'{"positive": [], "negative": []}', text], WIDTH)


def test_an_attribute_beyond_the_vocabulary_is_an_error() -> None:
    with pytest.raises(DataError, match="attribute 12 of 12"):
        label_rows([b'{"positive": [12], "negative": []}'], WIDTH)


def npy(values: np.ndarray, *, version: tuple[int, int] = (1, 0)) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, values, version=version)
    return sink.getvalue()


def test_likelihoods_are_joined_whatever_their_header() -> None:
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=n).astype("<f4") for n in (3, 0, 250, 1)]
    parts = [npy(v) for v in vectors]
    parts[2] = npy(vectors[2], version=(2, 0))
    values, indptr = join_likelihoods([memoryview(part) for part in parts])
    assert indptr.tolist() == [0, 3, 3, 253, 254] and values.dtype == np.float32
    assert np.array_equal(values, np.concatenate(vectors))


@pytest.mark.parametrize("part", [b"no array", npy(np.zeros(3, "<f4"))[:-2]])
def test_a_broken_likelihood_is_an_error(part: bytes) -> None:
    with pytest.raises(DataError, match="merge again"):
        join_likelihoods([part])


def test_a_sample_without_likelihood_says_what_to_do() -> None:
    with pytest.raises(DataError, match="run vlal score and vlal merge"):
        tar_likelihoods(np.array([5]), [b""])


def test_another_temperature_keeps_the_rows_normalised() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2, 1.0], np.float32))
    parts = [npy(logits[:3]), npy(logits[3:])]
    read = rescaled_tar_likelihoods(merged_at=0.01, temperature=0.02)
    values, indptr = read(np.arange(2), parts)
    assert np.exp(values[:3]).sum() == pytest.approx(1) and values[3] == pytest.approx(0)
    assert np.exp(values[0] - values[1]) == pytest.approx((0.5 / 0.3) ** 0.5, rel=1e-5)
    assert indptr.tolist() == [0, 3, 4]


def test_a_buffer_returns_when_its_last_tensor_is_gone() -> None:
    buffers = ImageBuffers(side=4, pinned=False)
    first, tensor = buffers.take(3)
    address = first.ctypes.data
    view = tensor[1:].permute(0, 3, 1, 2)
    del first, tensor
    assert buffers.take(3)[0].ctypes.data != address, "a view of it is still in use"
    del view
    assert any(buffers.take(2)[0].ctypes.data == address for _ in range(2))
