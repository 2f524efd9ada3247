"""Whether this installation and this machine can train: what `classic-cnns doctor` prints."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np

from classic_cnns.data.sources import default_dir
from classic_cnns.errors import ConfigError, printable
from classic_cnns.large_pages import SETTING, TUNABLE, given_on_request

PACKAGE = "classic-cnns"
ACCELERATORS = {  # platform → packages that bring it
    "cuda": ("jax-cuda12-plugin", "jax-cuda13-plugin"),
    "rocm": ("jax-rocm60-plugin", "jax-rocm7-plugin"),
    "tpu": ("libtpu",),
}
LEAST_FREE = 2 << 30  # bytes; two checkpoints of the largest network and a small dataset


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: "ok", "warning" or "error".
        what: the thing.
        text: what was found and, if it is not ok, the fix.
    """

    level: str
    what: str
    text: str


def examine(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Looks at everything; starts JAX, trains nothing, leaves no file behind."""
    found = devices(environ)
    started = found[0].level == "ok"
    return [
        *versions(_requirements()),
        *found,
        *([self_test()] if started else ()),
        *caches(environ),
        clock(Path.cwd(), time.time()),
        threads(),
        *(large_pages(environ) if started else ()),
    ]


def _requirements() -> list[str]:
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # run from a checkout, without being installed
        return []


def versions(requirements: Iterable[str]) -> list[Finding]:
    """Compares what is installed with bounds such as "jax>=0.10,<0.12"."""
    found = []
    for line in requirements:
        if "extra ==" in line:
            continue
        match = re.match(r"([\w.-]+)([^;]*)", line)
        assert match
        name, bounds = match[1], match[2].strip()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            fix = f'Fix: pip install "{name}{bounds}"'
            found.append(Finding("error", name, f"not installed. {fix}"))
            continue
        broken = [b for b in filter(None, bounds.split(",")) if not _holds(version, b)]
        if broken:
            fix = f'Fix: pip install "{name}{bounds}"'
            text = f"{version}, tested with {bounds}. {fix}"
            level = "error" if any(b.strip().startswith(">") for b in broken) else "warning"
            found.append(Finding(level, name, text))
        else:
            found.append(Finding("ok", name, f"{version} ({bounds or 'any'})"))
    return found


def _holds(version: str, bound: str) -> bool:
    match = re.fullmatch(r"\s*(>=|<)\s*([\d.]+)\s*", bound)
    if not match:
        return True  # none of ours has another form
    have, want = (_numbers(v) for v in (version, match[2]))
    return have >= want if match[1] == ">=" else have < want


def _numbers(version: str) -> tuple[int, ...]:
    """Of "0.10.2rc1" (0, 10, 2), to be compared part by part."""
    parts = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(n) for n in parts[0].split(".")] if parts else [0]
    while numbers[-1:] == [0]:  # 1.0 is 1
        numbers.pop()
    return tuple(numbers)


def devices(environ: Mapping[str, str]) -> list[Finding]:
    """The devices of JAX; an accelerator that was asked for and is not there is an error."""
    import jax

    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without jax's package for CUDA
        wanted = environ.get("JAX_PLATFORMS", "")
        why = " ".join(str(error).split())[:200] or "JAX has no such platform installed"
        fix = "Fix: pip install -e '.[cuda]' or '.[tpu]', and the driver; or JAX_PLATFORMS=cpu"
        return [Finding("error", "devices", f"JAX_PLATFORMS={wanted}: {why}. {fix}")]
    kinds = sorted({f"{d.platform}: {d.device_kind}" for d in found})
    out = [Finding("ok", "devices", f"{len(found)} × {', '.join(kinds)}")]
    present = {"cuda" if d.platform == "gpu" else d.platform for d in found}
    asked = {p.strip() for p in environ.get("JAX_PLATFORMS", "").split(",") if p.strip()}
    for platform, packages in ACCELERATORS.items():
        installed = [p for p in packages if _is_installed(p)]
        named = asked & ({platform, "gpu"} if platform != "tpu" else {"tpu"})
        if platform in present or (not named and (asked or not installed)):
            continue  # there, or nobody asked for it
        why = f"JAX_PLATFORMS={environ['JAX_PLATFORMS']}" if named else f"{installed[0]} is there"
        fix = "the driver, or JAX_PLATFORMS=cpu if the CPU is meant"
        out.append(Finding("error", platform, f"{why}, but JAX sees no {platform}. Fix: {fix}"))
    return out


def check_devices(environ: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where an accelerator was asked for and JAX would run on the CPU."""
    for finding in devices(environ):
        if finding.level == "error":
            raise ConfigError(f"{finding.what}: {finding.text}")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def self_test() -> Finding:
    """Two steps of gradient descent on a convolution, against NumPy in float64."""
    import jax
    import jax.numpy as jnp

    from classic_cnns.models.layers import Conv

    rng = np.random.Generator(np.random.Philox(0))
    images = rng.standard_normal((4, 8, 8, 3), np.float32)
    targets = rng.standard_normal((4, 8, 8, 5), np.float32)
    kernel = rng.standard_normal((3, 3, 3, 5), np.float32) / 8
    conv = Conv(5, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)

    @jax.jit
    def step(kernel: jax.Array) -> jax.Array:
        def loss(kernel: jax.Array) -> jax.Array:
            out: Any = conv.apply({"params": {"kernel": kernel}}, images)
            return jnp.mean((out - targets) ** 2)

        with jax.default_matmul_precision("highest"):
            return kernel - 0.5 * jax.grad(loss)(kernel)

    got, want = jnp.asarray(kernel), kernel.astype(np.float64)
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    for _ in range(2):
        got = step(got)
        slope = 2 * (np.einsum("nyxcij,ijco->nyxo", windows, want) - targets) / targets.size
        want = want - 0.5 * np.einsum("nyxcij,nyxo->ijco", windows, slope)
    error = float(np.abs(np.asarray(got) - want).max())
    if not error < 1e-4:
        fix = "Fix: another version of jaxlib or of the driver, and report it"
        return Finding("error", "convolution", f"{error:.1e} away from NumPy. {fix}")
    return Finding("ok", "convolution", f"two steps in float32, {error:.1e} away from NumPy")


def caches(environ: Mapping[str, str]) -> list[Finding]:
    """Where datasets, decoded images and compiled programs are kept, and whether there is room."""
    ours = default_dir("decoded").parent
    compiled = environ.get("JAX_COMPILATION_CACHE_DIR") or default_dir("compiled")
    return [
        directory("downloads and decoded images", ours),
        directory("compiled programs", Path(compiled)),
        directory("working directory", Path.cwd(), measure=False),
    ]


def directory(what: str, path: Path, measure: bool = True) -> Finding:
    """Size, free space, and whether files can be made there; it need not exist."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("error", what, f"{path}: {error.strerror}. Fix: make it writable")
    size = sum(p.lstat().st_size for p in path.rglob("*") if p.is_file()) if measure else 0
    free = shutil.disk_usage(existing).free
    text = f"{path}: {f'{size / 1e6:,.0f} MB, ' if measure else ''}{free / 1e9:,.1f} GB free"
    if free < LEAST_FREE:
        return Finding("warning", what, f"{text}. Fix: free space, or another directory")
    return Finding("ok", what, text)


def clock(folder: Path, now: float) -> Finding:
    """Whether time goes forward and files are not younger than now.

    Args:
        folder: one that files can be made in.
        now: seconds since 1970.
    """
    ticks = [time.monotonic() for _ in range(100)]
    if ticks != sorted(ticks):
        return Finding("error", "clock", "runs backwards. Fix: the machine")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            ahead = os.stat(file.name).st_mtime - now
    except OSError:
        ahead = 0.0  # said by `directory`
    if abs(ahead) > 60:
        text = f"the disk's clock and the machine's differ by {ahead:,.0f} s. Fix: set the clocks"
        return Finding("warning", "clock", text)
    return Finding("ok", "clock", time.strftime("%F %T %z", time.localtime(now)))


def threads() -> Finding:
    """Cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = os.cpu_count() or 1
    if not util.find_spec("simplejpeg"):
        return Finding("warning", "cores", f"{allowed}, but JPEG files decode slowly")
    return Finding("ok", "cores", f"{allowed} of {total}, used by threads; nothing forks")


def large_pages(environ: Mapping[str, str], setting: Path = SETTING) -> list[Finding]:
    """Whether steps on the CPU use large pages, which shortens them (docs/performance.md).

    Args:
        environ: of this process.
        setting: Linux's file that says who gets them.
    """
    import jax

    if jax.default_backend() != "cpu" or not setting.exists():
        return []
    if "[never]" in setting.read_text():
        text = f"none: steps here would be shorter after, as root: echo madvise > {setting}"
    elif given_on_request(setting) and f"{TUNABLE}=0" in environ.get("GLIBC_TUNABLES", ""):
        text = f"declined by GLIBC_TUNABLES; without {TUNABLE}=0 steps here are shorter"
    else:
        text = "used by commands that compute"
    return [Finding("ok", "large pages", text)]


def render(findings: Iterable[Finding]) -> str:
    """A table for people."""
    findings = list(findings)
    width = max(len(f.what) for f in findings)
    return "\n".join(f"{f.level:8} {f.what:{width}}  {printable(f.text)}" for f in findings)
