"""Train the small BERT under DeepSpeed on this rank and report what the optimizer did; many cases per process.

The worker functions here are started by `ranks_harness.run_ranks`. Starting ranks costs seconds, so one start runs a
list of cases.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lamb_bert import NUM_MICRO_BATCHES, make_model, micro_batch
from lamb_optimizers import CLIP, Shadowed, whole_model_value
from lamb_reference import (
    relative_error,
)
from muon_optimizers import make_any_optimizer
from torch import Tensor, nn

from bert_ds.training.optimizers.factory import share_replicated_work
from bert_ds.training.optimizers.lamb import Lamb

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One training run under DeepSpeed."""

    stage: int
    precision: str = "fp32"
    optimizer: str = "lamb"
    num_steps: int = 20
    num_micro_batches: int = NUM_MICRO_BATCHES
    """Per step, over all ranks."""
    num_layers: int = 2
    zero: dict[str, Any] = field(default_factory=dict)
    """Further keys of zero_optimization."""
    top: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed configuration."""
    zero_init: bool = False
    with_unused: bool = False
    fused_qkv: bool = False
    """Query, key and value are parts of one tensor."""
    scaled_rates: bool = False
    """Every tensor has its own factor of the learning rate."""
    poison_padding: bool = False
    """Write NaN into every element of the shards that belongs to no parameter, before the first step."""

    @property
    def label(self) -> str:
        """Short name for tables and test ids."""
        options = [f"{key}={value}" for key, value in {**self.zero, **self.top}.items()]
        flags = [
            name
            for name in ("zero_init", "with_unused", "fused_qkv", "scaled_rates", "poison_padding")
            if getattr(self, name)
        ]
        return "-".join([f"stage{self.stage}", self.precision, self.optimizer, *options, *flags]).replace(" ", "")


@dataclass
class Report:
    """What a run did, as seen by this rank."""

    arrays: dict[str, Any]
    """The model's own parameters at the end, whole, fp32; numpy, because a tensor does not outlive its process."""
    grad_norms: list[float]
    straddling: list[str]
    """Parameters of which this rank's shards hold a part only."""
    kinds: set[str]
    state_keys: set[str]
    steps: set[int]
    shadow_error: float = 0.0
    """Worst relative error of a master tensor against the formula applied to the gradients the optimizer was given."""
    model_error: float = 0.0
    """Worst relative error of the model's own parameters against the shadow rounded to their dtype."""
    num_skipped: int = 0
    padding_is_nan: bool = True
    trust: dict[str, float] = field(default_factory=dict)
    first_moments: dict[str, Any] = field(default_factory=dict)
    """After a single step under ZeRO: a tenth of the clipped gradient of every tensor; numpy."""
    reduced: list[tuple[int, torch.dtype]] = field(default_factory=list)
    """Size and dtype of every all-reduce of the last `step` call."""
    num_different: int = 0
    """Elements of the masters that have not the bits of an optimizer on whole tensors with the same gradients."""
    messages: list[int] = field(default_factory=list)
    """Elements sent to other ranks by each message of the last `step` call."""
    num_orthogonalised: int = 0
    """Matrices orthogonalised on this rank in the last `step` call."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's own parameters at the end."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


def ds_config(case: Case, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a case."""
    accumulation = case.num_micro_batches // world_size
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": 2 * accumulation * world_size,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "steps_per_print": 10**9,
    }
    if case.precision != "fp32":
        config[case.precision] = {"enabled": True}
    return {**config, **case.top}


def run_cases(rank: int, world_size: int, cases: Sequence[Case]) -> list[Report]:
    """Worker: run the cases one after the other."""
    quiet_deepspeed()
    return [run_case(case, world_size) for case in cases]


def quiet_deepspeed() -> None:
    """Silence DeepSpeed and let fp16 run on the CPU."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True


def run_case(case: Case, world_size: int) -> Report:
    """Train, and report."""
    engine, optimizer, model = build(case, world_size)
    if hasattr(optimizer, "watch"):
        optimizer.watch(list(model.named_parameters()), DTYPES[case.precision])
    if case.poison_padding:
        poison_padding(engine, optimizer, case.stage)
    norms, skipped = train(engine, 0, case.num_steps)
    report = make_report(case, optimizer, model)
    report.grad_norms, report.num_skipped = norms, skipped
    if case.poison_padding:
        report.padding_is_nan = all(bool(part.isnan().all()) for part in padding(engine, optimizer, case.stage))
    engine.destroy()
    del engine
    gc.collect()
    return report


def build(case: Case, world_size: int) -> tuple[Any, torch.optim.Optimizer, nn.Module]:
    """Return the engine, the optimizer and the model of a case, before the first step."""
    import deepspeed

    config = ds_config(case, world_size)
    options = {"num_layers": case.num_layers, "with_unused": case.with_unused, "fused_qkv": case.fused_qkv}
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = make_model(**options)
    else:
        model = make_model(**options)
    optimizer = make_any_optimizer(case.optimizer, model, fused_qkv=case.fused_qkv, scaled_rates=case.scaled_rates)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    share_replicated_work(optimizer, zero_stage=case.stage)
    return engine, optimizer, model


def train(engine: Any, first_step: int, num_steps: int) -> tuple[list[float], int]:
    """Run optimizer steps on this rank's micro-batches; return gradient norms and the number of skipped steps."""
    accumulation, rank = engine.gradient_accumulation_steps(), dist.get_rank()
    norms, before = [], engine.skipped_steps
    for step in range(first_step, first_step + num_steps):
        for micro_step in range(accumulation):
            loss = engine(*micro_batch(step, rank * accumulation + micro_step))
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm() or math.nan))
    return norms, engine.skipped_steps - before


def make_report(case: Case, optimizer: Any, model: nn.Module) -> Report:
    """Return what can be seen on this rank after training."""
    from deepspeed.utils import safe_get_full_optimizer_state

    weights = {name: whole_model_value(p) for name, p in model.named_parameters()}
    layouts = list(getattr(optimizer, "_layouts", {}).values())
    sizes = {name: w.numel() for name, w in weights.items()}
    for entry in getattr(optimizer, "_owned", []):
        sizes |= {f"{entry.name}.{part}": sizes[entry.name] // len(entry.parts) for part in entry.parts}
    straddling = [
        layout.names[segment.row]
        for layout in layouts
        for _, table in layout.shards
        for segment in table.segments
        if segment.length < sizes[layout.names[segment.row]]
    ]
    states = [state for state in optimizer.state.values() if "step" in state]
    report = Report(
        arrays={name: w.float().numpy() for name, w in weights.items()},
        grad_norms=[],
        straddling=straddling,
        kinds={layout.kind for layout in layouts},
        state_keys={key for state in states for key in state},
        steps={state["step"] for state in states},
    )
    if isinstance(optimizer, Lamb):
        report.trust = {name: one.trust_ratio for name, one in optimizer.trust_statistics().items()}
    if case.num_steps == 1 and case.stage:
        moments = {name: safe_get_full_optimizer_state(p, "exp_avg") for name, p in model.named_parameters()}
        report.first_moments = {name: moment.float().numpy().copy() for name, moment in moments.items()}
    report.reduced = getattr(optimizer, "reduced", [])
    for name in ("num_different", "messages", "num_orthogonalised"):
        setattr(report, name, getattr(optimizer, name, getattr(report, name)))
    if isinstance(optimizer, Shadowed):
        dtype = DTYPES[case.precision]
        report.shadow_error = optimizer.worst
        report.model_error = max(
            relative_error(w.float(), optimizer.shadow[name].to(dtype).float()) for name, w in weights.items()
        )
    return report


def padding(engine: Any, optimizer: Any, stage: int) -> list[Tensor]:
    """Return views of the elements of this rank's shards that belong to no parameter."""
    if stage == 0:
        return []
    if stage < 3:
        (flat,) = engine.optimizer.single_partition_of_fp32_groups
        used = sum(entry.param.numel() for entry in optimizer._owned)
        begin = max(0, used - dist.get_rank() * flat.numel())
        return [flat.detach()[begin:]]
    found = []
    for group, flat in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for p in group:
            part = p.ds_tensor.ds_numel
            valid = min(max(p.ds_numel - dist.get_rank() * part, 0), part)
            found.append(flat.detach()[offset + valid : offset + part])
            offset += part
    return found


def poison_padding(engine: Any, optimizer: Any, stage: int) -> None:
    """Fill the padding of the master weights with NaN."""
    for part in padding(engine, optimizer, stage):
        part.fill_(math.nan)
