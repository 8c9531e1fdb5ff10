"""CUDA tensors in a process without a card, for FakeTensorMode.

The guard is compiled once for each release of torch and kept beside torch's own compiled operators. It is put in place
by a rename, so that no lock is ever left behind: two processes that compile at once write the same file.

    python tests/fake_cuda.py MODULE ARGUMENT    # MODULE.main(Path(ARGUMENT)) with the guard in place
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from extension_folder import use_own_extensions

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
_SOURCE = Path(__file__).with_suffix(".cpp")


def built_guard() -> Path:
    """Return the compiled guard, and compile it where it is missing.

    Raises:
        RuntimeError: the compiler refuses; the message is its own.
    """
    assert COMPILER is not None, "asked for without a compiler"
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    guard = use_own_extensions() / f"fake_cuda-{version('torch')}-{digest}.so"
    if guard.exists():
        return guard
    guard.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=guard.parent) as folder:
        fresh = Path(folder) / guard.name
        includes = [f"-I{_torch() / 'include'}", f"-I{_torch() / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{_torch() / 'lib'}", f"-Wl,-rpath,{_torch() / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = [COMPILER, "-std=c++20", "-shared", "-fPIC", *includes, str(_SOURCE), *libraries, "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        fresh.replace(guard)
    return guard


def load_guard() -> None:
    """Let this process name CUDA devices. It has no card, and has not imported torch, which looks once who is there."""
    assert "torch" not in sys.modules, "too late"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built_guard()))


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


if __name__ == "__main__":
    load_guard()
    importlib.import_module(sys.argv[1]).main(Path(sys.argv[2]))
