"""The micro-batch that a DeepSpeed file leaves open: by real tokens, and by the memory of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import write_json

from bert_ds.configuration.auto_batch import with_auto_micro_batch
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.run_plan import RunPlan, make_plan

RECIPES = Path(__file__).resolve().parents[1] / "ds_configs/recipes"
H100 = 80_000_000_000


def plan_of(folder: Path, recipe: str, *overrides: str, world_size: int = 8, **deepspeed: Any) -> RunPlan:
    ds = write_json(folder, "ds.json", {"zero_optimization": {"stage": 1}, **deepspeed})
    run, found = load_pair(RECIPES / f"{recipe}.json", ds, overrides=["training.precision=bf16", *overrides])
    return make_plan(run, found, world_size)


def test_without_a_gpu_it_is_the_largest_divisor_with_so_many_real_tokens(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "bert_base_phase1", "training.train_batch_size=6144")
    assert plan.split.micro_batch_size == 128  # 768 a rank, at most 128 full ones
    for mean, micro in ((128.0, 128), (127.0, 128), (85.0, 192), (64.0, 256), (42.0, 384), (1.0, 768)):
        settled = with_auto_micro_batch(plan, mean_lengths=[mean])
        assert settled.split == (micro, 768 // micro, 8)
        assert settled.ds.split_batch(settled.run, 8) == settled.split


def test_a_gpu_takes_more_tokens_as_far_as_its_memory_would_do_for_full_sequences(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "bert_base_phase1", "training.train_batch_size=16384")
    assert with_auto_micro_batch(plan, mean_lengths=[64.0], memory_bytes=10 * H100).split.micro_batch_size == 1024
    assert with_auto_micro_batch(plan, mean_lengths=[128.0], memory_bytes=10 * H100).split.micro_batch_size == 512
    half = plan_of(tmp_path, "bert_base_phase1", "training.train_batch_size=16384", train_micro_batch_size_per_gpu=256)
    for spare, micro in ((1000, 256), (-1000, 128)):
        memory = int(half.memory().device / 0.8) + spare
        assert with_auto_micro_batch(plan, mean_lengths=[1.0], memory_bytes=memory).split.micro_batch_size == micro
    (warning,) = set(with_auto_micro_batch(plan, memory_bytes=10**9).warnings) - set(plan.warnings)
    assert "a GPU has 1.0 GB" in warning


@pytest.mark.parametrize("setting", ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"])
def test_what_the_file_says_stays(setting: str, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "bert_base_phase1", "training.train_batch_size=6144", **{setting: 16})
    assert with_auto_micro_batch(plan, mean_lengths=[1.0], memory_bytes=H100) is plan


def test_every_stage_counts_by_its_own_length_and_can_be_cut(tmp_path: Path) -> None:
    stages = 'stages=[{"until": 0.5, "max_seq_length": 32, "train_batch_size": 240}]'
    sizes = ("sequences.max_seq_length=64", "training.train_batch_size=480", "training.total_steps=100")
    plan = plan_of(tmp_path, "bert_base_phase1", stages, *sizes, world_size=1)
    split = with_auto_micro_batch(plan, mean_lengths=[30.0, 50.0]).split
    assert split == (240, 2, 1)  # 240 x 50 tokens; 480 would be 24,000
    assert with_auto_micro_batch(plan, mean_lengths=[150.0, 50.0]).split == (160, 3, 1)  # 120 x 150 would be 18,000
    # Without a length of the text every sequence is full.
    assert with_auto_micro_batch(plan).split == (240, 2, 1)
