"""Find where each of the user's parameters lies in the tensors that DeepSpeed hands to an optimizer.

DeepSpeed replaces `param_groups[i]["params"]` by its own fp32 tensors and tells the optimizer nothing about them. What
is known is read off the user's own parameters:

    whole    the optimizer still sees the parameters themselves (no ZeRO, fp32)
    master   one fp32 clone per trainable parameter, in order (no ZeRO, bf16: FP16_UnfusedOptimizer)
    flat     ZeRO-1, ZeRO-2, BF16_Optimizer: all parameters of a group are views of one low-precision buffer, of which
             rank r owns the r-th equal part; a parameter's offset is its storage offset, whatever the order or padding
    zero3    every parameter is cut over the ranks; a sub-group's shard holds this rank's parts one after the other

These names are private to DeepSpeed. So nothing is assumed: a missing name, a sum that does not come out, or a shard
whose values are not those of the parameters raises LayoutError. `find_layouts` raises on every rank or on none, before
any element is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bert_ds.training.agreement import max_over_ranks
from bert_ds.training.deepspeed_names import deepspeed_version, missing_name
from bert_ds.training.optimizers.reduction_rows import (
    OwnedParameter,
    RowTable,
    cut_segments,
    full_numel,
    number_rows,
)
from bert_kernels.flat_shard import Segment, SegmentTable


class LayoutError(RuntimeError):
    """The place of a parameter in an optimizer shard is unknown, contradictory or not supported."""


class Layout(NamedTuple):
    """Where the tensors of one `step` call and parameter group lie."""

    kind: str
    """whole, master, flat or zero3."""
    shards: tuple[tuple[Tensor, SegmentTable], ...]
    """Every tensor of the group with its segments; all tables number the rows alike."""
    rows: RowTable
    process_group: ProcessGroup | None
    """Ranks that hold parts of these tensors; None when this rank holds them whole."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each row, the same on all ranks."""
        return self.rows.names


@dataclass(frozen=True)
class GroupToFind:
    """One parameter group: what the optimizer sees now, and what the user gave."""

    tensors: Sequence[Tensor]
    owned: Sequence[OwnedParameter]


def find_layouts(groups: Sequence[GroupToFind]) -> list[Layout]:
    """Return the layout of every group, or raise LayoutError on every rank.

    Must be called by all ranks, unless every tensor is a parameter that the user gave (no ZeRO, fp32).
    """
    layouts: list[Layout] = []
    error: Exception | None = None
    try:
        layouts = [_find_layout(group) for group in groups]
    except Exception as caught:  # whatever is wrong here, the other ranks must hear of it
        error = caught
    if error is None and all(layout.kind == "whole" for layout in layouts):
        return layouts
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and max_over_ranks(float(error is not None)) and error is None:
        raise LayoutError("another rank could not find its optimizer layout; its message says why")
    if isinstance(error, LayoutError):
        raise error
    if error is not None:
        raise LayoutError(
            f"the layout of DeepSpeed {deepspeed_version()} could not be read: {type(error).__name__}: {error}"
        ) from error
    return layouts


def collective_device(process_group: ProcessGroup) -> torch.device:
    """Return the device a tensor must be on to be reduced over the group."""
    if "nccl" in dist.get_backend(process_group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _find_layout(group: GroupToFind) -> Layout:
    owned_ids = {id(entry.param) for entry in group.owned}
    if all(id(tensor) in owned_ids for tensor in group.tensors):
        return _whole(group)
    for entry in group.owned:
        if hasattr(entry.param, "ds_tensor"):
            _need(entry.param, "ds_numel", entry.name)
    trainable = [entry for entry in group.owned if full_numel(entry.param) > 0]
    _refuse_model_parallel(trainable)
    if any(hasattr(entry.param, "_z3_optimizer") or hasattr(entry.param, "ds_tensor") for entry in trainable):
        return _zero3(group, trainable)
    if any(hasattr(entry.param, "_dp_group") for entry in trainable):
        return _flat(group, trainable)
    return _masters(group, trainable)


def _whole(group: GroupToFind) -> Layout:
    by_id = {id(entry.param): entry for entry in group.owned}
    entries = [by_id[id(tensor)] for tensor in group.tensors]
    for tensor, entry in zip(group.tensors, entries, strict=True):
        if hasattr(tensor, "ds_tensor") or hasattr(tensor, "placements"):
            raise LayoutError(f"{entry.name} is partitioned, but the optimizer was given it without its wrapper")
        if not tensor.is_contiguous():
            raise LayoutError(f"{entry.name} is not contiguous in memory (strides {tensor.stride()})")
        _require_fp32(tensor, entry.name)
    return _unsharded("whole", group.tensors, entries)


def _unsharded(kind: str, tensors: Sequence[Tensor], entries: Sequence[OwnedParameter]) -> Layout:
    """Return the layout where every tensor of the optimizer is one whole parameter."""
    rows, shards = number_rows(entries), []
    for tensor, entry, first_row in zip(tensors, entries, rows.first, strict=True):
        segments = cut_segments(entry, first_row, begin=0, end=tensor.numel(), at=0)
        shards.append((tensor, SegmentTable(tuple(segments), tensor.numel(), len(rows.names))))
    return Layout(kind, tuple(shards), rows, None)


def _masters(group: GroupToFind, trainable: Sequence[OwnedParameter]) -> Layout:
    wanted = [tuple(entry.param.shape) for entry in trainable]
    found = [tuple(tensor.shape) for tensor in group.tensors]
    if wanted != found:
        raise LayoutError(
            f"unknown optimizer wrapper of DeepSpeed {deepspeed_version()}: the optimizer was given {len(found)} "
            f"tensors of shapes {found[:3]}..., the model has {len(wanted)} trainable parameters of shapes "
            f"{wanted[:3]}..., and they carry neither _dp_group (ZeRO-1, ZeRO-2, BF16_Optimizer) nor _z3_optimizer "
            "(ZeRO-3)"
        )
    for tensor, entry in zip(group.tensors, trainable, strict=True):
        if entry.param.dtype == torch.float16:
            raise LayoutError(
                "fp16 without ZeRO: DeepSpeed divides the gradients by a loss scale that it never multiplied the loss "
                "with; use bf16, or fp16 with ZeRO stage 1, 2 or 3"
            )
        _require_fp32(tensor, entry.name)
        _verify_values(tensor.reshape(-1), entry.param.detach().reshape(-1), entry.name)
    return _unsharded("master", group.tensors, trainable)


def _flat(group: GroupToFind, trainable: Sequence[OwnedParameter]) -> Layout:
    flat = _only_shard(group)
    process_group = _need(trainable[0].param, "_dp_group", trainable[0].name)
    storage = trainable[0].param.untyped_storage().data_ptr()
    for entry in trainable:
        if _need(entry.param, "_dp_group", entry.name) is not process_group:
            raise LayoutError(f"{entry.name} is sharded over another process group than {trainable[0].name}")
        if entry.param.untyped_storage().data_ptr() != storage or not entry.param.is_contiguous():
            raise LayoutError(f"{entry.name} is not a view of the flat buffer that holds {trainable[0].name}")
    first = min(_offset(entry) for entry in trainable)
    _check_flat_extent(trainable, first, flat.numel() * dist.get_world_size(process_group))

    shard_begin = dist.get_rank(process_group) * flat.numel()
    rows = number_rows(trainable)
    segments: list[Segment] = []
    for entry, first_row in zip(trainable, rows.first, strict=True):
        offset = _offset(entry) - first
        begin, end = max(offset, shard_begin), min(offset + entry.param.numel(), shard_begin + flat.numel())
        if begin < end:
            at, begin, end = begin - shard_begin, begin - offset, end - offset
            segments += cut_segments(entry, first_row, begin=begin, end=end, at=at)
            here = flat.detach()[at : at + end - begin]
            _verify_values(here, entry.param.detach().view(-1)[begin:end], entry.name)
    table = SegmentTable(tuple(sorted(segments)), flat.numel(), len(rows.names))
    return Layout("flat", ((flat, table),), rows, process_group)


def _check_flat_extent(trainable: Sequence[OwnedParameter], first: int, total: int) -> None:
    end = 0
    for entry in sorted(trainable, key=_offset):
        begin = _offset(entry) - first
        if begin < end:
            raise LayoutError(f"{entry.name} overlaps another parameter in the flat buffer")
        end = begin + entry.param.numel()
    param = trainable[0].param
    available = param.untyped_storage().nbytes() // param.element_size() - first
    if not end <= total <= available:
        raise LayoutError(
            f"the parameters take {end} elements, the shards of all ranks have {total}, the flat buffer {available}"
        )


def _zero3(group: GroupToFind, trainable: Sequence[OwnedParameter]) -> Layout:
    flat = _only_shard(group)
    zero3 = _need(trainable[0].param, "_z3_optimizer", trainable[0].name)
    _refuse_unsupported_zero3(zero3)
    flats = _need(zero3, "fp32_partitioned_groups_flat", "the ZeRO-3 optimizer")
    found = [index for index, candidate in enumerate(flats) if candidate is flat]
    if len(found) != 1:
        raise LayoutError(f"the optimizer's tensor is {len(found)} times among ZeRO-3's {len(flats)} shards")
    members = _need(zero3, "fp16_groups", "the ZeRO-3 optimizer")[found[0]]
    by_id = {id(entry.param): entry for entry in group.owned}
    if not all(id(param) in by_id for param in members):
        raise LayoutError("a ZeRO-3 sub-group holds a parameter that was not given to this optimizer")
    entries = [by_id[id(param)] for param in members]
    rows, process_group = number_rows(entries), _need(members[0], "ds_process_group", "a ZeRO-3 parameter")

    segments: list[Segment] = []
    offset, rank, world_size = 0, dist.get_rank(process_group), dist.get_world_size(process_group)
    for param, entry, first_row in zip(members, entries, rows.first, strict=True):
        if _need(param, "ds_process_group", entry.name) is not process_group:
            raise LayoutError(f"{entry.name} is partitioned over another process group than its sub-group")
        part, full, lp_part = _zero3_part(param, entry.name)
        if not full <= part * world_size < full + world_size:
            raise LayoutError(f"{entry.name}: {world_size} parts of {part} do not make {full} elements")
        begin, end = min(rank * part, full), min((rank + 1) * part, full)
        _verify_values(flat.detach()[offset : offset + end - begin], lp_part[: end - begin], entry.name)
        segments += cut_segments(entry, first_row, begin=begin, end=end, at=offset)
        offset += part
    if offset != flat.numel():
        raise LayoutError(f"the parts of a ZeRO-3 sub-group have {offset} elements, its shard has {flat.numel()}")
    table = SegmentTable(tuple(segments), flat.numel(), len(rows.names))
    return Layout("zero3", ((flat, table),), rows, process_group)


def _zero3_part(param: Tensor, name: str) -> tuple[int, int, Tensor]:
    """Return the elements of a rank's part (padding included), those of the whole tensor, and this rank's part."""
    ds_tensor = _need(param, "ds_tensor", name)
    part = int(_need(ds_tensor, "ds_numel", f"ds_tensor of {name}"))
    if ds_tensor.numel() != part:
        raise LayoutError(f"{name}: its part has {ds_tensor.numel()} elements in memory, {part} were expected (NVMe?)")
    return part, int(_need(param, "ds_numel", name)), ds_tensor.detach().view(-1)


def _refuse_unsupported_zero3(zero3: Any) -> None:
    if getattr(zero3, "swap_optimizer", False):
        raise LayoutError("offload_optimizer to NVMe is not supported with this optimizer; use device cpu")
    if getattr(zero3, "zenflow", False) or "SuperOffload" in type(zero3).__name__:
        raise LayoutError("ZenFlow and SuperOffload replace the optimizer by their own Adam; switch them off")


def _refuse_model_parallel(trainable: Sequence[OwnedParameter]) -> None:
    for entry in trainable:
        if getattr(entry.param, "tensor_model_parallel", False) or getattr(entry.param, "model_parallel", False):
            raise LayoutError(
                f"{entry.name} is a tensor-parallel shard: the norm of the whole tensor is not known here"
            )


def _only_shard(group: GroupToFind) -> Tensor:
    if len(group.tensors) != 1 or group.tensors[0].dim() != 1:
        shapes = [tuple(tensor.shape) for tensor in group.tensors]
        raise LayoutError(f"ZeRO gives an optimizer one flat tensor per group; found shapes {shapes[:5]}")
    _require_fp32(group.tensors[0], "the optimizer shard")
    return group.tensors[0]


def _require_fp32(tensor: Tensor, name: str) -> None:
    if tensor.dtype != torch.float32:
        raise LayoutError(
            f"{name} is {tensor.dtype}: the optimizer needs fp32 master weights "
            "(switch bf16_master_weights_and_grads and fp16_master_weights_and_grads off)"
        )


def _verify_values(shard_part: Tensor, param_part: Tensor, name: str) -> None:
    """Raise LayoutError unless a stretch of the shard, rounded to the parameter's dtype, is the parameter's values."""
    here = shard_part.detach().to(param_part.dtype)
    there = param_part.to(here.device)
    if not torch.equal(here, there) and not torch.equal(here.nan_to_num(), there.nan_to_num()):
        raise LayoutError(
            f"the optimizer shard does not hold the values of {name}: either this DeepSpeed lays its shards out in "
            "another way, or weights were changed after deepspeed.initialize without refreshing the fp32 copies"
        )


def _offset(entry: OwnedParameter) -> int:
    return int(entry.param.storage_offset())


def _need(holder: Any, attribute: str, what: str) -> Any:
    """Return holder.attribute, or raise LayoutError naming what is missing."""
    if not hasattr(holder, attribute):
        raise LayoutError(missing_name(what, attribute))
    return getattr(holder, attribute)
