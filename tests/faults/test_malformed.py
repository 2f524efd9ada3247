"""Fifty malformed configs and fifty malformed run directories: an error of ours, or none."""

import copy
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import classic_cnns
from classic_cnns import config as config_lib
from classic_cnns import resume
from classic_cnns.checkpoints import MANIFEST, Checkpoints
from classic_cnns.config import flatten
from classic_cnns.durations import durations
from classic_cnns.errors import ClassicCNNsError
from classic_cnns.sharding import check_batch_size, create_mesh
from configs import default

SETTINGS = hypothesis.settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
NUMBERS = [-1, -0.5, float("nan"), float("inf"), float("-inf"), 1e300, 2.5]
TEXTS = ["", " ", "../../x", "os.system", "\x1b[2J", "none\n", "ä" * 300, "__class__"]
DATASET = config_lib.dataset_from(default.get_config("fake"))
FIELDS = flatten(default.get_config("fake"))
NOT_NUMBERS = sorted(k for k, v in FIELDS.items() if isinstance(v, str) and k != "data.dir")
FLOATS = sorted(k for k, v in FIELDS.items() if type(v) is float)
INTS = sorted(k for k, v in FIELDS.items() if type(v) is int)


def build(config):
    """Everything that a training makes of a config before it writes anything."""
    dataset = config_lib.dataset_from(config)
    model = config_lib.model_from(config, dataset.num_classes, dataset.image_shape)
    config_lib.augment_from(config, dataset)
    check_batch_size(config.batch_size, create_mesh())
    spans = durations(config, len(dataset.train))
    config_lib.optimizer_from(config, spans)
    return model


@SETTINGS
@hypothesis.given(
    change=st.one_of(
        st.tuples(st.sampled_from(NOT_NUMBERS), st.sampled_from(TEXTS)),
        st.tuples(st.sampled_from(FLOATS), st.sampled_from(NUMBERS)),
        st.tuples(st.sampled_from(INTS), st.sampled_from([-1, -(10**9), 10**12])),
    )
)
def test_case60e_a_malformed_config_is_named_or_harmless(change):
    field, value = change
    config = default.get_config("fake")
    config.update_from_flattened_dict(
        {field: float(value) if isinstance(FIELDS[field], float) else value}
    )
    error = error_of(lambda: build(config))
    if error:
        assert error.exit_code in (2, 3)
        words = field.replace(".", "_").split("_")
        assert any(w in str(error) for w in words if len(w) > 3), (field, str(error))


def error_of(function):
    """The error of ours that a call ends with, if any; it says what to do."""
    try:
        function()
    except ClassicCNNsError as error:
        offers = ("Fix: ", "did you mean", "or lower")
        return error if any(o in str(error) for o in offers) else pytest.fail(str(error))
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run that saved its first state."""
    path = tmp_path_factory.mktemp("malformed") / "run"
    path.mkdir()
    config = default.get_config("fake")
    facts = resume.facts(config, DATASET)
    notes = {"best": {"step": 3, "eval_accuracy": 0.5}, "epoch_sums": {}, "unevaluated": False}
    notes |= {"rollbacks": 0, "rate_scale": 1.0}
    with Checkpoints(path / "checkpoints", run=facts) as checkpoints:
        checkpoints.save(3, {"state": {"params": {"a": np.ones(3)}}}, notes, keep=set())
    resume.write_new(path, config, DATASET, 10, {})
    assert classic_cnns.load(path).step == 3
    return path


VALUES = [None, True, -1, 1e300, "", "\x1b[2J", [], {}, [[[]]], {"a": {"b": 1}}, 10**30]


def mutate(value, data):
    """The same JSON value with one part replaced or removed."""
    if isinstance(value, (dict, list)) and value and data.draw(st.integers(0, 5)):
        key = data.draw(
            st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value)))
        )
        changed = copy.copy(value)
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            del changed[key]
        else:
            changed[key] = mutate(value[key], data)
        return changed
    return data.draw(st.sampled_from(VALUES))


@SETTINGS
@hypothesis.given(data=st.data())
def test_case60g_a_malformed_run_directory_is_an_error_of_ours(run, tmp_path_factory, data):
    copied = shutil.copytree(run, tmp_path_factory.mktemp("run") / "run")
    name = data.draw(
        st.sampled_from(["run.json", "config.json", f"checkpoints/3/{MANIFEST}", "raw"])
    )
    if name == "raw":
        name = data.draw(st.sampled_from(["run.json", "config.json", f"checkpoints/3/{MANIFEST}"]))
        text = data.draw(st.sampled_from(["", "{", "[" * 100_000, "\x00", "null", '{"a": 1e999}']))
    else:
        text = json.dumps(mutate(json.loads((run / name).read_text()), data))
    (copied / name).write_text(text)
    config = default.get_config("fake")
    for error in (
        error_of(lambda: classic_cnns.load(copied)),
        error_of(lambda: resume.check(copied, config, DATASET, 10)),
    ):
        assert error is None or error.exit_code in (2, 3, 4)
