"""The full matrix of the sharded optimizers: `pytest -m campaign tests/test_lamb_campaign.py`, 15 core minutes."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lamb_bert import train_unsharded
from lamb_checkpoints import load_universal, run_same_world_size, save_for_universal
from lamb_optimizers import CLIP, SETTINGS, whole_model_value
from lamb_reference import PUBLISHED, paper, worst_error
from lamb_runs import Case, quiet_deepspeed, run_cases
from ranks_harness import run_ranks
from test_lamb_zero import FP16, GRAD_ACCUM_FP32, SHADOWS

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.zero_limits import universal_checkpoint_blockers

pytestmark = pytest.mark.campaign

REAL = BertConfig(
    vocab_size=101,
    pad_vocab_size_to_multiple_of=1,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=50,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)

Saved = partial(Case, num_micro_batches=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_twenty_steps_are_those_of_whole_tensors_at_every_stage(world_size: int) -> None:
    unsharded = train_unsharded(lambda name: paper, 20, settings=SETTINGS, clip=CLIP)
    reports = run_ranks(run_cases, world_size, [Case(stage) for stage in (0, 1, 2, 3)], timeout_s=900)[0]
    errors = [worst_error(report.weights, unsharded.weights)[0] for report in reports]
    assert max(errors) <= 1e-6, errors


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_masters_follow_the_formula_under_every_option(world_size: int) -> None:
    micro_batches = 2 * world_size
    cases = [replace(case, num_micro_batches=micro_batches) for case in SHADOWS]
    # hpZ wants partitions that divide the world.
    cases = [case for case in cases if world_size == 4 or "zero_hpz_partition_size" not in case.zero]
    cases += [Case(s, "fp16", "shadowed", num_steps=9, num_micro_batches=micro_batches, top=FP16) for s in (1, 2, 3)]
    reports = run_ranks(run_cases, world_size, cases, timeout_s=900)
    for index, case in enumerate(cases):
        assert max(report[index].shadow_error for report in reports) <= 5e-7, case.label
        assert reports[0][index].model_error <= (5e-7 if case.precision == "fp32" else 1e-4), case.label


SAVED = [
    *[Saved(stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")],
    Saved(1, "bf16", top=GRAD_ACCUM_FP32),
    Saved(2, zero={"round_robin_gradients": True}),
    Saved(2, "bf16", zero={"offload_optimizer": {"device": "cpu"}}),
    Saved(3, "bf16", zero={"sub_group_size": 500}),
    *[Saved(3, optimizer=name) for name in ("lans", "stable_adamw", "adamw", "lion")],
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_checkpoint_resumes_bit_for_bit(world_size: int, tmp_path: Path) -> None:
    per_rank = run_ranks(run_same_world_size, world_size, SAVED, str(tmp_path), timeout_s=900)
    for found in per_rank:
        assert [all(one) for one in found] == [True] * len(SAVED), [case.label for case in SAVED]


UNIVERSAL = [Saved(1), Saved(2), Saved(3), Saved(1, "bf16", top=GRAD_ACCUM_FP32), Saved(3, optimizer="adamw")]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_universal_checkpoint_continues_at_another_world_size(before: int, after: int, tmp_path: Path) -> None:
    saved = run_ranks(save_for_universal, before, UNIVERSAL, str(tmp_path), timeout_s=600)[0]
    for index in range(len(UNIVERSAL)):
        convert(tmp_path / str(index))
    cases = [replace(case, top={**case.top, "checkpoint": {"load_universal": True}}) for case in UNIVERSAL]
    loaded = run_ranks(load_universal, after, cases, str(tmp_path), timeout_s=600)[0]
    for case, (weights, later), (found, found_later, steps) in zip(UNIVERSAL, saved, loaded, strict=True):
        assert worst(found, weights) == 0.0, case.label
        assert worst(found_later, later) <= (1e-6 if case.precision == "fp32" else 2e-2), case.label
        assert steps == {6}, case.label


def convert(folder: Path) -> None:
    """Run DeepSpeed's converter on the checkpoint `saved`."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / "saved"), "--output_folder", str(folder / "universal")]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def worst(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """Worst relative error of a tensor."""
    tensors = [{name: torch.from_numpy(array) for name, array in one.items()} for one in (found, wanted)]
    return worst_error(tensors[0], tensors[1])[0]


def train_three_elements(rank: int, world_size: int, stage: int) -> tuple[list[float], int, str]:
    """Worker: a model of three elements on more ranks than that, against the formula; rank-averaged gradient is 1."""
    import deepspeed

    quiet_deepspeed()

    class Three(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.w * x).sum()

    model = Three()
    optimizer = Lamb(model.named_parameters(), lr=0.1, weight_decay=0.0, flags=PUBLISHED["paper"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.ones(3)))
    engine.step()
    (layout,) = optimizer._layouts.values()
    blockers = universal_checkpoint_blockers(engine)
    return whole_model_value(model.w).tolist(), len(layout.shards[0][1].segments), "".join(blockers)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_that_owns_nothing_but_padding_takes_part(stage: int) -> None:
    found = run_ranks(train_three_elements, 4, stage)
    # The first update is all ones: ratio = sqrt(21) / sqrt(3).
    wanted = [w - 0.1 * math.sqrt(7) for w in (1.0, 2.0, 4.0)]
    assert all(weights == pytest.approx(wanted, rel=1e-5) for weights, _, _ in found)
    assert 0 in [num_segments for _, num_segments, _ in found]
    # DeepSpeed's universal loader fails on such a rank at stages 1 and 2.
    blocked = [num_segments == 0 and stage < 3 for _, num_segments, _ in found]
    assert ["owns no parameter" in blockers for _, _, blockers in found] == blocked


def train_real_bert(rank: int, world_size: int, stages: list[int]) -> list[dict[str, Any]]:
    """Worker: ten steps of the project's own BERT on fixed tokens; stage -1 is without DeepSpeed, on whole tensors."""
    import deepspeed

    quiet_deepspeed()
    results = []
    for stage in stages:
        model = PretrainingModel(REAL, kernels="torch", has_pair_head=True)
        decays = {
            p: 0.0 if name.endswith("bias") or "layer_norm" in name else 0.1 for name, p in model.named_parameters()
        }
        # eps far above the rounding noise that is all the gradient a key bias has.
        optimizer = Lamb(model.named_parameters(), lr=1e-2, eps=1e-3, weight_decay_of=decays.__getitem__)
        optimizer.declare_parts(weight_patterns(BertConfig())[1])
        engine = None
        if stage >= 0:
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": CLIP,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage},
            }
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
        for step in range(10):
            step_real_bert(engine, model, optimizer, step)
        results.append({name: whole_model_value(p).numpy().copy() for name, p in model.named_parameters()})
    return results


def step_real_bert(engine: Any, model: torch.nn.Module, optimizer: Lamb, step: int) -> None:
    """One step on two packed micro-batches: one per rank, or both here."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if engine is not None:
        engine.backward(real_bert_loss(engine, 2 * step + rank))
        engine.step()
        return
    optimizer.zero_grad()
    for index in range(world_size):
        (real_bert_loss(model, 2 * step + index) / world_size).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()


def real_bert_loss(model: Any, seed: int) -> torch.Tensor:
    """Mean losses of two packed sequences of 7 and 5 tokens with four predictions."""
    generator = torch.Generator().manual_seed(seed)
    losses, _ = model(
        input_ids_T=torch.randint(REAL.vocab_size, (12,), generator=generator),
        token_type_ids_T=torch.randint(2, (12,), generator=generator),
        position_ids_T=torch.tensor([*range(7), *range(5)]),
        cu_seqlens=torch.tensor([0, 7, 12], dtype=torch.int32),
        max_seqlen=7,
        targets={
            "masked_positions": torch.tensor([1, 4, 8, 10]),
            "masked_labels": torch.randint(REAL.vocab_size, (4,), generator=generator),
            "pair_labels": torch.randint(2, (2,), generator=generator),
        },
        dropout_seed=None,
    )
    return losses[0] / 4 + losses[1] / 2


def test_the_real_bert_takes_the_same_steps_at_every_stage() -> None:
    whole, *sharded = run_ranks(train_real_bert, 2, [-1, 0, 1, 2, 3], timeout_s=300)[0]
    for stage, found in enumerate(sharded):
        assert worst(found, whole) <= 2e-6, stage
