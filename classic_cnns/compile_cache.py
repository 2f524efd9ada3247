"""What lets a process begin in a fraction of the time: compiled programs kept on disk, and Python's
garbage collector out of the way of tracing.
"""

from __future__ import annotations

import gc
import hashlib
import os
import platform
from pathlib import Path

LARGEST = 2 << 30  # bytes; the programs that were not written lately go first


def keep_compiled(directory: str = "default") -> Path | None:
    """Makes JAX keep what it compiles, and look there first. For the start of a process.

    Programs for a CPU hold its own instructions, so each kind of CPU has a directory of its own.

    Args:
        directory: "default" = the environment's JAX_COMPILATION_CACHE_DIR, else
            classic_cnns/compiled in the user's cache directory; "" = nothing is kept.

    Returns:
        Where the programs are; None when nothing is kept, or the directory cannot be written.
    """
    import jax

    if not directory:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if directory == "default":
        if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            return Path(given)  # JAX has read it
        from classic_cnns.data.sources import default_dir

        directory = str(default_dir("compiled"))
    path = Path(directory).expanduser() / _processor()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _shrink(path, LARGEST)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A training compiles many small programs before its step; JAX alone keeps those above 1 s.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return path


def collect_seldom() -> None:
    """Makes Python look for cyclic garbage once in 50,000 new objects, not 700. For the start of a
    process.

    Tracing a network makes millions of objects that stay, and looking through them again and again
    takes up to a third of its time.
    """
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


def _processor() -> str:
    """A name for this kind of CPU: the architecture and a digest of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    known = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    digest = hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]
    return f"{platform.machine()}-{digest}"


def _shrink(path: Path, largest: int) -> None:
    """Removes the oldest files until the rest is no larger than `largest` bytes."""
    files = [(f.stat().st_mtime, f.stat().st_size, f) for f in path.iterdir() if f.is_file()]
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files, key=lambda entry: entry[0]):
        if total <= largest:
            return
        file.unlink(missing_ok=True)
        total -= size
