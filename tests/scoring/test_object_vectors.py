"""Object vectors: the file, its commit, and the way clean -> vectors -> clean."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save_file

from tests.fixtures.tiny_vaw import OBJECTS, run, write_small_vaw
from tests.scoring.conftest import Model, make_tiny_model
from vlal_dist.config.sections import ScoringConfig
from vlal_dist.errors import ConfigError, ConflictError, DataError
from vlal_dist.method.feasible import FeasibleSets
from vlal_dist.scoring.object_vectors import (
    encode_object_vectors,
    make_object_vectors,
    read_vocabulary,
)
from vlal_dist.vocabulary import OBJECT_VECTORS, Vocabulary


def vocabulary_of(objects: tuple[str, ...]) -> Vocabulary:
    return Vocabulary(objects, ("red", "tall"), ("color", "other"), ("head", "tail"))


def make(path: Path, instances: Path, model: Model) -> dict[str, object]:
    return make_object_vectors(str(path), instances=str(instances), scoring=model.section())


def clean(config: Path, *more: str) -> int:
    return run("clean", config, "--method.profile", "released", *more)


@pytest.fixture
def cleaned(tmp_path: Path) -> Path:
    """Config of annotations whose names were found by a first clean, without neighbours."""
    config = write_small_vaw(tmp_path / "small", images={"train": 12, "val": 4})
    names = ["--clean.feasible_top_k", "0", "--paths.instances", str(tmp_path / "names")]
    assert clean(config, *names) == 0
    return config


def test_the_file_is_what_clean_reads(tiny: Model, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(("ball", "t shirt", "hat"))
    encoder = tiny.load(batch_size=2)
    data = encode_object_vectors(encoder, vocabulary)
    assert data == encode_object_vectors(tiny.load(batch_size=2), vocabulary)
    path = tmp_path / "objects.safetensors"
    path.write_bytes(data)
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"vocabulary_digest": vocabulary.digest}
        assert list(file.keys()) == [OBJECT_VECTORS]
        vectors = file.get_tensor(OBJECT_VECTORS)
    assert vectors.dtype == np.float32 and vectors.shape == (3, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # One bare name per row, in id order.
    for row, name in enumerate(vocabulary.objects):
        np.testing.assert_array_equal(vectors[row], encoder.encode_texts([name])[0])
    assert len(np.unique(vectors, axis=0)) == 3


def test_another_file_is_never_replaced(cleaned: Path, tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "objects.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"first")
    with pytest.raises(ConflictError, match=r"objects\.safetensors holds other content.*delete it"):
        make(path, tmp_path / "names", tiny)
    assert path.read_bytes() == b"first"
    assert list(path.parent.iterdir()) == [path]


def test_a_relative_path_is_of_this_folder(
    cleaned: Path, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert make(Path("new/objects.safetensors"), tmp_path / "names", tiny)["created"] is True
    assert (tmp_path / "new" / "objects.safetensors").is_file()


@pytest.mark.parametrize("path", ["s3://bucket/objects.safetensors", "file:///tmp/x", ".", ""])
def test_only_a_local_file_will_do(path: str) -> None:
    # Before the root is looked for and the model loaded.
    with pytest.raises(ConfigError, match="give a local file"):
        make_object_vectors(path, instances="/nowhere", scoring=ScoringConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"holds no vocabulary\.json.*--clean\.feasible_top_k 0"),
        ("{", r"vocabulary\.json is damaged"),
        ("[]", r"should be an object, got \[\]"),
        ('{"objects": []}', "missing or malformed"),
    ],
)
def test_a_root_without_names(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_vocabulary(str(tmp_path))


def test_clean_then_vectors_then_clean(cleaned: Path, tiny: Model, tmp_path: Path) -> None:
    names, final, path = tmp_path / "names", tmp_path / "final", tmp_path / "objects.safetensors"
    counts = make(path, names, tiny)
    assert (counts["objects"], counts["dimensions"], counts["created"]) == (len(OBJECTS), 16, True)
    before = path.read_bytes()
    assert make(path, names, tiny)["created"] is False
    settings = ["--clean.object_vectors", str(path), "--paths.instances", str(final)]
    assert clean(cleaned, *settings) == 0
    assert path.read_bytes() == before
    manifests = [json.loads((root / "clean.json").read_text()) for root in (names, final)]
    assert manifests[0]["vocabulary_digest"] == manifests[1]["vocabulary_digest"]
    plain, more = (
        FeasibleSets.from_npz((root / "feasible.npz").read_bytes()) for root in (names, final)
    )
    assert len(more.indices) > len(plain.indices)
    assert all(set(plain.of(i)) <= set(more.of(i)) for i in range(len(OBJECTS)))
    # Made again from the final root, they are the same: nothing but the names goes in.
    assert make(path, final, tiny)["created"] is False


def test_another_model_or_vocabulary_is_refused(
    cleaned: Path, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "objects.safetensors"
    make(path, tmp_path / "names", tiny)
    other = make_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(ConflictError, match="delete it"):
        make(path, tmp_path / "names", other)
    vectors = load(path.read_bytes())
    path.unlink()
    digest = vocabulary_of(OBJECTS).digest
    save_file(vectors, path, metadata={"vocabulary_digest": digest})
    settings = ["--clean.object_vectors", str(path), "--paths.instances", str(tmp_path / "final")]
    assert clean(cleaned, *settings) == 65
    assert f"is of vocabulary {digest}" in capsys.readouterr().err


def test_the_program_reports_beside_the_names(cleaned: Path, tiny: Model, tmp_path: Path) -> None:
    """Not in the score root, where the report of a scoring may lie."""
    words = ["--object-vectors", str(tmp_path / "objects.safetensors"), *tiny.flags()]
    words += ["--paths.instances", str(tmp_path / "names"), "--paths.scores", str(tmp_path / "s")]
    assert run("vlal_dist.score_clip", cleaned, *words) == 0
    assert json.loads((tmp_path / "names/score_clip.result.json").read_text())["code"] == 0
    assert not (tmp_path / "s").exists()


def test_clean_names_the_command_that_makes_them(
    cleaned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert clean(cleaned) == 64
    assert "vlal score --object-vectors" in capsys.readouterr().err
