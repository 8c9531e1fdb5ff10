"""What is found out about a step that was not applied, and left in `trouble/step_N/` of the run folder.

The gradients of a dropped step are gone, so its forward and backward are done again, beside the engine: weights and
dropout are the same, hence also the gradients. The engine's own sums are not touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.whole_files import write_json
from bert_ds.training.loop.micro_losses import micro_losses

_NUM_LARGEST = 10


def trouble_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of what is known about a bad step."""
    return run_dir / "trouble" / f"step_{step}"


def write_report(folder: Path, facts: dict[str, Any], micro_batches: list[dict[str, Any]]) -> None:
    """Write this rank's part of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank_{dist.get_rank()}.json", spelled({**facts, "micro_batches": micro_batches}))


def gradient_report(
    engine: DeepSpeedEngine, micro_batches: Sequence[MicroBatch], *, counts: Mapping[str, float], seed: int, step: int
) -> list[dict[str, Any]]:
    """Return what each micro-batch of this rank does to the gradients of a step; a collective, nothing is changed.

    Args:
        engine: from `make_engine`, between two steps.
        micro_batches: of this rank.
        counts: targets by name over the whole step.
        seed: of the run.
        step: whose dropout is used.

    Returns:
        Per micro-batch its share of each loss term, the ids of its examples, the names of tensors whose gradient is not
        finite, and the largest gradient norms by tensor. Gradients are this rank's alone, before any averaging.
    """
    named = [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]
    terms, reports = engine.module.terms, []
    # Through the module: the engine would take the backward of its own output for one of its micro-steps.
    losses = micro_losses(engine.module, micro_batches, counts=counts, seed=seed, step=step, device=engine.device)
    for batch, (loss, all_sums) in zip(micro_batches, losses, strict=True):
        gradients = torch.autograd.grad(loss, [one for _, one in named], allow_unused=True)
        norms = {
            name: float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            for (name, _), gradient in zip(named, gradients, strict=True)
            if gradient is not None
        }
        sums = [(term.name, total, counts[term.count]) for term, total in zip(terms, all_sums.tolist(), strict=False)]
        shares = {name: total / count if count else 0.0 for name, total, count in sums}
        reports.append(
            {
                "loss_shares": shares,
                "not_finite": [name for name, norm in norms.items() if not math.isfinite(norm)],
                "largest_gradients": dict(sorted(norms.items(), key=_finite_first)[:_NUM_LARGEST]),
                "example_ids": None if batch.example_ids is None else batch.example_ids.tolist(),
            }
        )
    return reports


def _finite_first(item: tuple[str, float]) -> tuple[bool, float]:
    return not math.isfinite(item[1]), -item[1]


def spelled(value: Any) -> Any:
    """Return a JSON value in which every number that is not finite is its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: spelled(one) for key, one in value.items()}
    return [spelled(one) for one in value] if isinstance(value, list) else value
