"""Checkpoints: what is written comes back, and what is damaged is noticed."""

import json
import warnings

import jax
import numpy as np
import pytest

from classic_cnns.checkpoints import MANIFEST, Checkpoints
from classic_cnns.errors import WorkdirError


def tree(seed=0, width=3):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=(4, width)).astype(np.float32),
        "b": {"c": np.int32(seed)},
        "empty": {},
    }


def abstract(width=3):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree(width=width))


@pytest.fixture
def saved(tmp_path):
    """Steps 10 and 20."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, tree(10), {"n": 1}, keep=set())
        checkpoints.save(20, tree(20), {"n": 2}, keep={10})
    return tmp_path


def newest(directory):
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore_newest(abstract())


def test_round_trip(saved):
    step, back, notes = newest(saved)
    assert (step, notes) == (20, {"n": 2})
    jax.tree.map(np.testing.assert_array_equal, back, tree(20))


def test_the_newest_two_and_what_is_kept_stay(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(30, tree(30), {}, keep={10})
        checkpoints.save(40, tree(40), {}, keep={10})
    assert sorted(p.name for p in saved.iterdir()) == ["10", "30", "40"]
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(50, tree(50), {}, keep=set())
    assert sorted(p.name for p in saved.iterdir()) == ["40", "50"]


def test_saving_a_finished_step_again_replaces_its_notes_alone(saved):
    with Checkpoints(saved) as checkpoints:
        checkpoints.save(20, tree(99), {"n": 9}, keep={10})
    step, back, notes = newest(saved)
    assert (step, notes) == (20, {"n": 9})
    jax.tree.map(np.testing.assert_array_equal, back, tree(20))


def test_nothing_saved(tmp_path):
    assert newest(tmp_path / "new") is None


def all_files(saved):
    return sorted(p.relative_to(saved / "20") for p in (saved / "20").rglob("*") if p.is_file())


def damage(path, how):
    data = path.read_bytes()
    if how == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "delete"])
def test_damage_to_any_file_is_noticed_and_the_step_before_is_used(saved, how, tmp_path_factory):
    import shutil

    for i, name in enumerate(all_files(saved)):
        copy = tmp_path_factory.mktemp(f"copy{i}") / "checkpoints"
        shutil.copytree(saved, copy)
        if (copy / "20" / name).stat().st_size == 0 and how in ("flip", "cut", "empty"):
            continue
        damage(copy / "20" / name, how)
        with pytest.warns(UserWarning, match="checkpoint 20 rejected: "):
            step, back, _ = newest(copy)
        assert step == 10
        jax.tree.map(np.testing.assert_array_equal, back, tree(10))
        assert (copy / "rejected" / "20").is_dir()
        assert not (copy / "20").exists()


def test_an_extra_file_is_noticed(saved):
    (saved / "20" / "state" / "extra").write_text("x")
    with Checkpoints(saved) as checkpoints:
        assert "not in MANIFEST.json" in checkpoints.damage(20)


@pytest.mark.filterwarnings("ignore:checkpoint .* rejected")
def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    for step in (10, 20):
        damage(saved / str(step) / MANIFEST, "cut")
    with pytest.raises(WorkdirError, match=r"no usable checkpoint .*2 rejected"):
        newest(saved)


def test_strangers_are_not_steps(saved):
    for name in ("abc", "100.bak"):
        (saved / name).mkdir()
    (saved / "50").write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert newest(saved)[0] == 20
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20]


def test_leftovers_of_a_kill_are_removed(saved):
    for name in (".tmp-30", ".old-5"):
        (saved / name / "state").mkdir(parents=True)
    assert newest(saved)[0] == 20
    assert sorted(p.name for p in saved.iterdir()) == ["10", "20"]


def test_another_model_is_refused_with_every_difference(saved):
    other = abstract(width=5) | {"d": jax.ShapeDtypeStruct((2,), np.float32)}
    checkpoints = Checkpoints(saved)
    with pytest.raises(WorkdirError) as error:
        checkpoints.restore_newest(other)
    assert "a: float32(4, 3) saved, float32(4, 5) expected" in str(error.value)
    assert "d: nothing saved, float32(2,) expected" in str(error.value)
    assert (saved / "20").is_dir()


def test_a_failed_save_is_not_silent(saved):
    checkpoints = Checkpoints(saved)
    (saved / ".tmp-30").mkdir()  # in the way
    checkpoints.save(30, tree(30), {}, keep={10, 20})
    with pytest.raises(WorkdirError, match="could not be written"):
        checkpoints.wait()
    assert newest(saved)[0] == 20


def test_manifest_lists_shapes(saved):
    manifest = json.loads((saved / "20" / MANIFEST).read_text())
    assert manifest["shapes"] == {"a": "float32(4, 3)", "b/c": "int32()"}
