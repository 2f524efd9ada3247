"""What holds for the package as a whole: light imports, one direction, configs that fit."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import classic_cnns
from classic_cnns import config as config_lib
from classic_cnns.commandline import read_config
from classic_cnns.config import flatten
from classic_cnns.durations import durations
from classic_cnns.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def test_import_is_light_and_quick():
    """About a third more processor time than what it builds on, in turns: no clock on the wall,
    which counts what others do."""
    seconds = {}
    for _ in range(2):
        for modules in ("jax, flax.linen, optax", "classic_cnns.train, classic_cnns.models"):
            script = (
                f"import sys, time; t = time.process_time(); import {modules};"
                "print(time.process_time() - t);"
                "print([m for m in ('tensorflow', 'torch', 'keras', 'matplotlib', 'sklearn') if m"
                " in sys.modules])"
            )
            run = subprocess.run(
                [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert run.stdout.splitlines()[1] == "[]"
            seconds.setdefault(modules, []).append(float(run.stdout.splitlines()[0]))
    theirs, ours = map(min, seconds.values())
    assert ours < 1.6 * theirs


def test_package_alone_imports_nothing_heavy():
    script = (
        "import classic_cnns, sys; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_every_export_exists():
    for name in classic_cnns.__all__:
        assert callable(getattr(classic_cnns, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = classic_cnns.nothing
    tree = ast.parse((ROOT / "classic_cnns" / "__init__.py").read_text())
    for_editors = {
        node.names[0].asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].asname
    }
    assert for_editors == classic_cnns._EXPORTS


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_imports_point_one_way():
    package = ROOT / "classic_cnns"
    light = ("classic_cnns.errors", "classic_cnns.models")
    for path in package.rglob("*.py"):
        names = set(imports(path))
        inside = {n for n in names if n.startswith("classic_cnns.")}
        if path.parent.name == "models":
            assert inside <= {n for n in inside if n.startswith(light)}, path
        public = path == package / "__init__.py"  # which names all, for editors alone
        if path.name not in ("commandline.py", "cli_training.py") and not public:
            assert not {n for n in inside if n.endswith((".train", ".commandline"))}, path
        if path.name != "commandline.py":
            assert not {n for n in names if n.startswith("absl")}, path
        if path.name not in (
            "cli.py",
            "task.py",
            "commandline.py",
            "config.py",
            "durations.py",
            "failures.py",
            "resume.py",
            "train.py",
            "header.py",
            "loading.py",
        ):
            assert not {n for n in names if n.startswith("ml_collections")}, path
        assert not {n for n in names if n.split(".")[0] in ("torch", "tensorflow", "keras")}, path


def test_no_pickle_and_no_eval():
    for path in [*(ROOT / "classic_cnns").rglob("*.py"), ROOT / "main.py"]:
        tree = ast.parse(path.read_text())
        assert "pickle" not in set(imports(path)), path
        called = {
            n.func.id
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        assert not called & {"eval", "exec", "__import__"}, path


def test_no_file_holds_two_ideas():
    for path in (ROOT / "classic_cnns").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path


def load_config(path, *args):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config(path):
    """Every config file builds its network and optimiser for every dataset preset."""
    from configs.default import DATASETS

    fields = set(flatten(load_config(ROOT / "configs" / "default.py")))
    text = path.read_text()
    assert (
        f"python main.py{'' if path.stem == 'default' else f' --config=configs/{path.name}'}\n"
        in text
    )
    initialized = set()
    for dataset in DATASETS:
        config = load_config(path, dataset)
        assert {f for f in flatten(config) if not f.startswith("model.options.")} == fields
        side = config.data.image_size or 32
        model = config_lib.model_from(config, 10, (side, side, 3))
        spans = durations(config, 1000)
        tx, _ = config_lib.optimizer_from(config, spans)
        if (str(model), side) not in initialized:  # many datasets make the same network
            images = jnp.zeros((1, side, side, 3))
            variables = jax.eval_shape(model.init, jax.random.key(0), images)
            initialized.add((str(model), side))
        jax.eval_shape(tx.init, variables["params"])


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_options_need_not_be_in_the_config_file():
    path = str(ROOT / "configs" / "default.py")
    flags = ["--config.model.name=resnet18", "--config.model.options.stem=cifar"]
    flags += ["--config.model.options.zero_init_last=False", "--config.optimizer.name=adam"]
    config = read_config(path, [*flags, "--config.optimizer.options.b1=0.8"])
    model = config_lib.model_from(config, 10, (32, 32, 3))
    assert (model.stem, model.zero_init_last) == ("cifar", False)
    assert config.optimizer.options.b1 == 0.8
    wrong = read_config(path, [flags[0], "--config.model.options.stm=cifar"])
    with pytest.raises(ConfigError, match=r'no field "stm" \(did you mean "stem"'):
        config_lib.model_from(wrong, 10, (32, 32, 3))
    with pytest.raises(ConfigError, match=r'unknown config field "model\.option\.stem"'):
        read_config(path, ["--config.model.option.stem=cifar"])


def test_every_default_field_has_a_comment():
    lines = (ROOT / "configs" / "default.py").read_text().splitlines()
    commented = False
    for line in map(str.strip, lines):
        if line.startswith("# "):
            commented = True
        elif not line:
            commented = False
        elif line.startswith("config.") and "ConfigDict()" not in line and "update" not in line:
            assert commented, line
