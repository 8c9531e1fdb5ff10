"""What a run with `training.precision` "auto" computes in: decided once, by rank 0, and kept by every resume.

On an accelerator of its own that is bf16 where DeepSpeed supports it. On a CPU it depends on the instructions: bf16 is
several times as fast as fp32 with AMX, and slower than fp32 where the processor has no instruction for it at all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from deepspeed.accelerator import get_accelerator

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.precision import Precision, PrecisionSetting
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.checkpoints.checkpoint_folder import candidates, read_manifest

MIN_SPEEDUP = 1.3
"""bf16 costs digits: it has to be so much faster than fp32."""

_DESCRIPTIONS = ("run_config.json", "task_config.json")
_SPELLINGS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_NUM_TOKENS = 512
_MIN_ROUNDS = 3
_MAX_ROUNDS = 20
_ENOUGH_S = 0.3


class GemmRates(NamedTuple):
    """FLOP/s of the same matrix product in both precisions."""

    fp32: float
    bf16: float


class Decision(NamedTuple):
    """What a run computes in, and the sentence that the log says about it ("" where a file says it)."""

    precision: Precision
    reason: str

    def say(self, say: Callable[[str], None]) -> None:
        """Say the sentence, if there is one."""
        if self.reason:
            say(self.reason)


def decide_precision(
    setting: PrecisionSetting,
    model: EncoderConfig,
    *,
    earlier: Sequence[Path] = (),
    measure: Callable[[EncoderConfig], GemmRates] | None = None,
) -> Decision:
    """Return what the run computes in, equal on all ranks; a collective.

    Args:
        setting: of the recipe or the task.
        model: shape of the network.
        earlier: run folders that this launch may continue; what the first of them was trained in is kept.
        measure: times the product on rank 0; None is `gemm_rates`.
    """
    if setting != "auto":
        return Decision(setting, "")
    return Decision(*on_main_rank(lambda: _decide(model, earlier=earlier, measure=measure or gemm_rates)))


def gemm_rates(model: EncoderConfig) -> GemmRates:
    """Time the product of a feed-forward layer, [512, hidden] x [hidden, intermediate], on this process' threads.

    Both precisions take turns, so that a busy moment of the machine meets both; of each the best time counts.
    """
    x_TD, w_FD = torch.randn(_NUM_TOKENS, model.hidden_size), torch.randn(model.intermediate_size, model.hidden_size)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    operands = {dtype: (x_TD.to(dtype), w_FD.to(dtype)) for dtype in best}
    begun, rounds = time.perf_counter(), 0
    while rounds < _MIN_ROUNDS or (rounds < _MAX_ROUNDS and time.perf_counter() - begun < _ENOUGH_S):
        for dtype, (x, w) in operands.items():
            started = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
        rounds += 1
    flops = 2 * _NUM_TOKENS * model.hidden_size * model.intermediate_size
    return GemmRates(flops / best[torch.float32], flops / best[torch.bfloat16])


def faster_precision(rates: GemmRates) -> Precision:
    """Return bf16 where it is at least MIN_SPEEDUP times as fast as fp32."""
    return "bf16" if rates.bf16 >= MIN_SPEEDUP * rates.fp32 else "fp32"


def earlier_precision(run_dir: Path) -> tuple[Precision, Path] | None:
    """Return what a run was trained in and the file that says so; None for a folder that holds no run.

    A checkpoint is believed before the description beside it: that one is written by every launch, this one only by a
    launch that has trained.
    """
    for checkpoint in candidates(run_dir):
        try:
            found = _SPELLINGS.get(str(read_manifest(checkpoint).get("precision")))
        except CheckpointError:
            continue  # named and passed over where it is loaded
        if found is not None:
            return found, checkpoint
    for name in _DESCRIPTIONS:
        try:
            found = json.loads((run_dir / name).read_bytes())["training"]["precision"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if found in get_args(Precision):
            return found, run_dir / name
    return None


def _decide(
    model: EncoderConfig, *, earlier: Sequence[Path], measure: Callable[[EncoderConfig], GemmRates]
) -> tuple[Precision, str]:
    for run_dir in earlier:
        if (found := earlier_precision(run_dir)) is not None:
            return found[0], f"training.precision auto: {found[0]}, as in {found[1]}"
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        precision: Precision = "bf16" if accelerator.is_bf16_supported() else "fp32"
        return precision, f"training.precision auto: {precision} on {accelerator.device_name()}"
    rates = measure(model)
    precision = faster_precision(rates)
    return precision, (
        f"training.precision auto: {precision}; [{_NUM_TOKENS}, {model.hidden_size}] x [{model.hidden_size}, "
        f"{model.intermediate_size}] runs at {rates.fp32 / 1e9:.1f} GFLOP/s in fp32 and {rates.bf16 / 1e9:.1f} in bf16 "
        f"on {torch.get_num_threads()} threads, bf16 has to be {MIN_SPEEDUP} times as fast"
    )
