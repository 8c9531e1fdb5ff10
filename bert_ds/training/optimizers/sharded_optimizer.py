"""Base of optimizers whose update needs numbers of a whole tensor while they hold only pieces of it.

Such an optimizer is handed to `deepspeed.initialize(optimizer=...)` like any torch optimizer. On the first `step` that
shows it a tensor it does not know, it finds out which of the user's parameters lie in it (`parameter_layout`). A
subclass implements `_update`: elementwise passes over the segments, and `sum_over_ranks` of one small fp64 buffer
between them.

State per tensor is exactly `step` (int) and the subclass's fp32 moments: DeepSpeed's checkpoint tools know no other
names. Weight decay belongs to each parameter and is kept out of `param_groups`, because DeepSpeed's ZeRO-3 universal
loader copies the first group's settings over all groups.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bert_ds.configuration.recipe.precision import Precision
from bert_ds.training.optimizers.parameter_layout import GroupToFind, Layout, collective_device, find_layouts
from bert_ds.training.optimizers.reduction_rows import EqualParts, OwnedParameter, with_parts, with_rates
from bert_kernels.flat_shard import FlatShard, on_device

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class ShardStep(NamedTuple):
    """One tensor of this step: its flat buffers and how many steps it has taken, this one included."""

    flat: FlatShard
    step: int


class GroupStep(NamedTuple):
    """One parameter group of this step."""

    settings: dict[str, Any]
    """The parameter group: lr, betas, eps."""
    layout: Layout
    shards: tuple[ShardStep, ...]
    """Tensors that have a gradient."""

    def zeros(self, num_columns: int) -> Tensor:
        """Return a fp64 reduction buffer: one row per tensor or part."""
        device = self.layout.shards[0][0].device
        return torch.zeros(len(self.layout.names), num_columns, dtype=torch.float64, device=device)

    def lr_of(self, row: int) -> float:
        """Return the learning rate of a row: the group's, scaled."""
        return float(self.settings["lr"]) * self.layout.rows.lr_scales[row]

    def scale_by_rate(self, values_R: Tensor) -> Tensor:
        """Return per-row numbers multiplied by the rows' factors of the learning rate."""
        scales = self.layout.rows.lr_scales
        if all(scale == 1.0 for scale in scales):
            return values_R
        return values_R * on_device(scales, values_R.dtype, values_R.device)


class RecipeContext(NamedTuple):
    """What making an optimizer of a recipe needs besides the parameters."""

    settings: dict[str, Any]
    """The optimizer section without type and weight decay: keywords of most of ours."""
    weight_decay_of: Callable[[nn.Parameter], float]
    matrices: Sequence[str]
    """`fnmatch` patterns of the weights that may be treated as a matrix."""
    kernels: str
    """"auto", "triton" or "torch"."""
    precision: Precision
    """What the run computes in."""


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer over one group of named parameters, exact per tensor under DeepSpeed ZeRO 0, 1, 2 and 3."""

    moment_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    replicas: ProcessGroup | None = None
    """Ranks that step the same whole tensors with the same gradients and may share the work: ZeRO stage 0."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        settings: dict[str, Any],
        *,
        weight_decay: float,
        weight_decay_of: Callable[[nn.Parameter], float] | None,
    ) -> None:
        """Take `model.named_parameters()`; the frozen ones among them are left out for good, as DeepSpeed does.

        Args:
            named_parameters: the parameters, all in one group.
            settings: `lr` and whatever the subclass reads per group.
            weight_decay: decay of every parameter, unless weight_decay_of is given.
            weight_decay_of: decay of each trainable parameter.
        """
        entries = list(named_parameters)
        if not entries or not all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries):
            raise ValueError("give (name, parameter) pairs, as model.named_parameters() does")
        self._frozen = [name for name, param in entries if not param.requires_grad]
        entries = [(name, param) for name, param in entries if param.requires_grad]
        if not entries:
            raise ValueError("no parameter is trainable")
        self._owned = [
            OwnedParameter(name, param, _decay(name, param, weight_decay, weight_decay_of)) for name, param in entries
        ]
        self._layouts: dict[int, Layout] = {}
        super().__init__([param for _, param in entries], settings)

    @classmethod
    def of_recipe(cls, named_parameters: NamedParameters, context: RecipeContext) -> ShardedOptimizer:
        """Return the optimizer that a recipe describes.

        Raises:
            ConfigError: it has nothing to do with these parameters.
        """
        make: Callable[..., ShardedOptimizer] = cls
        return make(named_parameters, weight_decay_of=context.weight_decay_of, **context.settings)

    def declare_parts(self, equal_parts: EqualParts) -> None:
        """Treat each of the equal parts of some tensors as a tensor of its own; call it before the first step.

        Args:
            equal_parts: name pattern -> names of the parts; LAMB takes one trust ratio for each of them.

        Raises:
            ValueError: a pattern matches no parameter, or one that cannot be cut into equal parts.
        """
        assert not self._layouts, "the parts of a tensor cannot change after the first step"
        self._owned = with_parts(self._owned, equal_parts, frozen=self._frozen)

    def declare_rates(self, lr_scale_of: Callable[[str], float]) -> None:
        """Multiply the learning rate of every tensor by a factor of its own; call it before the first step.

        Like the decay, the factor is kept out of `param_groups`: the schedule goes on setting one rate.

        Raises:
            ValueError: a factor is negative or not finite.
        """
        assert not self._layouts, "the rate of a tensor cannot change after the first step"
        self._owned = with_rates(self._owned, lr_scale_of)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Accept the first group only: decay is per parameter, so a second group is never needed."""
        if self.param_groups:
            raise ValueError("one parameter group; weight decay is given per parameter by weight_decay_of")
        _bare(torch.optim.Optimizer.add_param_group)(self, param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return what torch returns."""
        state: dict[str, Any] = _bare(torch.optim.Optimizer.state_dict)(self)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and look the layout up again at the next step."""
        self._layouts.clear()
        _bare(torch.optim.Optimizer.load_state_dict)(self, state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does."""
        _bare(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every tensor that has a gradient.

        Raises:
            LayoutError: on every rank, when it is unknown where the parameters lie; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [group for group in self.param_groups if group["params"]]
        layouts = self._find(groups)
        if self._is_initialisation(layouts):
            return loss
        self._update([self._group_step(group, layout) for group, layout in zip(groups, layouts, strict=True)])
        return loss

    def _update(self, groups: Sequence[GroupStep]) -> None:
        raise NotImplementedError

    def _find(self, groups: Sequence[dict[str, Any]]) -> list[Layout]:
        """Return the layout of each group's tensors; a layout keeps its tensors alive, so an id names one tensor."""
        unknown = [group for group in groups if id(group["params"][0]) not in self._layouts]
        if unknown:
            found = find_layouts([GroupToFind(group["params"], self._owned) for group in unknown])
            self._layouts.update({id(group["params"][0]): layout for group, layout in zip(unknown, found, strict=True)})
        return [self._layouts[id(group["params"][0])] for group in groups]

    def _is_initialisation(self, layouts: Sequence[Layout]) -> bool:
        """Whether this is the step with zero gradients by which DeepSpeed's wrapper without ZeRO allocates state."""
        if any(layout.kind != "master" for layout in layouts):
            return False
        tensors = [tensor for layout in layouts for tensor, _ in layout.shards]
        # Host sync, on the first step only.
        return not any(tensor in self.state for tensor in tensors) and not any(
            tensor.grad is not None and tensor.grad.any() for tensor in tensors
        )

    def _group_step(self, group: dict[str, Any], layout: Layout) -> GroupStep:
        shards = []
        for tensor, table in layout.shards:
            if tensor.grad is None:
                continue
            if tensor.grad.is_sparse:
                raise ValueError("sparse gradients are not supported; build the embedding with sparse=False")
            state = self.state[tensor]
            for name in self.moment_names:
                if name not in state:
                    state[name] = torch.zeros_like(tensor, memory_format=torch.contiguous_format)
            # A universal checkpoint brings the step back as a tensor.
            state["step"] = int(state.get("step", 0)) + 1
            buffers = (tensor, tensor.grad, *(state[name] for name in self.moment_names))
            shards.append(ShardStep(_flat_shard(buffers, table), state["step"]))
        return GroupStep(group, layout, tuple(shards))


def sum_over_ranks(groups: Sequence[GroupStep], sums: Sequence[Tensor]) -> None:
    """Sum the reduction buffers in place over the ranks that share the tensors: one all-reduce per set of ranks."""
    by_ranks: dict[ProcessGroup, list[Tensor]] = {}
    for group, buffer in zip(groups, sums, strict=True):
        ranks = group.layout.process_group
        if ranks is not None and dist.get_world_size(ranks) > 1:
            by_ranks.setdefault(ranks, []).append(buffer)
    for ranks, buffers in by_ranks.items():
        together = torch.cat([buffer.view(-1) for buffer in buffers]).to(collective_device(ranks))
        dist.all_reduce(together, group=ranks)
        for buffer, total in zip(buffers, together.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(total.view_as(buffer))


def _bare(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of torch's optimizer without what keeps compiled code out of it.

    That imports torch._dynamo at the first call, two seconds of every start. No step of ours is compiled.
    """
    return inspect.unwrap(method)


def _decay(
    name: str, param: nn.Parameter, weight_decay: float, weight_decay_of: Callable[[nn.Parameter], float] | None
) -> float:
    decay = float(weight_decay_of(param)) if weight_decay_of is not None else float(weight_decay)
    if not decay >= 0.0:
        raise ValueError(f"weight decay of {name} is {decay}, must be at least 0")
    return decay


def _flat_shard(buffers: Sequence[Tensor], table: Any) -> FlatShard:
    """View weights, gradient and moments as flat vectors; an optimizer with one moment passes it twice."""
    flat = [buffer.reshape(-1) for buffer in buffers]
    return FlatShard(flat[0], flat[1].to(flat[0].dtype), flat[2], flat[-1], table)
