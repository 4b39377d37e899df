"""Omega_o: definition, file format, and the authors' enlarged sets."""

import contextlib
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vlal_dist.errors import ConfigError, DataError
from vlal_dist.method.feasible import FeasibleSets, enlarge_feasible_sets, feasible_sets


def ragged(lists):
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int32)
    return indptr, np.array([v for x in lists for v in x], np.uint32)


def build(object_id, positive, negative, num_objects):
    positive_indptr, positive_ids = ragged(positive)
    negative_indptr, negative_ids = ragged(negative)
    return feasible_sets(
        object_id=np.array(object_id, np.uint32),
        positive_indptr=positive_indptr,
        positive=positive_ids,
        negative_indptr=negative_indptr,
        negative=negative_ids,
        num_objects=num_objects,
    )


def from_lists(*sets):
    indptr, indices = ragged(sets)
    count = np.ones(len(indices), np.int32)
    return FeasibleSets(indptr.astype(np.int64), indices.astype(np.int32), count, count)


def test_sets_are_attributes_annotated_present_or_absent():
    sets = build([0, 2, 0, 2], [[3], [1, 4], [3, 0], []], [[5], [], [], [4]], num_objects=4)
    assert [sets.of(o).tolist() for o in range(4)] == [[0, 3, 5], [], [1, 4], []]
    assert sets.positive_count.tolist() == [1, 2, 0, 1, 1]
    assert sets.negative_count.tolist() == [0, 0, 1, 0, 1]
    assert sets.indptr.dtype == np.int64 and sets.indices.dtype == np.int32
    mask = sets.mask(6)
    assert mask.shape == (4, 6) and mask.dtype == np.bool_ and mask.sum() == 5 and mask[2, 4]


ids = st.lists(st.integers(0, 9), max_size=4, unique=True)


@given(st.lists(st.tuples(st.integers(0, 4), ids, ids), max_size=20))
@settings(deadline=None)
def test_sets_equal_plain_loops(rows):
    sets = build([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], num_objects=5)
    for o in range(5):
        positive = [a for row in rows if row[0] == o for a in row[1]]
        negative = [a for row in rows if row[0] == o for a in row[2]]
        assert sets.of(o).tolist() == sorted({*positive, *negative})
        span = slice(sets.indptr[o], sets.indptr[o + 1])
        assert sets.positive_count[span].tolist() == [positive.count(a) for a in sets.of(o)]
        assert sets.negative_count[span].tolist() == [negative.count(a) for a in sets.of(o)]
    again = FeasibleSets.from_npz(sets.to_npz())
    assert again.digest == sets.digest and again.to_npz() == sets.to_npz()


@given(
    st.integers(0, 12).flatmap(
        lambda n: st.tuples(
            arrays.arrays(np.int64, n, elements=st.integers(0, 4)),
            arrays.arrays(np.int8, (n, 7), elements=st.sampled_from([-1, 0, 0, 1])),
        )
    ),
    st.sampled_from(["int8", "int64", "float32", "float16", "torch.int64", "torch.bfloat16"]),
)
@settings(deadline=None)
def test_sets_of_labels_are_those_of_lists(case, kind):
    object_id, label = case
    positive, negative = ([np.flatnonzero(r == s).tolist() for r in label] for s in (1, -1))
    wanted = build(object_id, positive, negative, num_objects=5)
    given_labels, ids = label.astype(kind) if "." not in kind else label, object_id
    if "." in kind:
        ids = torch.from_numpy(object_id)
        given_labels = torch.from_numpy(label).to(getattr(torch, kind.split(".")[1]))
    found = FeasibleSets.from_labels(ids, given_labels, num_objects=5)
    assert found.to_npz() == wanted.to_npz()
    inferred = FeasibleSets.from_labels(ids, given_labels)
    assert inferred.num_objects == max(object_id.tolist(), default=-1) + 1
    assert found.indices.tolist() == inferred.indices.tolist()


@pytest.mark.parametrize(
    ("object_id", "labels", "message"),
    [
        ([0, 1], [[1, 0], [0, 2]], "labels: a value is not -1"),
        ([0, 1], [[1, 0], [0, 0.5]], "labels: a value is not -1"),
        ([0, 1], [[1, 0], [0, np.nan]], "labels: a value is not -1"),
        ([0, 1], [[1, 0], [0, 256]], "labels: a value is not -1"),
        ([0, 1], [[True, False], [False, False]], "labels: bool; give integers"),
        ([0, 1], [["1", "0"], ["0", "0"]], "labels: <U1; give integers"),
        ([0, 1], [[1, 0]], "give integers \\[N\\] and labels"),
        ([0, 1], [1, 0], "give integers \\[N\\] and labels"),
        ([[0], [1]], [[1, 0], [0, 1]], "give integers \\[N\\] and labels"),
        ([0.0, 1.0], [[1, 0], [0, 1]], "give integers \\[N\\] and labels"),
        ([0, -1], [[1, 0], [0, 1]], "object ids must lie in 0..1"),
        ([0, 2], [[1, 0], [0, 1]], "object ids must lie in 0..1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(object_id, labels, message):
    with pytest.raises(ValueError, match=message):
        FeasibleSets.from_labels(np.array(object_id), np.array(labels), num_objects=2)


def test_digest_depends_on_sets_alone():
    one = build([0], [[1, 2]], [[]], 2)
    assert one.digest == build([0, 0], [[1], []], [[], [1, 2]], 2).digest
    assert one.digest != build([1], [[1, 2]], [[]], 2).digest
    assert one.digest != build([0], [[1, 3]], [[]], 2).digest
    assert len(one.digest) == 64


def test_file_is_a_plain_numpy_archive():
    data = from_lists([0, 2], [1]).to_npz()
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        assert file.files == ["indptr", "indices", "positive_count", "negative_count"]
        assert file["indices"].tolist() == [0, 2, 1]


def test_damaged_files_are_data_errors():
    sets = from_lists([0, 2, 5], [1], [])
    data = sets.to_npz()
    for cut in range(0, len(data), 37):
        with pytest.raises(DataError):
            FeasibleSets.from_npz(data[:cut])
    for place in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        with contextlib.suppress(DataError):
            assert FeasibleSets.from_npz(bytes(damaged)).to_npz() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([0, 2, 1, 1], np.int32)}, "ascending"),
        ({"indices": np.array([-1, 2, 0, 1], np.int32)}, "ascending"),
        ({"indices": np.array([0, 2], np.int32)}, "length"),
        ({"indptr": np.array([0, 3, 2, 4])}, "rise"),
        ({"indptr": np.array([1, 2, 4])}, "rise"),
        ({"indptr": np.array([], np.int64)}, "empty"),
        ({"positive_count": np.array([1, 1, 1, -1], np.int32)}, "negative"),
        ({"positive_count": np.ones((4, 1), np.int32)}, "one-dimensional"),
    ],
)
def test_rules_of_the_table_are_checked(change, message):
    arrays = {
        "indptr": np.array([0, 2, 4]),
        "indices": np.array([0, 2, 0, 1], np.int32),
        "positive_count": np.ones(4, np.int32),
        "negative_count": np.ones(4, np.int32),
    }
    FeasibleSets(**arrays)
    with pytest.raises(DataError, match=message):
        FeasibleSets(**{**arrays, **change})


def test_wrong_dtype_in_a_file_is_refused():
    file = io.BytesIO()
    count = np.ones(1, np.int32)
    np.savez(file, indptr=np.array([0, 1]), indices=np.array([3]), positive_count=count,
             negative_count=count)  # fmt: skip
    with pytest.raises(DataError, match="vector of <i8"):
        FeasibleSets.from_npz(file.getvalue())


def test_mask_refuses_a_smaller_vocabulary():
    with pytest.raises(DataError, match="attribute 5"):
        from_lists([5]).mask(5)


def test_annotations_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="object ids"):
        build([3], [[1]], [[]], num_objects=3)
    with pytest.raises(DataError, match="ragged rows"):
        build([0, 1], [[1]], [[], []], num_objects=3)


def slow_enlarge(sets, vectors, top_k, votes, num_attributes):
    """Votes one by one, neighbours by sorting (cosine, id) in Python."""
    num_objects = len(sets)
    binary = np.array([[float(a in s) for a in range(num_attributes)] for s in sets])
    result = []
    for o in range(num_objects):
        count = dict.fromkeys(range(num_attributes), 0)
        for table in (binary, vectors):
            cosine = {
                p: table[o] @ table[p] / (np.linalg.norm(table[o]) * np.linalg.norm(table[p]))
                for p in range(num_objects)
                if p != o and table[o].any() and table[p].any()
            }
            order = sorted(cosine, key=lambda p: (-round(cosine[p], 9), p))
            for p in [p for p in order[: top_k - 1] if cosine[p] > 0]:
                for a in sets[p]:
                    count[a] += 1
        result.append(sorted({*sets[o], *(a for a, n in count.items() if n >= votes)}))
    return result


@pytest.mark.parametrize(("top_k", "votes"), [(3, 2), (1, 1), (4, 1), (300, 3)])
def test_enlarged_sets_equal_plain_loops(top_k, votes):
    rng = np.random.default_rng(top_k)
    sets = [sorted(rng.choice(12, rng.integers(0, 6), replace=False).tolist()) for _ in range(40)]
    vectors = rng.normal(size=(40, 5))
    found = enlarge_feasible_sets(
        from_lists(*sets), object_vectors=vectors, top_k=top_k, votes=votes
    )
    assert [found.of(o).tolist() for o in range(40)] == slow_enlarge(
        sets, vectors, top_k, votes, 12
    )


def test_enlarging_keeps_own_counts_and_gives_new_members_none():
    sets = FeasibleSets(
        np.array([0, 2, 5]), np.array([0, 1, 0, 1, 3], np.int32),
        np.array([4, 5, 1, 1, 1], np.int32), np.array([7, 0, 0, 0, 0], np.int32),
    )  # fmt: skip
    found = enlarge_feasible_sets(sets, object_vectors=np.ones((2, 3)), top_k=3, votes=2)
    assert found.of(0).tolist() == [0, 1, 3] and found.of(1).tolist() == [0, 1, 3]
    assert found.positive_count.tolist() == [4, 5, 0, 1, 1, 1]
    assert found.negative_count.tolist() == [7, 0, 0, 0, 0, 0]


def test_enlarging_refuses_wrong_settings():
    sets = from_lists([0], [1])
    with pytest.raises(ConfigError):
        enlarge_feasible_sets(sets, object_vectors=np.ones((2, 3)), top_k=0, votes=2)
    with pytest.raises(DataError, match="3 rows for 2 objects"):
        enlarge_feasible_sets(sets, object_vectors=np.ones((3, 3)), top_k=3, votes=2)


def test_numpy_modules_do_not_import_torch():
    code = (
        "import sys, vlal_dist.method.feasible, vlal_dist.method.likelihood, "
        "vlal_dist.method.metrics; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_id_far_above_the_others_takes_no_memory() -> None:
    for far in (1 << 24, 1 << 40, 2**63 - 1):
        with pytest.raises(DataError, match=f"{far} is the largest id.*or give num_objects"):
            FeasibleSets.from_labels(np.array([0, far]), np.eye(2, dtype=np.int8))
