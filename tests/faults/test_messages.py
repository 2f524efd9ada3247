"""Goals G4 and G12, and case 57: the order of what is written, and what a person reads."""

import ast
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from lab import at_step, run_main
from ml_collections import ConfigDict

from classic_cnns import commandline, create_model, errors, list_models
from classic_cnns.checkpoints import MANIFEST, Checkpoints
from classic_cnns.config import flatten
from classic_cnns.saved import SavedCheckpoints
from configs import default

ROOT = Path(__file__).resolve().parents[2]


def test_g4_all_of_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """What a power cut leaves is what was synchronised; the renames must come after it."""
    events = []
    sync, rename = os.fsync, os.replace

    def fsync(handle):
        sync(handle)
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))

    def replace(source, target):
        rename(source, target)
        events.append(("rename", str(source)))

    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, {"a": np.ones(9)}, {}, keep=set())
        checkpoints.wait()
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        checkpoints.save(30, {"a": np.ones(9)}, {}, keep=set())
        checkpoints.wait()
    folder, temporary = tmp_path / "c", tmp_path / "c" / ".tmp-30"
    renamed = events.index(("rename", str(temporary)))
    deleted = events.index(("rename", str(folder / "10")))
    names = json.loads((folder / "30" / MANIFEST).read_text())["files"]
    folders = [p.relative_to(folder / "30") for p in (folder / "30").rglob("*") if p.is_dir()]
    expected = {str(temporary / name) for name in [*names, MANIFEST, *folders, "."]}
    assert len(expected) > 6
    assert {path for kind, path in events[:renamed] if kind == "sync"} == expected
    assert events[renamed + 1 : deleted] == [("sync", str(folder))]


def use_up_memory():
    def fail():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
        )

    at_step(12, fail)


def test_case57_a_device_without_memory_is_exit_code_6_and_what_to_change(lab, tmp_path):
    code, output = lab.run(tmp_path / "run", before=use_up_memory)
    assert code == 6, output
    (line,) = [line for line in output.splitlines() if line.startswith("ERROR")]
    for text in ("lenet5 with 32 images of", "17179869184 bytes were asked for",
                 "Fix: --config.batch_size=16"):  # fmt: skip
        assert text in line
    assert SavedCheckpoints(tmp_path / "run" / "checkpoints").newest() == 10


def test_case57_no_other_error_of_jax_is_taken_for_it():
    from classic_cnns.failures import out_of_memory

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: it"), ConfigDict())


CODES = {
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.WorkdirError: 4,
    errors.NonFiniteError: 5,
    errors.DeviceMemoryError: 6,
    RuntimeError: 1,
}


@pytest.mark.parametrize("kind", CODES)
def test_g12_each_kind_of_error_is_one_line_and_has_its_code(kind, capsys, monkeypatch):
    monkeypatch.setattr(commandline.threading, "Timer", lambda *_: DoesNothing())
    with pytest.raises(SystemExit) as stopped:
        commandline.fail(kind("a\nb\x1b[2J is wrong. Fix: c"))
    assert stopped.value.code == CODES[kind]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ERROR ")
    assert "Fix: " in err
    assert err.count("\n") == 1
    assert err.strip("\n").isprintable()


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["--config=configs/resnet35.py"], 2, 'did you mean "configs/resnet'),
        (["--config.batch_size=many"], 2, "--config.batch_size=many"),
        (["--config=configs/resnet34.py:cifr10"], 2, 'unknown dataset "cifr10"'),
        (["--workdri=x"], 2, "workdir"),
        (["train"], 2, "unexpected argument 'train'"),
        (["--config.data.source=folder", "--config.data.dir=/no/such"], 3, "not a directory"),
        (["--config.model.name=resnet"], 2, "did you mean"),
        (["--workdir=/proc/no"], 4, "Fix: --workdir=DIR where you may write"),
    ],
)
def test_g12_mistakes_of_a_command_line(lab, args, code, text):
    child = lab.call(run_main, [str(ROOT / "main.py"), *args], 1)
    assert child.end() == code, child.output
    assert child.output.startswith("ERROR ")
    assert text in child.output
    assert "Fix:" in child.output or "did you mean" in child.output
    assert child.output.count("\n") == 1


class DoesNothing:
    def start(self):
        pass


def raised():
    """(file, source) of every place that makes an error of ours."""
    kinds = {kind.__name__ for kind in CODES} - {"RuntimeError"}
    for path in sorted((ROOT / "classic_cnns").rglob("*.py")):
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in kinds:
                yield path.name, ast.get_source_segment(source, node)


# Where the fix is not in the words of the error itself: it is in one of these.
ELSEWHERE = (
    "nearest(", "{layout}", "{FIX}", "{error}", "{finding.text}", "'; '.join(problems)",
    '"; ".join(', "', '.join(wrong)",
)  # fmt: skip


def test_g12_every_error_says_what_to_do():
    found = list(raised())
    plain = [text for _, text in found if "Fix: " in text]
    print(f"{len(plain)} of {len(found)} with the fix in their own words")
    assert len(plain) > 120
    assert not [
        at for at in found if "Fix: " not in at[1] and not any(e in at[1] for e in ELSEWHERE)
    ]


def advised():
    """(file, text after "Fix: ") of every string that advises something."""
    for path in sorted((ROOT / "classic_cnns").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            words = [p.value for p in parts if isinstance(p, ast.Constant)]
            text = "".join(word for word in words if isinstance(word, str))
            if "Fix: " in text:
                yield path.name, text.split("Fix: ", 1)[1]


def test_g12_the_fields_that_are_advised_exist():
    fields = flatten(default.get_config()) | {"model.options": 0, "optimizer.options": 0}
    for name in list_models():
        fields |= {f"model.options.{key}": 0 for key in create_model(name, 10).__dict__}
    groups = {field.split(".")[0] for field in fields if "." in field}
    pattern = rf"(?<![\w./])((?:{'|'.join(groups)})\.[a-z_0-9.]*[a-z_0-9])"
    named = {(at, field) for at, text in advised() for field in re.findall(pattern, text)}
    print(f"{len(named)} fields named in {len(list(advised()))} pieces of advice")
    assert len(named) > 20
    assert [one for one in sorted(named) if one[1] not in fields] == []
