"""Two processes that share every batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from classic_cnns.data.loaders import ResidentLoader, StreamLoader
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Split
from classic_cnns.sharding import create_mesh
from classic_cnns.steps import fetch
images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
split, mesh = Split(images, np.arange(20, dtype=np.int32)), create_mesh()
look = jax.jit(lambda b: [(b["image"].astype(int).sum((1, 2, 3)) * (1 + b["label"])).sum(),
                          b["label"].sum(), b["label"].size])
out = []
for loader in (ResidentLoader(split, 8, seed=0, mesh=mesh),
               StreamLoader(split, 8, seed=0, mesh=mesh, preprocess=Preprocess((4, 4, 3)))):
    seen = [[int(v) for v in look(fetch(loader.data, loader.train(s)))] for s in range(3)]
    masks = [int(jax.jit(lambda b: b["mask"].sum())(b)) for b in loader.evaluation()]
    out.append([seen, masks])
print("OUT " + json.dumps(out))
"""


def run(count):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, address, str(count), str(i)],
            cwd=Path(__file__).parents[1],
            env={"PATH": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    texts = [child.communicate(timeout=120)[0] for child in children]
    return [json.loads(text.rsplit("OUT ", 1)[1]) for text in texts]


def test_two_processes_see_the_batches_of_one():
    (alone,) = run(1)
    assert alone[0] == alone[1]
    assert [size for *_, size in alone[0][0]] == [8, 8, 8]
    assert alone[0][1] == [8, 8, 4]
    assert run(2) == [alone, alone]
