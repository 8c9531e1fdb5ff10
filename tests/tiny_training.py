"""A model of a few parameters, its batches and an engine: what the tests of the training station share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.basics.micro_batch import NO_FILLINGS, Fillings
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints.checkpoint_loader import resume
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import LoopSettings, TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.launch.process_group import leave_out_shared_memory_operator
from bert_ds.training.launch.restart import StopRequest
from bert_ds.training.loop.throughput import Throughput
from bert_ds.training.loop.train_loop import Services, train
from bert_ds.training.optimizers.param_groups import decay_groups

WIDTH = 7


class TinyModel(nn.Module):
    """Regression with two loss terms and one tied weight; dropout by the given seed."""

    terms = (
        LossTerm("square", count="rows", metric="square_correct", of_words=True),
        LossTerm("pair", count="pairs", metric="pair_correct", weight=0.5),
    )

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.LayerNorm = nn.LayerNorm(WIDTH)
        self.pair = nn.Linear(WIDTH, 2)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            for linear in (self.dense, self.pair):
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * 0.3)
                linear.bias.zero_()
        self.tied.weight = self.dense.weight

    def forward(self, *, x_TD: Tensor, y_T: Tensor, pair_N: Tensor, dropout_seed: Tensor | None) -> tuple:
        hidden_TD = self.LayerNorm(self.tied(torch.tanh(self.dense(x_TD.to(self.dense.weight.dtype)))))
        if dropout_seed is not None:
            generator = torch.Generator().manual_seed(int(dropout_seed) % 2**31)
            hidden_TD = hidden_TD * (torch.rand(hidden_TD.shape, generator=generator) > 0.1)
        error_T = hidden_TD.float().sum(dim=1) - y_T
        logits_N2 = self.pair(hidden_TD[: len(pair_N)]).float()
        losses = torch.stack([error_T.square().sum(), nn.functional.cross_entropy(logits_N2, pair_N, reduction="sum")])
        correct = torch.stack([(error_T.abs() < 0.5).sum(), (logits_N2.argmax(1) == pair_N).sum()]).float()
        return losses, correct


@dataclass(frozen=True)
class TinyBatch:
    """T rows, N pairs."""

    x_TD: Tensor
    y_T: Tensor
    pair_N: Tensor
    kind_counts: ClassVar[dict[str, int]] = {}
    fillings: ClassVar[Fillings] = NO_FILLINGS
    example_ids: ClassVar[None] = None

    @property
    def counts(self) -> dict[str, float]:
        return {"rows": float(len(self.y_T)), "pairs": float(len(self.pair_N))}

    @property
    def num_tokens(self) -> int:
        return len(self.y_T)

    @property
    def padded_tokens(self) -> int:
        return 2 * len(self.y_T)

    def model_inputs(self) -> dict[str, Any]:
        return {"x_TD": self.x_TD, "y_T": self.y_T, "pair_N": self.pair_N}

    def to(self, device: Any) -> TinyBatch:
        return TinyBatch(self.x_TD.to(device), self.y_T.to(device), self.pair_N.to(device))


def micro_batch(step: int, part: int) -> TinyBatch:
    """The micro-batch at a place of a step's global batch; sizes differ from place to place."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    rows = 3 + (5 * part + step) % 6
    return TinyBatch(
        torch.randn(rows, WIDTH, generator=generator),
        torch.randn(rows, generator=generator),
        torch.randint(0, 2, (1 + part % 3,), generator=generator),
    )


def step_batches(start_step: int, rank: int, accumulation: int) -> Iterator[Sequence[TinyBatch]]:
    """This rank's micro-batches of every step after start_step."""
    step = start_step
    while True:
        step += 1
        yield [micro_batch(step, rank * accumulation + micro) for micro in range(accumulation)]


def ds_config(stage: int, *, precision: str = "fp32", accumulation: int = 1, world_size: int = 1) -> dict[str, Any]:
    """A DeepSpeed configuration with what the tests rely on written out."""
    return {
        "train_batch_size": 2 * accumulation * world_size,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": "fp32" if stage else precision},
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            # The default reserves 2 GB per engine of stage 3. A process with ten such can no longer fork a loader.
            "reduce_bucket_size": 1_000_000,
        },
    }


class OverflowingModel(TinyModel):
    """A model whose loss is infinite while every gradient is finite."""

    def forward(self, **inputs: Any) -> tuple:
        losses, correct = super().forward(**inputs)
        return losses + float("inf"), correct


def tiny_engine(config: dict[str, Any], *, model: nn.Module | None = None) -> Any:
    """An engine over a TinyModel with AdamW in two groups."""
    model = model or TinyModel()
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters(), 0.1), lr=1e-2, fused=True)
    return make_engine(model, optimizer, config)


def tiny_loop(total_steps: int, **changes: Any) -> LoopSettings:
    """Settings with a constant rate that logs every step."""
    schedule = ScheduleConfig(type="constant", warmup_steps=0)
    settings = {"seed": 3, "peak_lr": 1e-2, "schedule": schedule, "log_every_steps": 1, **changes}
    return LoopSettings(total_steps=total_steps, **settings)


def join_alone() -> None:
    """Make this process the only rank of a gloo group; the group stays for the rest of the test session."""
    import deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    leave_out_shared_memory_operator()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, dist_init_required=False)


def full_weights(engine: Any, *, flat: bool = True) -> Any:
    """All fp32 master weights, whatever the stage, as one vector or in the model's order."""
    from deepspeed.utils import safe_get_full_fp32_param

    parts = []
    masters = [p for group in getattr(engine.optimizer, "fp32_groups", []) for p in group]
    names = [name for group in engine.checkpoint_engine.parameter_names for name in group]
    by_name = dict(zip(names, masters, strict=False))
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization():
            full = safe_get_full_fp32_param(parameter)
        else:
            full = by_name.get(name, parameter)
        parts.append(full.detach().float().clone())
    return torch.cat([part.flatten() for part in parts]) if flat else parts


def optimizer_digest(engine: Any) -> str:
    """A hash of this rank's optimizer state, step counts included."""
    digest = hashlib.sha256()
    for state in engine.basic_optimizer.state.values():
        for name, value in sorted(state.items()):
            digest.update(f"{name} {value.double().tolist() if torch.is_tensor(value) else value}".encode())
    return digest.hexdigest()


def tiny_services(run_dir: Path, rank: int, world_size: int, **changes: Any) -> Services:
    """Log, stop flag and meter of one rank."""
    log = RunLog(run_dir, Ranks(rank, rank, world_size), total_steps=10)
    parts = {"log": log, "stop": StopRequest(), "throughput": Throughput(world_size=world_size), **changes}
    return Services(**parts)


FACTS = {"data_fingerprint": "d1"}


def run_tiny(
    run_dir: Path,
    ranks: Ranks,
    *,
    config: dict[str, Any],
    steps: int,
    total_steps: int = 6,
    save_every: int = 2,
    asynchronous: bool = False,
) -> tuple[Any, TrainState]:
    """Resume what the folder holds and train on to `steps`, saving now and then."""
    engine = tiny_engine(config)
    services = tiny_services(run_dir, ranks.rank, ranks.world_size)
    log = services.log
    state = resume(engine, run_dir, name=None, facts=FACTS, log=log) or TrainState()
    policy = CheckpointPolicy(keep_last=2, facts=FACTS, asynchronous=asynchronous)
    saver = CheckpointSaver(engine, run_dir, policy=policy, log=log)
    log.start(state.step, {})
    batches = step_batches(state.step, ranks.rank, config["gradient_accumulation_steps"])
    loop = tiny_loop(total_steps, checkpoint_every_steps=save_every, max_steps=steps)
    services = replace(services, save=saver.save, settle=saver.settle)
    train(engine, batches, state=state, loop=loop, services=services)
    log.close()
    return engine, state
