"""Eight devices on one CPU, and NumPy's silent broadcasting between ranks forbidden."""

import contextlib
import dataclasses
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are shared by the tests of one run; they neither read nor fill the user's.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax
import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import classic_cnns
from classic_cnns.compile_cache import collect_seldom
from classic_cnns.train_state import TrainState

collect_seldom()
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure() -> None:
    """Removes what was compiled, after the last worker."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@contextlib.contextmanager
def few_optimizations() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compile() -> Iterator[None]:
    """Halves compilation by leaving out LLVM's optimisations: for files that test what a training
    or an augmentation does, and for float64, which tests what operations add up to. What numbers
    come out of float32 (layers, parity, gradients), and what a shell runs, is tested as users
    compile it.
    """
    with few_optimizations():
        yield


def sixty_steps() -> ConfigDict:
    from configs import default

    config = default.get_config("fake")
    config.augment.update(crop_padding=2, flip="random")
    config.num_steps = 60
    config.batch_size = 32
    config.log_every_steps = 7
    config.checkpoint_every_steps = 10
    config.schedule.warmup_steps = 5
    return config


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> ConfigDict:
    """Sixty steps of LeNet-5 on made images; a log every 7 steps, a checkpoint every 10. Figures
    are empty: drawing them is a fifth of such a run.
    """
    monkeypatch.setattr(Figure, "savefig", lambda _, file, **options: Path(file).touch())
    return sixty_steps()


@dataclasses.dataclass
class Finished:
    """A training that has ended: do not write into its directory."""

    workdir: Path
    state: TrainState
    summary: dict[str, Any]
    printed: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The training of `config`, with figures, and weights as text."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = sixty_steps()
    config.weights_txt = True
    with few_optimizations(), contextlib.redirect_stdout(io.StringIO()) as out:
        state, summary = classic_cnns.train_and_evaluate(config, workdir)
    return Finished(workdir, state, summary, out.getvalue())
