"""Weights out of a checkpoint that a changed DeepSpeed has written: refused, never exchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import ds_config, join_alone, run_tiny

from bert_ds.basics.ranks import CheckpointError, Ranks
from bert_ds.training.checkpoints.checkpoint_engine import load_safely
from bert_ds.training.checkpoints.checkpoint_folder import file_sha256, read_manifest, write_manifest
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

SHARDS = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    join_alone()
    run_tiny(tmp_path, Ranks(0, 0, 1), config=ds_config(2), steps=2)
    return tmp_path / "checkpoints/global_step2"


def rewrite(checkpoint: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change the content of a file and make the manifest fit again."""
    content = load_safely(checkpoint / name)
    change(content)
    torch.save(content, checkpoint / name)
    manifest = read_manifest(checkpoint)
    record = {"bytes": (checkpoint / name).stat().st_size, "sha256": file_sha256(checkpoint / name)}
    write_manifest(checkpoint, {**manifest, "files": {**manifest["files"], name: record}})


def roll_shard(content: Any) -> None:
    flat = content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data
    flat.copy_(flat.roll(1))


def test_a_checkpoint_with_another_byte_has_no_weights(checkpoint: Path) -> None:
    content = bytearray((checkpoint / SHARDS).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / SHARDS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{SHARDS} is damaged: its sha256"):
        load_fp32_state_dict(checkpoint)


def test_shards_in_another_order_are_not_taken_for_the_weights(checkpoint: Path) -> None:
    rewrite(checkpoint, SHARDS, roll_shard)
    with pytest.raises(CheckpointError, match=r"found for dense.weight are not those of the model"):
        load_fp32_state_dict(checkpoint)


@pytest.mark.parametrize(
    ("file", "name"),
    [(MODEL, "param_shapes"), (MODEL, "buffer_names"), (MODEL, "shared_params"), (SHARDS, "optimizer_state_dict")],
)
def test_a_name_that_is_gone_is_named_with_the_release_that_saved(checkpoint: Path, file: str, name: str) -> None:
    rewrite(checkpoint, file, lambda content: content.pop(name))
    with pytest.raises(CheckpointError, match=rf"saved by DeepSpeed 0\.\d+\.\d+ and does not hold what .*'{name}'"):
        load_fp32_state_dict(checkpoint)
