"""The notebook, cell by cell, without Jupyter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quickstart(tmp_path):
    cells = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in cells), "outputs are not kept"
    assert code[0].startswith("%pip install -q -e .")
    shell = r"subprocess.run('\1', shell=True, check=True)"
    script = "import subprocess\n" + re.sub(r"^!(.*)$", shell, "\n".join(code[1:]), flags=re.M)
    script = script.replace("'python ", f"'{sys.executable} ")
    script = script.replace("from IPython.display import Image", "from os import stat as Image")
    (tmp_path / "script.py").write_text(script)
    for name in ("main.py", "configs", "classic_cnns"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MPLBACKEND": "agg"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    accuracies = re.findall(r"^test accuracy ([\d.]+)", done.stdout, re.M)
    assert len(accuracies) == 2
    assert min(map(float, accuracies)) > 0.93
    results = re.findall(r"^RESULT (.*)$", done.stdout, re.M)
    assert [json.loads(r)["model"] for r in results] == ["lenet5", "lenet5_1998"]
    assert min(json.loads(r)["test_accuracy"] for r in results) > 0.93
