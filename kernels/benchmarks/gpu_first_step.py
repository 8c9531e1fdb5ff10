"""What `gpu_first` measures on one training step of the real engine; each in a process of its own.

    python kernels/benchmarks/gpu_first_step.py facts                         GPU, driver, versions, commit
    python kernels/benchmarks/gpu_first_step.py figures RUN_DIR               losses and speed that a run has logged
    python kernels/benchmarks/gpu_first_step.py waits WORDS OF pretrain.py    what in a step waits for the card
    python kernels/benchmarks/gpu_first_step.py profile WORDS OF pretrain.py  top kernels, idle share, host time
    python kernels/benchmarks/gpu_first_step.py memory WORDS OF pretrain.py   peak against the planner's estimate

A step is one of the recipe's own, its data and all, on one rank.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_first_stages import figure_line

SYNC_WARNING = "synchronizing CUDA operation"
"""Part of what torch says under `torch.cuda.set_sync_debug_mode`."""
NUM_KERNELS = 12


def say(name: str, value: Any, unit: str = "") -> None:
    """Hand a figure over."""
    print(figure_line(name, value, unit), flush=True)


def facts(commit: str | None) -> None:
    """Say what machine this is."""
    import torch
    from bench_harness import circumstances

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in circumstances(device, commit).items():
        say(name, value)
    say("device", device.type)
    for name in ("transformers", "deepspeed", "pydantic", "liger_kernel", "flash_attn"):
        say(name, _version(name))
    say("python", sys.version.split()[0])
    say("cpus", os.cpu_count())
    say("driver", _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0])
    say("nvcc", _output("nvcc", "--version").rpartition("release ")[2].partition(",")[0])
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        say("memory", card.total_memory, "bytes")
        say("multiprocessors", card.multi_processor_count)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()


def figures(run_dir: Path) -> None:
    """Say what a run has logged: the loss of a few steps, and the speed of the later ones."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {row["step"]: row for row in rows if row["kind"] == "train"}
    logged = sorted(steps)
    for step in logged if len(logged) <= 20 else [logged[0], logged[len(logged) // 2], logged[-1]]:
        say(f"loss of step {step}", f"{steps[step]['loss']:.6f}")
    later = [steps[step] for step in logged[len(logged) // 2 :]]
    say("tokens per second", f"{statistics.median(row['tokens_per_s'] for row in later):.0f}", "tokens/s")
    if all(row["mfu"] is not None for row in later):
        say("MFU", f"{100 * statistics.median(row['mfu'] for row in later):.1f}", "%")


@contextmanager
def opened_run(words: list[str]) -> Iterator[Any]:
    """Open a run as pretrain.py does, engine and data, on this rank alone."""
    from bert_ds.basics.ranks import read_ranks
    from bert_ds.configuration.run_plan import make_plan
    from bert_ds.launch.launch_checks import checked_run, pretrain_arguments
    from bert_ds.pretrain import open_run
    from bert_ds.training.launch.process_group import joined_ranks

    args = pretrain_arguments(words)
    run, ds = checked_run(args)
    ranks = read_ranks()
    plan = make_plan(run, ds, ranks.world_size)
    with joined_ranks(ranks):
        opened = open_run(plan, ranks, args=args)
        opened.engine.train()
        yield opened


class Stepper:
    """Takes training steps of an opened run, one after the other."""

    def __init__(self, opened: Any, num_steps: int) -> None:
        import torch

        from bert_ds.corpus.batches.plan_batches import training_batches
        from bert_ds.training.loop.loss_guard import LossGuard
        from bert_ds.training.loop.train_step import Judge

        self.engine, self.seed, self.number = opened.engine, opened.plan.run.seed, 0
        # Loaded beforehand: what is watched is the step, no loader.
        batches = training_batches(opened.plan, opened.data, opened.ranks, start=0)
        self._batches = list(itertools.islice(batches, num_steps))
        self._judge = Judge(LossGuard(4.0, 8, recent=[], device=self.engine.device), armed=True)
        self.synchronize: Callable[[], object] = (
            torch.cuda.synchronize if self.engine.device.type == "cuda" else lambda: None
        )

    def prepare(self) -> Callable[[], object]:
        """Return the next step, whose counts are agreed on."""
        from bert_ds.training.loop.train_step import agree_on_totals, forward_backward

        self.number += 1
        batches = self._batches[self.number - 1]
        counts = agree_on_totals(batches, data_wait_s=0.0, stop=False).counts
        return lambda: forward_backward(
            self.engine, batches, counts=counts, seed=self.seed, step=self.number, judge=self._judge
        )

    def step(self) -> None:
        """Take a whole step."""
        from bert_ds.training.loop.train_step import take_step

        self.prepare()()
        take_step(self.engine)


def waits(words: list[str]) -> None:
    """Say what waits in a step, and take one in which waiting is an error.

    Raises:
        RuntimeError: something of ours waits; the message is torch's.
    """
    import torch

    from bert_ds.training.loop.train_step import take_step

    with opened_run(words) as opened:
        on_card = opened.engine.device.type == "cuda"
        set_mode = torch.cuda.set_sync_debug_mode if on_card else (lambda mode: None)
        stepper = Stepper(opened, 4)
        stepper.step()  # compiles kernels, makes what is made once
        stepper.step()
        for mode in ("warn", "error"):
            stepper.synchronize()
            take = stepper.prepare()
            ours, apart = watched_waits(
                stepper.engine, lambda take=take: (take(), take_step(stepper.engine)), set_mode=set_mode, mode=mode
            )
            for place in sorted(set(ours)):
                say(f"waits, {place}", ours.count(place))
            for place in sorted(set(apart)) if mode == "error" else ():
                say(f"waits inside DeepSpeed's engine.step, {place}", apart.count(place))
        say("waits of a step", len(ours))
        say("waits inside DeepSpeed's engine.step", len(apart))
        say("watched by torch.cuda.set_sync_debug_mode", on_card)


def watched_waits(
    engine: Any, take: Callable[[], object], *, set_mode: Callable[[str], object], mode: str
) -> tuple[list[str], list[str]]:
    """Run `take` under a mode of torch's and return the places that waited: (ours, inside `engine.step`).

    In the mode "error" the first place of ours raises; inside DeepSpeed's `engine.step` torch only warns in any mode.
    """
    engine_step, apart = engine.step, []

    def step_apart(*args: Any, **kwargs: Any) -> Any:
        set_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                return engine_step(*args, **kwargs)
        finally:
            apart.extend(_places(seen))
            set_mode(mode)

    engine.step = step_apart
    set_mode(mode)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            take()
    finally:
        set_mode("default")
        engine.step = engine_step
    return _places(seen), apart


def _places(seen: Iterable[Any]) -> list[str]:
    waited = (each for each in seen if SYNC_WARNING in str(each.message))
    return [f"{'/'.join(Path(each.filename).parts[-3:])}:{each.lineno}" for each in waited]


def profile(words: list[str]) -> None:
    """Say where the time of a step goes: the longest kernels, how long the card is idle, and the host's part."""
    import torch
    from torch.profiler import ProfilerActivity

    from bert_ds.training.loop.train_step import take_step

    with opened_run(words) as opened:
        stepper = Stepper(opened, 12)
        for _ in range(3):
            stepper.step()
        _host_time(stepper, take_step, repeats=8)
        on_card = opened.engine.device.type == "cuda"
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_card else [])]
        ) as found:
            stepper.step()
            stepper.synchronize()
        kernels = [each for each in found.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(each.time_range.start, each.time_range.end) for each in kernels]
        for place, (name, total, count) in enumerate(longest((each.name, each.device_time_total) for each in kernels)):
            say(f"kernel {place + 1}: {name[:80]}", f"{total:.0f}", f"us in {count} launches")
        say("kernels of a step", len(kernels))
        say("idle share of the GPU in a profiled step", f"{100 * idle_share(spans):.1f}", "%")


def _host_time(stepper: Stepper, take_step: Callable[[Any], object], *, repeats: int) -> None:
    """Say how long the host takes to launch forward and backward, and how long until all of it has run."""
    host, passes, whole = [], [], []
    for _ in range(repeats):
        take = stepper.prepare()
        stepper.synchronize()
        begun = time.perf_counter()
        take()
        host.append(time.perf_counter() - begun)
        stepper.synchronize()
        passes.append(time.perf_counter() - begun)
        take_step(stepper.engine)
        stepper.synchronize()
        whole.append(time.perf_counter() - begun)
    say("host time of forward and backward", f"{1e3 * statistics.median(host):.2f}", "ms")
    say("forward and backward", f"{1e3 * statistics.median(passes):.2f}", "ms")
    say("whole step", f"{1e3 * statistics.median(whole):.2f}", "ms")
    say("micro-steps of a step", stepper.engine.gradient_accumulation_steps())


def longest(kernels: Iterable[tuple[str, float]], number: int = NUM_KERNELS) -> list[tuple[str, float, int]]:
    """Return (name, total time, launches) of the kernels that take longest."""
    ordered = sorted(kernels)
    groups = [(name, [time for _, time in group]) for name, group in itertools.groupby(ordered, lambda each: each[0])]
    sums = [(name, sum(times), len(times)) for name, times in groups]
    return sorted(sums, key=lambda each: -each[1])[:number]


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Return the share of the time between the first beginning and the last end in which no span lies; 0 of none."""
    if not spans:
        return 0.0
    busy, reached = 0.0, min(begin for begin, _ in spans)
    first, last = reached, max(end for _, end in spans)
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1.0 - busy / (last - first) if last > first else 0.0


def memory(words: list[str]) -> None:
    """Say what a step on the longest batch takes at its peak, and what the planner expects."""
    from bert_ds.corpus.batches.plan_batches import longest_batches
    from bert_ds.training.loop.trial_step import probe_longest

    with opened_run(words) as opened:
        batch = longest_batches(opened.plan, opened.data)(opened.plan.split.micro_batch_size)
        found, planned = probe_longest(opened.engine, batch), opened.plan.memory().device
        say("peak memory", found.peak_bytes, "bytes")
        say("planned memory", planned, "bytes")
        say("peak over plan", f"{found.peak_bytes / planned:.3f}")
        say("compiling and optimizer state in the first step", f"{found.first_seconds - found.seconds:.2f}", "s")


def main(words: list[str]) -> None:
    """Do what the first word says."""
    what, rest = words[0], words[1:]
    if what == "facts":
        facts(rest[1] if rest else None)
    elif what == "figures":
        figures(Path(rest[0]))
    else:
        {"waits": waits, "profile": profile, "memory": memory}[what](rest)


if __name__ == "__main__":
    main(sys.argv[1:])
