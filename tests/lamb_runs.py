"""Train the small BERT under DeepSpeed on this rank and report what the optimizer did; many cases per process.

The worker functions here are started by `ranks_harness.run_ranks`. Starting ranks costs seconds, so one start runs a
list of cases.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from lamb_reference import (
    NUM_MICRO_BATCHES,
    Formula,
    PlainLamb,
    Settings,
    State,
    adamw,
    decay_of,
    lans,
    lion,
    make_model,
    micro_batch,
    norm,
    paper,
    relative_error,
    stable_adamw,
)
from torch import Tensor, nn

from bert_ds.training.elementwise_optimizers import AdamW, Lion, StableAdamW
from bert_ds.training.lamb import Lamb, Lans, lamb_preset
from bert_ds.training.sharded_optimizer import GroupStep, ShardedOptimizer
from bert_kernels.lamb import Segment, SegmentTable

SETTINGS = Settings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6)
CLIP = 1.0
PARTS = {"*qkv.weight": ("query", "key", "value"), "*qv_bias": ("query", "value")}
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
    reduced: list[tuple[int, torch.dtype]] = field(default_factory=list)
    """Size and dtype of every all-reduce of the last `step` call."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's own parameters at the end."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}


class Shadowed(ShardedOptimizer):
    """Mixed into an optimizer under test: also applies the published formula to whole tensors.

    Whole gradients are put together from the shards by DeepSpeed's own order (storage offset, sub-group order), not by
    the layout under test.
    """

    formula: Formula

    scaled_rates = False

    def watch(self, named_parameters: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        self.params = dict(named_parameters)
        self.shadow = {name: whole_model_value(p).to(dtype).float() for name, p in self.params.items()}
        self.shadow_states = {name: State(w) for name, w in self.shadow.items()}
        self.worst = 0.0

    def _update(self, groups: Sequence[GroupStep]) -> None:
        if not hasattr(self, "params"):
            super()._update(groups)
            return
        gradients = [self._whole([shard.flat.grad_E for shard in group.shards], group) for group in groups]
        super()._update(groups)
        for group, whole in zip(groups, gradients, strict=True):
            masters = self._whole([shard.flat.param_E for shard in group.shards], group)
            for name, gradient in whole.items():
                lr = group.settings["lr"] * (rate_of(name) if self.scaled_rates else 1.0)
                settings = SETTINGS._replace(decay=decay_of(name), lr=lr)
                new = type(self).formula(self.shadow[name].view(-1), gradient, self._flat_state(name), settings)
                self.shadow[name] = new.view(self.shadow[name].shape)
                self.worst = max(self.worst, relative_error(masters[name], new))

    def _flat_state(self, name: str) -> State:
        state = self.shadow_states[name]
        state.m, state.v = state.m.view(-1), state.v.view(-1)
        return state

    def _whole(self, locals_: list[Tensor], group: GroupStep) -> dict[str, Tensor]:
        if group.layout.process_group is None:
            names = [n for n, (t, _) in zip(group.layout.names, group.layout.shards, strict=True) if t.grad is not None]
            return {n: t.clone() for n, t in zip(names, locals_, strict=True)}
        (local,) = locals_
        world_size = dist.get_world_size(group.layout.process_group)
        parts = [torch.empty_like(local) for _ in range(world_size)]
        dist.all_gather(parts, local.contiguous(), group=group.layout.process_group)
        if group.layout.kind == "flat":
            flat = torch.cat(parts)
            chosen = {name: self.params[name] for name in group.layout.names}
            return {n: flat[p.storage_offset() :][: p.numel()].clone() for n, p in chosen.items()}
        by_param = {p: name for name, p in self.params.items()}
        shards = next(iter(by_param))._z3_optimizer
        flats = shards.fp32_partitioned_groups_flat
        index = next(i for i, flat in enumerate(flats) if flat.data_ptr() == group.shards[0].flat.param_E.data_ptr())
        found, offset = {}, 0
        for p in shards.fp16_groups[index]:
            size = p.ds_tensor.ds_numel
            found[by_param[p]] = torch.cat([part[offset : offset + size] for part in parts])[: p.ds_numel].clone()
            offset += size
        return found


def shadowed(optimizer: type[ShardedOptimizer], formula: Formula) -> type[ShardedOptimizer]:
    """Return the optimizer with its shadow."""
    return type(f"Shadowed{optimizer.__name__}", (Shadowed, optimizer), {"formula": staticmethod(formula)})


class CountingLamb(Lamb):
    """Counts the all-reduces of its step."""

    def _update(self, groups: Sequence[GroupStep]) -> None:
        reduced, genuine = [], dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            reduced.append((tensor.numel(), tensor.dtype))
            return genuine(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            super()._update(groups)
        finally:
            dist.all_reduce = genuine
        self.reduced = reduced


class DroppedReduction(Lamb):
    """Forgets the other ranks."""

    def _find(self, groups: Any) -> Any:
        return [layout._replace(process_group=None) for layout in super()._find(groups)]


class CountedPadding(Lamb):
    """Takes the padding for a part of the tensor before it."""

    def _find(self, groups: Any) -> Any:
        return [_change_tables(layout, _swallow_padding) for layout in super()._find(groups)]


class PermutedLayout(Lamb):
    """Right offsets, wrong tensors: the rows are in reverse order."""

    def _find(self, groups: Any) -> Any:
        return [_change_tables(layout, _reverse_rows) for layout in super()._find(groups)]


def _change_tables(layout: Any, change: Any) -> Any:
    return layout._replace(shards=tuple((tensor, change(table)) for tensor, table in layout.shards))


def _swallow_padding(table: SegmentTable) -> SegmentTable:
    segments = []
    for index, segment in enumerate(table.segments):
        last = index + 1 == len(table.segments)
        end = table.num_elements if last else table.segments[index + 1].begin
        segments.append(segment._replace(length=end - segment.begin))
    return replace(table, segments=tuple(segments))


def _reverse_rows(table: SegmentTable) -> SegmentTable:
    rows = [(segment.row, segment.decay) for segment in reversed(table.segments)]
    segments = [Segment(s.begin, s.length, row, decay) for s, (row, decay) in zip(table.segments, rows, strict=True)]
    return replace(table, segments=tuple(segments))


OPTIMIZERS: dict[str, Any] = {
    "lamb": Lamb,
    "shadowed": shadowed(Lamb, paper),
    "counting": CountingLamb,
    "dropped_reduction": DroppedReduction,
    "counted_padding": CountedPadding,
    "permuted_layout": PermutedLayout,
    "lans": shadowed(Lans, lans),
    "stable_adamw": shadowed(StableAdamW, stable_adamw),
    "adamw": shadowed(AdamW, adamw),
    "lion": shadowed(Lion, lion),
}


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a case over the model."""
    common = {"lr": SETTINGS.lr, "betas": (SETTINGS.beta1, SETTINGS.beta2)}
    if case.optimizer != "lion":
        common["eps"] = SETTINGS.eps
    named = list(model.named_parameters())
    if case.optimizer in ("plain", "one_group_per_tensor"):
        groups = [{"params": [p], "weight_decay": decay_of(name)} for name, p in named if p.requires_grad]
        if case.optimizer == "one_group_per_tensor":
            return OneGroupPerTensor(groups, weight_decay=0.0, **common)
        two = [{"params": [], "weight_decay": decay} for decay in (0.1, 0.0)]
        for group in groups:
            two[group["weight_decay"] == 0.0]["params"] += group["params"]
        return PlainLamb(two, weight_decay=0.0, **common)
    decays = {p: decay_of(name) for name, p in named}
    name, _, preset = case.optimizer.partition(":")
    flags = {"flags": lamb_preset(preset or "paper")} if issubclass(OPTIMIZERS[name], Lamb) else {}
    optimizer = OPTIMIZERS[name](named, weight_decay_of=decays.__getitem__, **common, **flags)
    if case.fused_qkv:
        optimizer.declare_parts(PARTS)
    if case.scaled_rates:
        optimizer.declare_rates(rate_of)
        optimizer.scaled_rates = True
    return optimizer


def rate_of(name: str) -> float:
    """A factor of the learning rate that differs between tensors."""
    return (1.0, 0.5, 0.1)[len(name) % 3]


class OneGroupPerTensor(PlainLamb):
    """Plain LAMB with one group per tensor, and norms summed over the ranks: exact, slow, and knows no layout at all.

    DeepSpeed's own padding is zero at stages 1 and 2 and must be zeroed by the caller at stage 3.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                s = Settings(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
                state = self.state[w].setdefault("state", State(w))
                state.t += 1
                state.m = s.beta1 * state.m + (1 - s.beta1) * w.grad
                state.v = s.beta2 * state.v + (1 - s.beta2) * w.grad**2
                corrected = (state.v / (1 - s.beta2**state.t)).sqrt() + s.eps
                u = state.m / (1 - s.beta1**state.t) / corrected + s.decay * w
                squares = torch.tensor([norm(w) ** 2, norm(u) ** 2], dtype=torch.float64)
                dist.all_reduce(squares)
                weight_norm, update_norm = squares.sqrt().tolist()
                w.sub_(s.lr * (weight_norm / update_norm if weight_norm and update_norm else 1.0) * u)


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
    if isinstance(optimizer, Shadowed):
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
    if case.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = make_model(with_unused=case.with_unused, fused_qkv=case.fused_qkv)
    else:
        model = make_model(with_unused=case.with_unused, fused_qkv=case.fused_qkv)
    optimizer = make_optimizer(case, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
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
    report.reduced = getattr(optimizer, "reduced", [])
    if isinstance(optimizer, Shadowed):
        dtype = DTYPES[case.precision]
        report.shadow_error = optimizer.worst
        report.model_error = max(
            relative_error(w.float(), optimizer.shadow[name].to(dtype).float()) for name, w in weights.items()
        )
    return report


def whole_model_value(param: nn.Parameter) -> Tensor:
    """Return a copy of a parameter's value as the model sees it, gathered under ZeRO-3."""
    if not hasattr(param, "ds_tensor"):
        return param.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()


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
