"""Two processes that share every batch."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from classic_cnns.data.loaders import ResidentLoader, StreamLoader
from classic_cnns.data.preprocess import Preprocess
from classic_cnns.data.splits import Split
from classic_cnns.sharding import create_mesh
from classic_cnns.dispatch import fetch
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


def start(count, script=SCRIPT):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, address, str(count), str(i)],
            cwd=Path(__file__).parents[1],
            env={"PATH": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def run(count):
    children = start(count)
    texts = [child.communicate(timeout=120)[0] for child in children]
    return [json.loads(text.rsplit("OUT ", 1)[1]) for text in texts]


def test_two_processes_see_the_batches_of_one():
    (alone,) = run(1)
    assert alone[0] == alone[1]
    assert [size for *_, size in alone[0][0]] == [8, 8, 8]
    assert alone[0][1] == [8, 8, 4]
    assert run(2) == [alone, alone]


LOOP = """
import sys, time
import jax, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]),
                           heartbeat_timeout_seconds=5)
from jax.sharding import NamedSharding, PartitionSpec
from classic_cnns.sharding import create_mesh
mesh = create_mesh()
sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
ones = jax.make_array_from_process_local_data(sharding, np.ones(1, np.float32))
total = jax.jit(lambda x: x.sum())
while True:
    print("TOTAL", float(total(ones)), flush=True)
    time.sleep(0.02)
"""


@pytest.mark.parametrize(
    ("number", "lost"),
    [(signal.SIGKILL, 1), pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
     pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow)],
)  # fmt: skip
def test_case59_a_lost_process_ends_the_other_within_the_heartbeat(number, lost):
    children = start(2, LOOP)
    try:
        for child in children:
            line = next(line for line in child.stdout if line.startswith("TOTAL"))
            assert line == "TOTAL 2.0\n"
        children[lost].send_signal(number)
        began = time.monotonic()
        _, told = children[1 - lost].communicate(timeout=60)
        assert time.monotonic() - began < 5 + 10
        assert children[1 - lost].returncode == -signal.SIGABRT
        assert "heartbeat" in told or "Socket closed" in told or "UNAVAILABLE" in told
    finally:
        for child in children:
            child.kill()
            child.communicate()
