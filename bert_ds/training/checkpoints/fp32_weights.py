"""The fp32 weights of a whole model out of one checkpoint, for export; no engine, no process group.

DeepSpeed's `zero_to_fp32` unpickles freely, so the merge of its flat partitions is done here, on files loaded with
`weights_only=True` after the manifest has been verified. Layouts: `stage_1_and_2.state_dict` (each group one flat
vector cut over the ranks, tensors in order, padding at the end), `stage3._rigid_state_dict` (each tensor cut over the
ranks into equal, padded parts), `unfused_optimizer.state_dict` (stage 0 in low precision: a list of masters).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.training.checkpoints.checkpoint_engine import load_safely
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, verify_checkpoint
from bert_ds.training.deepspeed_names import TESTED

Shapes = Mapping[str, Sequence[int]]


def load_fp32_state_dict(checkpoint: Path) -> dict[str, Tensor]:
    """Return the fp32 weights and the buffers of a checkpoint under the names of `module.state_dict()`.

    Shared weights are there under each of their names, as one tensor. Frozen weights have no fp32 master: they come as
    they were computed with, rounded where the run was in low precision.

    Args:
        checkpoint: `checkpoints/global_stepN`, of any ZeRO stage and world size.

    Raises:
        CheckpointError: the checkpoint is damaged, or its layout is not one of the four.
    """
    manifest = verify_checkpoint(checkpoint)
    try:
        return _merged(checkpoint, manifest)
    except (AttributeError, FileNotFoundError, IndexError, KeyError, TypeError, ValueError) as error:
        release = manifest.get("versions", {}).get("deepspeed", "unknown")
        raise CheckpointError(
            f"{checkpoint} was saved by DeepSpeed {release} and does not hold what {TESTED} writes: {error!r}"
        ) from error


def newest_fp32_weights(run_dir: Path) -> dict[str, Tensor]:
    """Return those of the newest whole checkpoint of a run that another one names as `init_from`.

    Raises:
        CheckpointError: there is none, or see `load_fp32_state_dict`.
    """
    checkpoint = find_checkpoint(run_dir)
    if checkpoint is None:
        raise CheckpointError(f"init_from {run_dir}: the run has no checkpoint yet")
    return load_fp32_state_dict(checkpoint)


def _merged(checkpoint: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    stage, world_size = manifest["zero_stage"], manifest["world_size"]
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    model = load_safely(checkpoint / name)
    buffers = {name: model["module"][name] for name in model["buffer_names"]}
    if stage == 0:
        module = {name: tensor.float() for name, tensor in model["module"].items()}
        return {**module, **_stage_0_masters(model), **buffers}
    prefix = "bf16_" if manifest["precision"] == "bfloat16" else ""
    files = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    shards = [load_safely(checkpoint / file, mmap=True)["optimizer_state_dict"] for file in files]
    if stage == 3:
        weights = dict(_merge_stage_3(model["param_shapes"], shards))
    else:
        weights = dict(_merge_stage_1_2(model["param_shapes"], shards))
        _compare(weights, model["module"], checkpoint)
    weights.update(_frozen_weights(checkpoint, model, stage=stage, world_size=world_size))
    for alias, name in model["shared_params"].items():
        weights[alias] = weights[name]
    if missing := set(model["module"]) - set(weights) - set(buffers):
        raise CheckpointError(f"{checkpoint} has no fp32 weights of {min(missing)}")
    return {**weights, **buffers}


def _frozen_weights(
    checkpoint: Path, model: Mapping[str, Any], *, stage: int, world_size: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the optimizer was not given; at stage 3 each rank's file has a part of it."""
    trained = {name for names in model["parameter_names"] for name in names}
    if stage < 3:
        left_out = trained | set(model["shared_params"]) | set(model["buffer_names"])
        yield from ((name, tensor.float()) for name, tensor in model["module"].items() if name not in left_out)
        return
    shapes = {name: shape for name, shape in (model["frozen_param_shapes"] or {}).items() if name not in trained}
    if shapes:
        files = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world_size)]
        parts = [load_safely(checkpoint / file)["frozen_param_fragments"] for file in files]
        for name, shape in shapes.items():
            whole = torch.cat([part[name].flatten() for part in parts])
            yield name, whole[: math.prod(shape)].view(tuple(shape)).float()


def _stage_0_masters(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the masters by name; without low precision the module itself holds them."""
    groups = model["optimizer"].get("fp32_groups")
    if groups is None:
        return {}
    masters = {
        name: master.detach()
        for names, group in zip(model["parameter_names"], groups, strict=True)
        for name, master in zip(names, group, strict=True)
    }
    by_place = {_place(model["module"][name]): master for name, master in masters.items()}
    return {name: by_place[_place(tensor)] for name, tensor in model["module"].items() if _place(tensor) in by_place}


def _place(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor's storage lies: equal for the names of one shared weight."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def _merge_stage_1_2(groups: Sequence[Shapes], shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    paddings = shards[0].get("param_alignment_paddings")
    for index, shapes in enumerate(groups):
        flat = torch.cat([shard["single_partition_of_fp32_groups"][index].detach() for shard in shards])
        after = paddings[index] if paddings else [0] * len(shapes)
        offset = 0
        for (name, shape), padding in zip(shapes.items(), after, strict=True):
            numel = math.prod(shape)
            yield name, flat[offset : offset + numel].view(tuple(shape)).clone()
            offset += numel + padding
        if not 0 <= len(flat) - offset < 4 * len(shards):
            raise CheckpointError(f"group {index} has {len(flat)} weights on {len(shards)} ranks, wanted {offset}")


def _compare(weights: Mapping[str, Tensor], module: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Raise unless the merged weights, rounded, are those that the model itself has saved."""
    for name, weight in weights.items():
        if not torch.equal(weight.to(module[name].dtype), module[name]):
            raise CheckpointError(
                f"{checkpoint}: the fp32 weights found for {name} are not those of the model: the shards are laid out "
                f"in another way than DeepSpeed {TESTED} lays them out"
            )


def _merge_stage_3(groups: Sequence[Shapes], shards: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    flats = [torch.cat([part.detach() for part in shard["fp32_flat_groups"]]) for shard in shards]
    offset = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        numel = math.prod(shape)
        part = math.ceil(numel / len(shards))
        whole = torch.cat([flat[offset : offset + part] for flat in flats])
        yield name, whole[:numel].view(tuple(shape)).clone()
        offset += part
    if any(len(flat) != offset for flat in flats):
        raise CheckpointError(f"a rank has {len(flats[0])} weights, wanted {offset}")
