"""Cases 1 to 11 and 20: kills, damage and full disks around one checkpoint, without a training."""

import json
import os
import shutil
import subprocess
import time
import warnings

import jax
import numpy as np
import pytest
from lab import Fault

from classic_cnns import commandline
from classic_cnns.checkpoints import MANIFEST, Checkpoints
from classic_cnns.errors import ClassicCNNsWarning, NonFiniteError, WorkdirError
from classic_cnns.manifest import FORMAT, render
from classic_cnns.saved import SavedCheckpoints


def tree(seed):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(200, 30)).astype(np.float32), "b": {"c": np.int32(seed)}}


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), tree(0))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Steps 10 and 20."""
    path = tmp_path_factory.mktemp("template") / "checkpoints"
    with Checkpoints(path) as checkpoints:
        checkpoints.save(10, tree(10), {"n": 1}, keep=set())
        checkpoints.save(20, tree(20), {"n": 2}, keep={10})
    return path


@pytest.fixture
def saved(template, tmp_path):
    return shutil.copytree(template, tmp_path / "checkpoints")


def save_30(directory):
    """Saves step 30, which deletes 10."""
    jax.config.update("jax_platforms", "cpu")
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(30, tree(30), {"n": 3}, keep=set())


def check(directory, at_least):
    """The newest step is whole, nothing is left over, and the next save works."""
    with Checkpoints(directory) as checkpoints:
        step, back, _ = checkpoints.restore_newest(ABSTRACT)
        assert step >= at_least
        jax.tree.map(np.testing.assert_array_equal, back, tree(step))
        assert all(checkpoints.damage(s) is None for s in checkpoints.steps())
        names = {p.name for p in directory.iterdir()}
        assert names == {str(s) for s in checkpoints.steps()}
        checkpoints.save(40, tree(40), {}, keep=set())
    assert SavedCheckpoints(directory).steps() == [step, 40]


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_case01_and_case02_killed_at_each_change_of_a_save_and_a_deletion(
    lab, template, tmp_path, every
):
    number, code = every, -9
    while code == -9:
        directory = shutil.copytree(template, tmp_path / str(number) / "checkpoints")
        fault = Fault(f"{directory}*", number)
        child = lab.call(save_30, directory, before=fault.install)
        code = child.end()
        assert code in (-9, 0), child.output
        deleting = (directory / ".old-10").exists()
        written = (directory / "30").exists()
        assert written or not deleting
        check(directory, 30 if written else 20)
        number += every
    assert number > 15  # changes there are


@pytest.mark.slow
def test_case01_killed_at_twenty_times_in_a_save(lab, template, tmp_path):
    for i in range(20):
        directory = shutil.copytree(template, tmp_path / str(i) / "checkpoints")
        child = lab.call(save_30, directory)
        child.when(lambda d=directory: (d / ".tmp-30").exists() or (d / "30").exists())
        child.process.join(i * 0.004)
        child.process.kill()
        child.process.join()
        check(directory, 20)


def test_case03_without_a_manifest_it_is_not_there(saved):
    (saved / "20" / MANIFEST).unlink()
    with (
        pytest.warns(
            ClassicCNNsWarning, match=r"20 rejected: incomplete \(no MANIFEST.json\); using 10"
        ),
        Checkpoints(saved) as checkpoints,
    ):
        assert checkpoints.restore_newest(ABSTRACT)[0] == 10
    assert (saved / "rejected" / "20").is_dir()


def test_case04_one_bit_anywhere_is_noticed(saved):
    files = [p for p in sorted((saved / "20").rglob("*")) if p.is_file() and p.stat().st_size]
    rng = np.random.default_rng(4)
    for _ in range(200):
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        after = bytearray(before)
        after[rng.integers(len(after))] ^= 1 << int(rng.integers(8))
        path.write_bytes(after)
        assert SavedCheckpoints(saved).damage(20) is not None, path
        path.write_bytes(before)
    assert SavedCheckpoints(saved).damage(20) is None


@pytest.mark.parametrize("how", ["half", "empty", "deleted", "swapped"])
def test_case05_each_file_cut_emptied_deleted_or_swapped(saved, tmp_path, how):
    files = sorted(p.relative_to(saved) for p in (saved / "20").rglob("*") if p.is_file())
    full = [name for name in files if (saved / name).stat().st_size]
    for i, name in enumerate(files if how == "deleted" else full):
        copy = shutil.copytree(saved, tmp_path / str(i))
        data = (copy / name).read_bytes()
        if how == "swapped":
            other = copy / full[(i + 1) % len(full)]
            (copy / name).write_bytes(other.read_bytes())
            other.write_bytes(data)
        elif how == "deleted":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(data[: len(data) // 2] if how == "half" else b"")
        with (
            pytest.warns(ClassicCNNsWarning, match=r"checkpoint 20 rejected: .*; using 10"),
            Checkpoints(copy) as checkpoints,
        ):
            step, back, notes = checkpoints.restore_newest(ABSTRACT)
        assert (step, notes) == (10, {"n": 1})
        jax.tree.map(np.testing.assert_array_equal, back, tree(10))


def test_case06_all_damaged_is_an_error_and_never_step_0(saved):
    for step in ("10", "20"):
        (saved / step / MANIFEST).write_text("{}")
    with pytest.raises(WorkdirError, match=r"no usable checkpoint .*2 rejected.*Fix: "):
        SavedCheckpoints(saved).restore_newest(ABSTRACT)
    assert sorted(p.name for p in (saved / "rejected").iterdir()) == ["10", "20"]


def test_case07_strangers_are_ignored_each_with_one_warning(saved):
    for name in ("99", "abc", "100.bak"):
        (saved / name).mkdir()
    (saved / "50").write_text("a file")
    with pytest.warns(ClassicCNNsWarning) as record:
        assert SavedCheckpoints(saved).newest() == 20
    told = sorted(str(w.message).split("/")[-1].split()[0] for w in record)
    assert told == ["100.bak", "50", "99", "abc"]


def save_30_and_40(directory, fault):
    """Saves step 30 with a fault and 40 without; the exit code tells how 30 went."""
    jax.config.update("jax_platforms", "cpu")
    checkpoints = Checkpoints(directory)
    code = 0
    fault.install()
    checkpoints.save(30, tree(30), {}, keep=set())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ClassicCNNsWarning)
            checkpoints.wait()
        if checkpoints.missed:
            code = 1
            assert any("checkpoint 30 not saved" in str(w.message) for w in caught)
    except WorkdirError as error:
        told = "checkpoint 30 could not be written" in str(error) and "Fix: " in str(error)
        code = 2 if told else 9
    fault.disarm()
    if fault.seen < fault.number:
        code = 3
    checkpoints.save(40, tree(40), {}, keep=set())  # there is room again
    checkpoints.wait()
    os._exit(code)  # orbax holds a process whose save has failed for five minutes


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["ENOSPC", "EIO", "EACCES"])
def test_case08_an_error_at_each_write_leaves_what_was_there(
    lab, template, tmp_path, action, every
):
    number, codes = 1, []
    while 3 not in codes:
        directory = shutil.copytree(template, tmp_path / str(number) / "checkpoints")
        child = lab.call(save_30_and_40, directory, Fault(f"{directory}/*", number, action))
        codes.append(child.end())
        assert "Traceback" not in child.output, child.output
        checkpoints = SavedCheckpoints(directory)
        # what could not be deleted in time may stay; 20 goes only once 30 is there
        assert checkpoints.steps()[-1] == 40
        assert {20, 30} & set(checkpoints.steps())
        assert all(checkpoints.damage(step) is None for step in checkpoints.steps())
        number += every
    assert len(codes) > 15 / every
    assert set(codes) - {0, 3} == ({1} if action == "ENOSPC" else {2})


def save_and_wait(checkpoints, step, values):
    checkpoints.save(step, values, {}, keep=set())
    checkpoints.wait()


@pytest.mark.parametrize("noticed", ["before", "while writing"])
def test_case08_a_disk_that_is_really_full(tmp_path, noticed, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the permission to mount")
    try:
        array = np.random.default_rng(0).random(200_000, np.float32)  # 0.8 MB
        with Checkpoints(disk) as checkpoints:
            checkpoints.save(1, {"a": array}, {}, keep=set())
            checkpoints.wait()
            room = shutil.disk_usage(disk).free
            (disk / ".ballast").write_bytes(bytes(room - 400_000))
            if noticed == "while writing":
                monkeypatch.setattr(checkpoints, "_free", lambda: 10**9)
            told = pytest.warns(
                ClassicCNNsWarning, match=r"checkpoint 2 not saved.*Fix: free space"
            )
            with told:  # at once, or when it is waited for
                save_and_wait(checkpoints, 2, {"a": array + 1})
            monkeypatch.undo()
            with pytest.raises(WorkdirError, match="checkpoint 2, the last one, is not saved"):
                checkpoints.finish()
            assert checkpoints.damage(1) is None
            assert not list(disk.glob(".tmp-*"))
            (disk / ".ballast").unlink()
            checkpoints.save(3, {"a": array + 2}, {}, keep=set())
            checkpoints.finish()
            assert checkpoints.damage(3) is None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_case09_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=30_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        pytest.warns(ClassicCNNsWarning, match=r"0 MB free, two checkpoints need about"),
        Checkpoints(tmp_path / "c") as checkpoints,
    ):
        checkpoints.prepare(tree(0))


def fail_to_save(directory):
    jax.config.update("jax_platforms", "cpu")
    checkpoints = Checkpoints(directory)
    Fault(f"{directory}/*", 3, "EIO").install()
    checkpoints.save(30, tree(30), {}, keep=set())
    for _ in range(1000):
        time.sleep(0.01)
        try:
            checkpoints.poll()
        except WorkdirError as error:
            commandline.fail(error)


def test_case16_a_failed_save_is_told_by_the_next_poll_and_the_exit_is_quick(lab, saved):
    start = time.monotonic()
    child = lab.call(fail_to_save, saved)
    assert child.end() == 4
    assert time.monotonic() - start < 10
    assert "ERROR checkpoint 30 could not be written" in child.output


def test_case17_and_case18_another_shape_or_type_is_told_leaf_by_leaf(saved):
    other = {
        "a": jax.ShapeDtypeStruct((200, 31), np.float32),
        "b": {"c": jax.ShapeDtypeStruct((), np.int64)},
    }
    with pytest.raises(WorkdirError) as error:
        SavedCheckpoints(saved).restore_newest(other)
    assert "a: float32(200, 30) saved, float32(200, 31) expected" in str(error.value)
    assert "b/c: int32() saved, int64() expected" in str(error.value)


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1])
def test_case19_another_format_names_both_versions(saved, other):
    path = saved / "20" / MANIFEST
    changed = json.loads(path.read_text()) | {"format": other}
    path.write_bytes(render(changed))
    with pytest.raises(WorkdirError, match=rf"format {other}, .* format {FORMAT}\. Fix: "):
        SavedCheckpoints(saved).restore_newest(ABSTRACT)
    assert (saved / "20").is_dir()
    path.write_text(json.dumps(changed, indent=1))  # a flipped bit is not another version
    with pytest.warns(ClassicCNNsWarning, match="20 rejected: MANIFEST.json: SHA-256 differs"):
        assert SavedCheckpoints(saved).restore_newest(ABSTRACT)[0] == 10


def test_case20_what_is_not_finite_is_not_saved(saved):
    bad = tree(30)
    bad["a"][7, 7] = np.inf
    with pytest.raises(NonFiniteError, match="a is not finite"), Checkpoints(saved) as checkpoints:
        checkpoints.save(30, bad, {}, keep=set())
    assert SavedCheckpoints(saved).steps() == [10, 20]
