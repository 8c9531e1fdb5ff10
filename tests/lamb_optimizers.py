"""The optimizers that the tests hand to DeepSpeed: ours, watched by a shadow or wrong on purpose, and plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lamb_bert import decay_of
from lamb_reference import (
    PUBLISHED,
    Formula,
    PlainLamb,
    Settings,
    State,
    adamw,
    apex,
    apex_l2,
    clamped_norm,
    deepspeed,
    lambc,
    lans,
    lion,
    norm,
    paper,
    paper_v3,
    relative_error,
    stable_adamw,
)
from torch import Tensor, nn

from bert_ds.training.optimizers.elementwise_optimizers import AdamW, Lion, StableAdamW
from bert_ds.training.optimizers.lamb import Lamb, LambFlags, Lans
from bert_ds.training.optimizers.sharded_optimizer import GroupStep, ShardedOptimizer
from bert_kernels.flat_shard import Segment, SegmentTable

SETTINGS = Settings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6)


CLIP = 1.0


PARTS = {"*qkv.weight": ("query", "key", "value"), "*qv_bias": ("query", "value")}


class Watched(ShardedOptimizer):
    """Mixed into an optimizer under test: compares its masters with what whole gradients would have made of them.

    Whole gradients are put together from the shards by DeepSpeed's own order (storage offset, sub-group order), not by
    the layout under test.
    """

    scaled_rates = False
    params: dict[str, nn.Parameter]
    """By name, once `watch` has been called."""

    def _compare(self, group: GroupStep, gradients: dict[str, Tensor], masters: dict[str, Tensor]) -> None:
        """Look at one group after its step."""
        raise NotImplementedError

    def _update(self, groups: Sequence[GroupStep]) -> None:
        if not hasattr(self, "params"):
            super()._update(groups)
            return
        gradients = [self._whole([shard.flat.grad_E for shard in group.shards], group) for group in groups]
        super()._update(groups)
        for group, whole in zip(groups, gradients, strict=True):
            self._compare(group, whole, self._whole([shard.flat.param_E for shard in group.shards], group))

    def _whole(self, locals_: list[Tensor], group: GroupStep) -> dict[str, Tensor]:
        owned = [entry.name for entry in self._owned]
        if group.layout.process_group is None:
            names = [n for n, (t, _) in zip(owned, group.layout.shards, strict=True) if t.grad is not None]
            return {n: t.clone() for n, t in zip(names, locals_, strict=True)}
        (local,) = locals_
        world_size = dist.get_world_size(group.layout.process_group)
        parts = [torch.empty_like(local) for _ in range(world_size)]
        dist.all_gather(parts, local.contiguous(), group=group.layout.process_group)
        if group.layout.kind == "flat":
            flat = torch.cat(parts)
            chosen = {name: self.params[name] for name in owned}
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


class Shadowed(Watched):
    """Also applies the published formula to whole tensors."""

    formula: Formula

    def watch(self, named_parameters: Sequence[tuple[str, nn.Parameter]], dtype: torch.dtype) -> None:
        self.params = dict(named_parameters)
        self.shadow = {name: whole_model_value(p).to(dtype).float() for name, p in self.params.items()}
        self.shadow_states = {name: State(w) for name, w in self.shadow.items()}
        self.worst = 0.0

    def _compare(self, group: GroupStep, gradients: dict[str, Tensor], masters: dict[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            lr = group.settings["lr"] * (rate_of(name) if self.scaled_rates else 1.0)
            settings = SETTINGS._replace(decay=decay_of(name), lr=lr)
            new = type(self).formula(self.shadow[name].view(-1), gradient, self._flat_state(name), settings)
            self.shadow[name] = new.view(self.shadow[name].shape)
            self.worst = max(self.worst, relative_error(masters[name], new))

    def _flat_state(self, name: str) -> State:
        state = self.shadow_states[name]
        state.m, state.v = state.m.view(-1), state.v.view(-1)
        return state


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
VARIANTS: dict[str, tuple[LambFlags, Formula]] = {
    "paper_v3": (PUBLISHED["paper_v3"], paper_v3),
    "apex": (PUBLISHED["apex"], apex),
    "apex_l2": (LambFlags(adam_w_mode=False, grad_averaging=False), apex_l2),
    "deepspeed": (PUBLISHED["deepspeed"], deepspeed),
    "lambc": (PUBLISHED["lambc"], lambc),
    "clamped_norm": (LambFlags(use_nvlamb=True, weight_norm_clamp=(0.5, 2.0)), clamped_norm),
}
"""The published variants of LAMB: their flags, and the formula that their shadow follows."""


def make_optimizer(
    kind: str, model: nn.Module, *, fused_qkv: bool = False, scaled_rates: bool = False
) -> torch.optim.Optimizer:
    """Return an optimizer over the model: plain, one_group_per_tensor, one of OPTIMIZERS or of VARIANTS."""
    common = {"lr": SETTINGS.lr, "betas": (SETTINGS.beta1, SETTINGS.beta2)}
    if kind != "lion":
        common["eps"] = SETTINGS.eps
    named = list(model.named_parameters())
    if kind in ("plain", "one_group_per_tensor"):
        groups = [{"params": [p], "weight_decay": decay_of(name)} for name, p in named if p.requires_grad]
        if kind == "one_group_per_tensor":
            return OneGroupPerTensor(groups, weight_decay=0.0, **common)
        two = [{"params": [], "weight_decay": decay} for decay in (0.1, 0.0)]
        for group in groups:
            two[group["weight_decay"] == 0.0]["params"] += group["params"]
        return PlainLamb(two, weight_decay=0.0, **common)
    decays = {p: decay_of(name) for name, p in named}
    flags, formula = VARIANTS.get(kind, (PUBLISHED["paper"], paper))
    optimizer_class = shadowed(Lamb, formula) if kind in VARIANTS else OPTIMIZERS[kind]
    own = {"flags": flags} if issubclass(optimizer_class, Lamb) else {}
    optimizer = optimizer_class(named, weight_decay_of=decays.__getitem__, **common, **own)
    if fused_qkv:
        optimizer.declare_parts(PARTS)
    if scaled_rates:
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


def whole_model_value(param: nn.Parameter) -> Tensor:
    """Return a copy of a parameter's value as the model sees it, gathered under ZeRO-3."""
    if not hasattr(param, "ds_tensor"):
        return param.detach().clone()
    import deepspeed

    with deepspeed.zero.GatheredParameters([param]):
        return param.detach().clone()
