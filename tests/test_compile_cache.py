"""Compiled programs on disk: the same bits, found again, bounded."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import classic_cnns
from classic_cnns import compile_cache, create_model

ROOT = Path(__file__).parents[1]


def train(tmp_path, workdir, cache):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_FLAGS", "JAX_ENABLE"))}
    command = [
        sys.executable, str(ROOT / "main.py"), f"--config={ROOT}/configs/lenet5.py:fake",
        "--config.num_steps=6", "--config.schedule.warmup_steps=1", "--config.batch_size=16",
        "--config.weights_txt", f"--workdir={tmp_path / workdir}", f"--compilation_cache={cache}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return (tmp_path / workdir / "weights.txt").read_bytes()


PROGRAM = """
import sys, jax, numpy as np
from classic_cnns.compile_cache import keep_compiled
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
keep_compiled(sys.argv[1])
x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(4, 3, 16, 16)), "float32")
loss = lambda x: (jax.lax.conv(x, x[:, :, :3, :3], (1, 1), "SAME") ** 2).sum()
print(np.asarray(jax.jit(jax.grad(loss))(x)).tobytes().hex())
print(sum(hits))
"""


def test_a_program_is_found_again_and_computes_the_same_bits(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_ENABLE")}
    outputs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(cache)],
            cwd=ROOT, env=env, capture_output=True, text=True, check=True,
        ).stdout.split()
        for cache in (tmp_path, tmp_path, "")
    ]  # fmt: skip
    (first, hits), (again, found), (without, none) = outputs
    assert first == again == without
    assert int(found) > 0
    assert hits == none == "0"


def test_the_garbage_collector_stays_away_from_tracing():
    runs, before = [], gc.get_threshold()
    model, x = create_model("lenet5", 10), jnp.zeros((2, 32, 32, 3))

    def passes():
        runs.clear()
        jax.eval_shape(jax.grad(lambda x: model.init_with_output(jax.random.key(0), x)[0].sum()), x)
        return len(runs)

    def note(phase, info):
        runs.append(phase)

    gc.callbacks.append(note)
    try:
        gc.set_threshold(700, 10, 10)  # Python's own
        often = passes()
        compile_cache.collect_seldom()
        seldom = passes()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*before)
    assert seldom < often / 10


@pytest.mark.slow
def test_a_training_finds_its_programs_again_and_ends_with_the_same_bits(tmp_path):
    cache = tmp_path / "cache"
    fresh = train(tmp_path, "a", "")
    assert not cache.exists()
    first = train(tmp_path, "b", cache)
    files = {f.name: f.stat().st_mtime_ns for f in cache.glob("*/*")}
    assert any(name.startswith("jit_train-") for name in files)
    again = train(tmp_path, "c", cache)
    after = {f.name: f.stat().st_mtime_ns for f in cache.glob("*/*")}
    # What takes about as long as the threshold may be kept at either run; the step never is.
    assert {n: t for n, t in after.items() if "jit_train-" in n} == {
        n: t for n, t in files.items() if "jit_train-" in n
    }
    assert fresh == first == again


def keep_programs(directory, seconds):
    """In this directory, those that take so long to compile."""
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    compilation_cache.reset_cache()


@pytest.fixture
def cache(tmp_path):
    """Where this process keeps every program while a test runs."""
    before = (
        jax.config.jax_compilation_cache_dir,
        jax.config.jax_persistent_cache_min_compile_time_secs,
    )
    keep_programs(str(tmp_path / "cache"), 0.0)
    yield tmp_path / "cache"
    keep_programs(*before)


@pytest.mark.usefixtures("quick_compile")
def test_another_rate_decay_or_seed_needs_no_new_program(cache, config, tmp_path):
    def programs():
        return {f.name for f in cache.iterdir() if f.name.startswith("jit_train-")}

    config.update(num_steps=6, batch_size=16)
    config.schedule.warmup_steps = 1
    config.augment.flip = "alternating"
    first, _ = classic_cnns.train_and_evaluate(config, tmp_path / "a")
    (program,) = programs()
    config.optimizer.update(learning_rate=0.01, weight_decay=1e-3)
    config.seed = 4
    other, _ = classic_cnns.train_and_evaluate(config, tmp_path / "b")
    assert programs() == {program}
    kernels = [state.params["conv1"]["kernel"] for state in (first, other)]
    assert not np.array_equal(*kernels)


def test_where_nothing_can_be_written_training_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    assert compile_cache.keep_compiled(str(tmp_path / "file")) is None


def test_the_oldest_files_go_when_there_is_too_much(tmp_path):
    for age in range(5):
        file = tmp_path / f"{age}-cache"
        file.write_bytes(bytes(100))
        os.utime(file, (1e9 - age, 1e9 - age))
    compile_cache._shrink(tmp_path, 500)
    assert len(list(tmp_path.iterdir())) == 5
    compile_cache._shrink(tmp_path, 250)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0-cache", "1-cache"]
