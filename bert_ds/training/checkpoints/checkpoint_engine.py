"""What DeepSpeed saves and loads through: files that are hashed while they are written, and never unpickled freely.

`checkpoint_saver` and `checkpoint_loader` drive it. A failed write is remembered, not raised: DeepSpeed has barriers
between the files, and a rank that raised there would leave the others waiting. All ranks agree on what went wrong once
every rank is through.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from bert_ds.basics.tensor_files import load_tensor_file
from bert_ds.training.deepspeed_names import named_release

with named_release():
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

_ALLOWED = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
"""Plain data classes that DeepSpeed's files hold beside tensors and containers."""


class VerifiedCheckpointEngine(CheckpointEngine):
    """Writes with fsync and sha256, loads with `weights_only=True` and a short allow-list.

    Args:
        parameter_names: names of the parameters of each optimizer group, stored with stage 0's unnamed masters.
    """

    def __init__(self, *, parameter_names: list[list[str]]) -> None:
        super().__init__()
        self.name = "VerifiedCheckpointEngine"
        self.parameter_names = parameter_names
        self.written: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self.in_memory = False
        """Whether `save` keeps files in host memory; they are written by `write_snapshots`."""
        self._snapshots: dict[str, list[bytes]] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """Forget the files of an earlier save."""
        self.written, self.error, self._snapshots = {}, None, {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the folder was made, and agreed on, before DeepSpeed was called."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file to the disk itself, or keep its bytes for `write_snapshots`.

        Its size and sha256 are in `written`, or the reason is in `error`.
        """
        if self.in_memory:
            snapshot = _MemoryStream()
            _serialize(state_dict, snapshot)
            self._snapshots[path] = snapshot.chunks
        else:
            self._write(path, lambda stream: _serialize(state_dict, stream))

    def write_snapshots(self) -> None:
        """Write the files that are kept in memory and let go of each one; for a thread beside the training."""
        while self._snapshots:
            path, chunks = self._snapshots.popitem()
            self._write(path, partial(_pour, chunks))

    def _write(self, path: str, produce: Callable[[_HashingStream], None]) -> None:
        name, stream = os.path.basename(path), None
        try:
            with open(path, "wb", buffering=0) as file:
                stream = _HashingStream(file)
                produce(stream)
                os.fsync(file.fileno())
            if os.path.getsize(path) != stream.num_bytes:
                raise OSError(f"{os.path.getsize(path)} bytes are on the disk, {stream.num_bytes} were written")
        except (OSError, RuntimeError) as error:
            # torch.save answers a failed write with "unexpected pos 64 vs 0"; the reason is the stream's.
            reason = (stream and stream.failure) or error
            self.error = self.error or f"{name}: {reason}"
        else:
            self.written[name] = {"bytes": stream.num_bytes, "sha256": stream.digest.hexdigest()}

    def load(self, path: str, map_location: Any = None) -> Any:
        """Load one file of tensors, containers and the allowed classes."""
        return load_safely(Path(path), map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Answer DeepSpeed; publishing is the caller's."""
        return True


@contextlib.contextmanager
def allowed_classes() -> Iterator[None]:
    """Let `torch.load` with `weights_only` build `_ALLOWED` too.

    This may be nested; an inner `safe_globals` of torch would take from the outer one what both allow.
    """
    known = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([one for one in _ALLOWED if one not in known]):
        yield


def load_safely(path: Path, *, map_location: Any = "cpu", mmap: bool = False) -> Any:
    """Load a checkpoint file without unpickling anything but tensors, containers and `_ALLOWED`.

    Raises:
        CheckpointError: the file is damaged, or holds something else.
    """
    with allowed_classes():
        return load_tensor_file(path, map_location=map_location, mmap=mmap)


def _serialize(state_dict: Any, stream: _HashingStream | _MemoryStream) -> None:
    """Write a file's bytes. Zip's own checksum, which nobody reads, would cost as much as all the rest."""
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_without_enums(state_dict), cast(IO[bytes], stream))
    finally:
        torch.serialization.set_crc32_options(checksums)


def _pour(chunks: list[bytes], stream: _HashingStream) -> None:
    for chunk in chunks:
        stream.write(chunk)


class _MemoryStream:
    """A write-only file object that keeps a copy of what passes."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def write(self, data: Any) -> int:
        self.chunks.append(bytes(memoryview(data).cast("B")))
        return len(self.chunks[-1])

    def flush(self) -> None:
        """Nothing to do."""


def _without_enums(value: Any) -> Any:
    """Return plain containers with the value of each enum in its place.

    Python 3.11 pickles an enum by way of `getattr`, which torch 2.11 does not load with `weights_only`.
    """
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_without_enums(item) for item in value)
    return value


class _HashingStream:
    """A write-only file object: hashes what passes, writes all of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.num_bytes += len(view)
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            self.failure = self.failure or error
            raise
        return len(view)

    def flush(self) -> None:
        self._file.flush()
