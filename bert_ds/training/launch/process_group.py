"""Joining the other ranks of the job."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.launch.start_watch import START_LIMIT_S, joined, meet
from bert_ds.training.agreement import COLLECTIVE_TIMEOUT, host_group
from bert_ds.training.deepspeed_names import missing_name

_MALLOC_SETTINGS = {-1: 2**31 - 1, -2: 2**26, -3: 2**30}
"""glibc's M_TRIM_THRESHOLD, M_TOP_PAD and M_MMAP_THRESHOLD: never trimmed, grown by 64 MB, mapped from 1 GB on."""


@contextmanager
def joined_ranks(
    ranks: Ranks,
    *,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    start_limit_s: float = START_LIMIT_S,
    first: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Be one of the job's ranks inside the block: NCCL on CUDA, gloo on CPU; a collective.

    A single process that no launcher started gets a group of its own. Under a bare `srun` the SLURM variables are
    translated; MASTER_ADDR and MASTER_PORT then come from the job script.

    Args:
        ranks: place of this process in the job.
        timeout: of a collective.
        start_limit_s: how long ranks that have not come are waited for, 0: for ever. One that dies ends all at once.
        first: a collective that is done while the start is still watched, before the block.

    Raises:
        ConfigError: there are several ranks and MASTER_ADDR or MASTER_PORT is not set, or this one sees no GPU of its
            own.
    """
    claim_device(ranks)
    names = {"RANK": ranks.rank, "LOCAL_RANK": ranks.local_rank, "WORLD_SIZE": ranks.world_size}
    os.environ.update({name: str(value) for name, value in names.items()})
    for name, alone in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        if name not in os.environ:
            if ranks.world_size > 1:
                raise ConfigError(f"{name} is not set: {ranks.world_size} ranks need it to find each other")
            os.environ[name] = alone
    # NCCL ends a process whose own watchdog is stuck for so long; ours leaves stacks and an exit record.
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(timeout.total_seconds())))
    leave_out_shared_memory_operator()
    keep_freed_memory()
    meet(start_limit_s)
    deepspeed.init_distributed(
        dist_backend="nccl" if get_accelerator().device_name() == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    try:
        host_group(timeout)
        first()
        joined()
        yield
    finally:
        # Without this the background threads of gloo abort an interpreter that ends by an exception.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def claim_device(ranks: Ranks) -> None:
    """Make this rank's own GPU the one that "cuda" means, before anything is put there.

    Raises:
        ConfigError: the process sees too few GPUs, as a Slurm task does that was given one for itself alone.
    """
    if get_accelerator().device_name() != "cuda":
        return
    count = torch.cuda.device_count()
    if ranks.local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise ConfigError(
            f"local rank {ranks.local_rank} sees {count} GPUs (CUDA_VISIBLE_DEVICES is {visible}), wanted at least "
            f"{ranks.local_rank + 1}: start as many ranks as there are GPUs, and let each see all of its machine "
            "(Slurm: --gpus-per-node, not --gpus-per-task or --gpu-bind)"
        )
    torch.cuda.set_device(ranks.local_rank)


def leave_out_shared_memory_operator() -> None:
    """Keep DeepSpeed on a CPU from compiling its shared-memory collectives when a process group is initialised.

    They take a minute to compile (and end the process where there is no compiler), and every rank leaves 66 MB in
    /dev/shm behind for good. Only DeepSpeed's inference engine uses them.
    """
    if get_accelerator().device_name() == "cpu":
        backend = importlib.import_module("deepspeed.comm.torch")  # deepspeed.comm has torch itself by that name
        if not hasattr(backend, "build_shm_op"):
            raise ConfigError(missing_name("deepspeed.comm.torch", "build_shm_op"))
        vars(backend)["build_shm_op"] = lambda: None


def keep_freed_memory() -> None:
    """On a CPU let the C library keep what tensors free for the next ones, instead of giving it back at every step.

    glibc maps what is large by itself and trims its heap: the pages of every activation would be handed out, zeroed
    and taken back in each step (mallopt(3)). What a process holds stays at its peak. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if get_accelerator().device_name() == "cpu" and mallopt is not None:
        for parameter, value in _MALLOC_SETTINGS.items():
            mallopt(parameter, value)


def device_name() -> str:
    """Return the name of this rank's GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
