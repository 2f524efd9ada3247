"""Case 60: hostile inputs, and what a training must never do."""

import functools
import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from lab import at_step

from classic_cnns.checkpoints import Checkpoints
from classic_cnns.data import archives
from classic_cnns.errors import ClassicCNNsWarning, DataError, printable
from classic_cnns.saved import SavedCheckpoints


def listening():
    """TCP ports that this process listens on, whatever language opened them."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/self/net/{table}").read_text().splitlines()]
        inodes |= {row[9] for row in rows[1:] if row[3] == "0A"}
    own = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{handle}")
        except OSError:
            continue
        own += [target] if target.removeprefix("socket:[").rstrip("]") in inodes else []
    return own


def watch(log):
    """Writes down every unpickling, every shell and every port."""
    events = ("pickle.find_class", "os.system", "os.exec", "socket.bind")

    def hook(event, args):
        if event in events:
            with open(log, "a") as file:
                file.write(f"{event} {args}\n")

    def look():
        if ports := listening():
            with open(log, "a") as file:
                file.write(f"listens {ports}\n")

    sys.addaudithook(hook)
    at_step(5, look)


def test_case60a_case60h_case60i_a_run_unpickles_listens_and_tells_nothing(lab, tmp_path):
    os.environ["SECRET_OF_CASE_60"] = "xyzzy-60"
    log, run = tmp_path / "log", tmp_path / "run"
    code, output = lab.run(run, before=functools.partial(watch, log), num_steps=12)
    assert code == 0, output
    assert not log.exists(), log.read_text()
    files = [p for p in run.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert not [p for p in files if p.suffix in (".pkl", ".pickle", ".pt")]
    assert not [p for p in files if b"xyzzy-60" in p.read_bytes()]
    del os.environ["SECRET_OF_CASE_60"]


def test_the_watch_sees_a_listening_port_and_an_unpickling(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)):
        assert len(listening()) == 1
    assert listening() == []


def hostile(kind, folder):
    """A checkpoint directory with something in it that does not belong there."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"a": np.ones(3, np.float32)}, {}, keep=set())
        checkpoints.save(2, {"a": np.zeros(3, np.float32)}, {}, keep=set())
    state = folder / "2" / "state"
    if kind == "pickle":
        (state / "x.pkl").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    elif kind == "pickle in place":
        target = max(state.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        target.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    elif kind == "link":
        target = next(p for p in sorted(state.rglob("*")) if p.is_file())
        target.rename(folder.parent / "elsewhere")
        target.symlink_to(folder.parent / "elsewhere")
    else:
        state.rename(folder.parent / "state")
        state.symlink_to(folder.parent / "state")


@pytest.mark.parametrize("kind", ["pickle", "pickle in place", "link", "linked directory"])
def test_case60a_what_does_not_belong_into_a_checkpoint(kind, tmp_path):
    hostile(kind, tmp_path / "c")
    with pytest.warns(ClassicCNNsWarning, match="checkpoint 2 rejected"):
        assert SavedCheckpoints(tmp_path / "c").newest() == 1
    assert not Path("owned").exists()


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


EVIL = {
    "parent": [member("../escaped", b"x")],
    "absolute": [member("/escaped-60", b"x")],
    "link": [
        member("cifar-10-batches-bin/test_batch.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    ],
    "hard link": [
        member("cifar-10-batches-bin/test_batch.bin", type=tarfile.LNKTYPE, linkname="/etc/passwd")
    ],
    "through a link": [
        member("cifar-10-batches-bin", type=tarfile.SYMTYPE, linkname=".."),
        member("cifar-10-batches-bin/escaped", b"x"),
    ],
    "device": [member("cifar-10-batches-bin/test_batch.bin", type=tarfile.CHRTYPE)],
    "bomb": [member("cifar-10-batches-bin/test_batch.bin", bytes(40_000_000))],
}


@pytest.mark.parametrize("kind", EVIL)
def test_case60c_archives_write_nothing_outside(kind, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as file:
        for info, data in EVIL[kind]:
            data.seek(0)
            file.addfile(info, data)

    tar = folder / "cifar-10-binary.tar.gz"  # as if it had the right checksum
    monkeypatch.setattr(archives, "fetch", lambda *_: tar)
    with pytest.raises(DataError, match=r"test_batch.bin: not in .*Fix: "):
        archives.read_members("cifar10", archives.ARCHIVES["cifar10"], folder)
    assert sorted(os.listdir(tmp_path)) == ["data"]
    assert {p.name for p in folder.rglob("*")} <= {tar.name, "cifar-10-batches-bin"}
    assert not Path("/escaped-60").exists()


def test_case49_case60_names_cannot_paint_the_terminal():
    name = "cat\x1b[2J\x1b]0;owned\x07\r\nERROR \u202egnp.\x85"
    shown = printable(name)
    assert shown.isprintable()
    assert "\\x1b[2J" in shown
    assert "\n" not in shown
