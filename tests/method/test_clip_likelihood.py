"""Eq. (2) on tensors: against numpy's softmax, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlal_dist.losses import SelectiveLoss
from vlal_dist.method.clip_likelihood import clip_likelihood
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.method.likelihood import log_likelihood

SETS = FeasibleSets.from_labels([0, 1, 1, 2], np.eye(6, dtype=int)[[3, 0, 5, 2]], num_objects=4)
OBJECTS = torch.tensor([1, 0, 3, 1, 2])


def features(seed=0, *, by_crop=False):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(5, 16)) * rng.exponential(size=(5, 1))
    text = rng.normal(size=(5, 6, 16) if by_crop else (6, 16)) * 3
    return torch.from_numpy(image), torch.from_numpy(text)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 10), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_it_is_the_softmax_over_the_set(seed, temperature, by_crop, sets):
    image, text = features(seed, by_crop=by_crop)
    given = {"feasible": SETS, "object_id": OBJECTS} if sets else {}
    found = clip_likelihood(image, text, temperature=temperature, **given)
    assert found.dtype == torch.float32 and found.shape == (5, 6)
    for row in range(5):
        prompts = (text[row] if by_crop else text).numpy()
        x = image[row].numpy()
        cosine = prompts @ x / np.linalg.norm(prompts, axis=1) / np.linalg.norm(x)
        members = SETS.of(int(OBJECTS[row])) if sets else np.arange(6)
        wanted = np.zeros(6)
        if len(members):
            weight = np.exp((cosine[members] - cosine[members].max()) / temperature)
            wanted[members] = weight / weight.sum()
        np.testing.assert_allclose(found[row], wanted, rtol=1e-6, atol=1e-37)
        assert not found[row][[a for a in range(6) if a not in members]].any()


def test_it_agrees_with_what_scoring_stores():
    image, text = features()
    unit = [t / t.norm(dim=1, keepdim=True) for t in (image, text)]
    similarity = (unit[0] @ unit[1].T).float().numpy()
    stored = log_likelihood(similarity.ravel(), np.arange(0, 31, 6), temperature=0.05)
    found = clip_likelihood(image, text, temperature=0.05)
    np.testing.assert_allclose(found.numpy().ravel(), np.exp(stored), rtol=1e-5)


def test_the_length_and_the_type_of_features_do_not_matter():
    image, text = (t.to(torch.bfloat16) for t in features())
    wanted = clip_likelihood(image.double(), text.double())
    assert torch.equal(clip_likelihood(image, text), wanted)
    assert torch.equal(clip_likelihood(image.half() * 4, text.float() / 8), wanted)
    leaf = image.float().requires_grad_()
    assert not clip_likelihood(leaf, text).requires_grad


def test_the_loss_takes_it():
    image, text = features()
    g = clip_likelihood(image, text, feasible=SETS, object_id=OBJECTS)
    loss = SelectiveLoss(1, feasible=SETS)
    value = loss(torch.zeros(5, 6), torch.zeros(5, 6), object_id=OBJECTS, likelihood=g)
    assert value.isfinite()
    assert clip_likelihood(image[:0], text).shape == (0, 6)


def broken(place, value):
    image, text = features()
    changed = [image, text][place].clone()
    changed[1] = value
    return (changed, text) if place == 0 else (image, changed)


IMAGE, TEXT = features()
REFUSED = [
    ((*broken(0, 0.0),), {}, "image_features: a vector is not finite, or has length 0"),
    ((*broken(0, math.nan),), {}, "image_features: a vector is not finite"),
    ((*broken(1, math.inf),), {}, "text_features: a vector is not finite"),
    ((*broken(1, 0.0),), {}, "text_features: a vector is not finite, or has length 0"),
    ((IMAGE.long(), TEXT), {}, r"image_features: torch.int64; give floating"),
    ((IMAGE[0], TEXT), {}, r"image_features \[16\].*give \[B, D\]"),
    ((IMAGE, TEXT[0]), {}, r"text_features \[16\]"),
    ((IMAGE, TEXT[:, :8]), {}, r"text_features \[6, 8\]"),
    ((IMAGE, TEXT.expand(3, 6, 16)), {}, r"text_features \[3, 6, 16\]"),
    ((IMAGE, TEXT), {"temperature": 0}, "temperature is 0"),
    ((IMAGE, TEXT), {"temperature": -0.01}, "temperature is -0.01"),
    ((IMAGE, TEXT), {"temperature": math.nan}, "temperature is nan"),
    ((IMAGE, TEXT), {"feasible": SETS}, "object_id: missing"),
    ((IMAGE, TEXT), {"feasible": SETS, "object_id": OBJECTS + 1}, r"object_id: from 1 to 4"),
    ((IMAGE, TEXT), {"feasible": SETS, "object_id": OBJECTS - 1}, r"object_id: from -1 to 2"),
    ((IMAGE, TEXT), {"feasible": SETS, "object_id": OBJECTS[:1]}, r"give integers \[5\]"),
    ((IMAGE, TEXT), {"feasible": SETS, "object_id": OBJECTS.float()}, r"object_id: torch.float32"),
    ((IMAGE, TEXT[:4]), {"feasible": SETS, "object_id": OBJECTS}, "feasible sets name attribute 5"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "settings", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refused(tensors, settings, message):
    with pytest.raises(ValueError, match=message):
        clip_likelihood(*tensors, **settings)
