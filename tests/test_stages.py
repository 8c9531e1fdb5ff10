"""Batch, length and masks that change during a run: which steps, which examples, how many targets, and what is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from config_cases import RECIPE as PLAIN
from corpus_fixtures import random_documents, write_shards
from forked_verbs import run_verb
from recipe_workshop import Workshop, must, plain_workshop
from test_loader import Sequence, sequences_of
from test_run_plan import plan_of, problems_of
from tiny_training import TinyModel, ds_config, join_alone, step_batches, tiny_loop, tiny_services

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.run_config import MaskingConfig, SequenceConfig
from bert_ds.configuration.run_plan import RunPlan
from bert_ds.corpus.batches.batch_stages import DataSettings, DataStage
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.batches.plan_batches import longest_batches
from bert_ds.launch.slurm_job import Speed, expected_seconds
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.checkpoint_folder import parse_manifest
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.launch_steps import recipe_loop
from bert_ds.training.loop.stage_changes import StageChanges
from bert_ds.training.loop.throughput import Throughput
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.param_groups import decay_groups

ROOT = Path(__file__).resolve().parents[1]
OLD_FINGERPRINT = "6b297ad5d5e14fe9c8362be7f30c6e56638121339b688b16233394bb817a2afd"
"""Of these shards, from the revision before there were stages."""
ORDER = [(0, 32, 4, 0.4), (3, 64, 8, 0.2), (5, 32, 12, 0.2), (8, 64, 4, 0.15)]
"""First step, longest sequence, batch and share of masks of each stage, the recipe's own values last."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), random_documents(60), random_documents(9, seed=1))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return plain_workshop(tmp_path_factory.getbasetemp())


def open_data(shards: Path, order: list[tuple[int, int, int, float]], *, seed: int = 0) -> PretrainingData:
    """Data with these stages."""
    *earlier, last = [
        DataStage(first, SequenceConfig(max_seq_length=length), MaskingConfig(mlm_probability=masked), batch)
        for first, length, batch, masked in order
    ]
    settings = DataSettings(
        last.sequences, last.masking, seed, last.train_batch_size, last.first_step, earlier=tuple(earlier)
    )
    return PretrainingData([Source(shards, "text")], shards / "tokenizer", settings=settings)


def step_of(data: PretrainingData, step: int, *, ranks: int = 1, accumulation: int = 1) -> list[Sequence]:
    split = BatchSplit(1, accumulation, ranks)
    return sequences_of(batch for rank in range(ranks) for batch in data.rank_batches(step, rank=rank, split=split))


def test_every_step_has_the_examples_and_targets_that_its_stage_says(shards: Path) -> None:
    staged = open_data(shards, ORDER)
    plain = {length: open_data(shards, [(0, length, 1, 0.15)]) for length in (32, 64)}
    taken = {32: 0, 64: 0}
    for step in range(11):
        _, length, batch, masked = [stage for stage in ORDER if stage[0] <= step][-1]
        # One example a step, in turn, is what a run of batch 1 reads: no example of a length comes twice.
        alone = [step_of(plain[length], taken[length] + place)[0] for place in range(batch)]
        taken[length] += batch
        found = step_of(staged, step)
        assert sorted(one[0] for one in found) == sorted(one[0] for one in alone)
        for ids, targets in ((one[1], one[3]) for one in found):
            assert len(ids) <= length
            assert sum(target >= 0 for target in targets) == max(1, round(masked * len(ids)))
    assert taken == {32: 48, 64: 28} and len({len(step_of(staged, step)) for step in (0, 3, 5, 8)}) == 3


def test_stages_are_the_same_on_any_ranks_from_any_step_and_through_loader_processes(shards: Path) -> None:
    data, split = open_data(shards, ORDER), BatchSplit(1, 2, 2)
    for step in (2, 3, 7, 8):
        assert step_of(data, step, ranks=2, accumulation=2) == step_of(data, step)
    for start in (0, 4):
        batches = data.step_batches(start, rank=1, split=split, num_workers=1)
        for step in range(start, start + 5):
            wanted = data.rank_batches(step, rank=1, split=split)
            assert sequences_of(next(batches)) == sequences_of(wanted)
            assert {batch.num_sequences for batch in wanted} == {[4, 4, 4, 8, 8, 12, 12, 12, 4, 4][step] // 4}


def test_the_longest_batch_is_that_of_its_stage(shards: Path) -> None:
    data = open_data(shards, ORDER)
    found = [data.longest_batch(2, stage=index) for index in range(4)]
    assert [(one.num_tokens, one.counts["masked_words"]) for one in found] == [(64, 26), (128, 26), (64, 12), (128, 20)]


def test_the_fingerprint_is_the_old_one_without_stages_and_tells_all_stages_apart(shards: Path) -> None:
    assert open_data(shards, [(0, 64, 16, 0.15)]).fingerprint == OLD_FINGERPRINT
    own = (8, 64, 16, 0.15)
    others = [[(0, 32, 16, 0.15), own], [(0, 64, 8, 0.15), own], [(0, 64, 16, 0.4), own]]
    others += [[(0, 32, 16, 0.15), (9, *own[1:])], [(0, 32, 16, 0.15), (4, 64, 8, 0.15), own]]
    others += [[(0, 64, 16, 0.3), own], [(0, 64, 16, 0.15), own]]
    assert len({OLD_FINGERPRINT, *(open_data(shards, order).fingerprint for order in others)}) == 8


STAGES = [
    {"until": 0.25, "max_seq_length": 64, "train_batch_size": 96, "mlm_probability": 0.4},
    {"until": 0.6, "train_batch_size": 24},
]


def staged_plan(folder: Path, recipe: Any = PLAIN, **options: Any) -> RunPlan:
    return plan_of(folder, {**recipe, "stages": STAGES}, **options)


def test_a_plan_adds_up_its_stages(tmp_path: Path) -> None:
    plan = staged_plan(tmp_path, deepspeed={"train_micro_batch_size_per_gpu": 6}, world_size=2)
    assert [(stage.first_step, stage.end_step, round(stage.share, 9)) for stage in plan.stages] == [
        *((0, 25, 0.25), (25, 60, 0.35), (60, 100, 0.4))
    ]
    assert [stage.split for stage in plan.stages] == [(12, 4, 2), (3, 4, 2), (6, 4, 2)]
    assert plan.examples_seen == 25 * 96 + 35 * 24 + 40 * 48
    tokens = [25 * 96 * 64, 35 * 24 * 128, 40 * 48 * 128]
    assert plan.max_tokens() == sum(tokens) and plan.max_tokens(50) == tokens[1] * 10 // 35 + tokens[2]
    at_forty = {**PLAIN, "masking": {"mlm_probability": 0.4}, "sequences": {"max_seq_length": 64}}
    short, own = plan_of(tmp_path, at_forty).flops_per_token(64), plan.flops_per_token(128)
    assert plan.max_flops == pytest.approx(short * tokens[0] + own * (tokens[1] + tokens[2]))
    assert expected_seconds(plan, Speed(100.0, ""), done_steps=60) == tokens[2] / 100
    rows = dict(plan_table(plan))
    assert rows["stage 2 of 3"].startswith(
        "steps 26 to 60: max_seq_length 128, train_batch_size 24, mlm_probability 0."
    )
    assert rows["examples"].startswith("5,160, at most 506,880 tokens") and "stage 1 of 1" not in rows
    assert not [name for name, _ in plan_table(plan_of(tmp_path)) if name.startswith("stage ")]


def test_memory_is_that_of_the_largest_stage(tmp_path: Path) -> None:
    plan = staged_plan(tmp_path)
    alone = [plan_of(tmp_path, json.loads(stage.run.model_dump_json(by_alias=True))) for stage in plan.stages]
    kept = [one.memory().activations for one in alone]
    assert plan.memory().activations == max(kept) == kept[plan.largest_stage] and len(set(kept)) == 3
    longest = longest_batches(plan, data := Mock())
    longest(plan.split.micro_batch_size // 2)
    data.longest_batch.assert_called_once_with(48, stage=0)


def test_a_bound_that_cuts_the_targets_of_a_stage_is_warned_of(tmp_path: Path) -> None:
    recipe = {**PLAIN, "masking": {"max_predictions_per_seq": 20}}
    assert not plan_of(tmp_path, recipe).warnings
    (warning,) = staged_plan(tmp_path, recipe).warnings
    assert warning.startswith("masking.max_predictions_per_seq 20 cuts the 26 predictions")


@pytest.mark.parametrize(
    ("stages", "wanted"),
    [
        ([{"until": 1.5, "train_batch_size": 8}], "stages.0.until: found 1.5, wanted < 1"),
        (
            [{"until": 0.5, "train_batch_size": 8}, {"until": 0.5, "train_batch_size": 16}],
            "stages.1.until: 0.5 does not come after stages.0.until 0.5",
        ),
        (
            [{"until": 0.001, "train_batch_size": 8}],
            "stages.0.until: 0.001 of training.total_steps 100 is step 0, which",
        ),
        (
            [{"until": 0.999, "train_batch_size": 8}],
            "stages.0.until: 0.999 of training.total_steps 100 is step 100, which",
        ),
        (
            [{"until": 0.5}],
            "stages.0: changes nothing: wanted one of max_seq_length, train_batch_size, mlm_probability",
        ),
        (
            [{"until": 0.5, "max_seq_length": 256}],
            "stages.0.max_seq_length: 256 is more than sequences.max_seq_length 128, which is the longest",
        ),
        (
            [{"until": 0.2, "train_batch_size": 8}, {"until": 0.5, "mlm_probability": 0.15}],
            "stages.1.mlm_probability: 0.15 is what masking.mlm_probability says already, in every stage: leave it out",
        ),
        (
            [{"until": 0.2, "train_batch_size": 12}],
            "stages.0.train_batch_size: 12 is not a multiple of 8, the 2 ranks x 4 accumulation of "
            "training.train_batch_size 48",
        ),
        ([{"until": (1 + n) / 9, "train_batch_size": 8 + n} for n in range(5)], "stages: found a list, wanted"),
    ],
)
def test_stages_that_cannot_be_are_refused_in_a_sentence(tmp_path: Path, stages: Any, wanted: str) -> None:
    split = {"train_micro_batch_size_per_gpu": 6}
    text = problems_of(tmp_path, {**PLAIN, "stages": stages}, split, world_size=2)
    assert wanted in text and len(text.splitlines()) == 1


def test_the_meter_counts_the_flops_of_each_stage() -> None:
    meter = Throughput(
        world_size=1, flops_per_token=4.0, peak_flops_per_rank=1000.0, clock=Mock(side_effect=[0.0, 2.0, 2.0])
    )
    meter.add(num_tokens=100, padded_tokens=100, data_wait_s=0.0)
    meter.flops_per_token = 8.0
    meter.add(num_tokens=50, padded_tokens=50, data_wait_s=0.0)
    assert meter.report(steps_left=0)["mfu"] == 0.4


def test_losses_of_a_new_stage_are_not_compared_with_those_of_the_last(tmp_path: Path) -> None:
    """Targets of the stage are a hundred times as large; without a boundary these steps are spikes."""
    join_alone()

    def skipped(starts: tuple[int, ...], folder: Path, start: int = 0) -> int:
        model = TinyModel()
        engine = make_engine(
            model, torch.optim.AdamW(decay_groups(model.named_parameters(), 0.0), lr=1e-6), ds_config(0)
        )
        batches = step_batches(start, 0, 1)
        scaled = (
            [replace(one, y_T=one.y_T * (100 if place >= 12 else 1)) for one in step]
            for place, step in enumerate(batches, start)
        )
        loop = replace(
            tiny_loop(20), spike_sigmas=6.0, spike_window=8, stage_starts=starts, max_bad_steps=99, log_every_steps=99
        )
        state = train(engine, scaled, state=TrainState(), loop=loop, services=tiny_services(folder, 0, 1))
        return state.skipped_steps

    assert skipped((12,), tmp_path / "staged") == 0
    assert skipped((), tmp_path / "plain") == 8


RUN: dict[str, Any] = {
    "model.hidden_dropout_prob": 0.0,
    "model.attention_probs_dropout_prob": 0.0,
    "training.total_steps": 8,
    "checkpoints": {"every_steps": 2, "keep_last": 9},
    "stages": [
        {"until": 0.375, "max_seq_length": 16, "train_batch_size": 8, "mlm_probability": 0.4},
        {"until": 0.75, "train_batch_size": 2},
    ],
}
BATCHES = [8, 8, 8, 2, 2, 2, 4, 4]


def figures(run_dir: Path) -> list[tuple[Any, ...]]:
    return [
        tuple(row[name] for name in ("step", "loss", "grad_norm", "num_tokens"))
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def test_a_run_says_its_stages_and_counts_their_examples(workshop: Workshop) -> None:
    run_dir = workshop.run(RUN)
    rows = read_metrics(run_dir / "metrics.jsonl")
    said = {row["step"]: row["stage"] for row in rows if "stage" in row}
    names = ("number", "max_seq_length", "train_batch_size", "mlm_probability")
    assert said == {
        step: dict(zip(names, values, strict=True))
        for step, values in ((1, (1, 16, 8, 0.4)), (4, (2, 32, 2, 0.15)), (7, (3, 32, 4, 0.15)))
    }
    seen = [
        parse_manifest(run_dir / f"checkpoints/global_step{step}")["state"]["consumed_examples"]
        for step in (2, 4, 6, 8)
    ]
    assert seen == [list(accumulate(BATCHES))[step - 1] for step in (2, 4, 6, 8)]
    (start,) = read_metrics(run_dir / "metrics.jsonl", "start")
    assert "steps 1 to 3: max_seq_length 16, train_batch_size 8" in start["plan"]["stage 1 of 3"]
    assert [length <= 16 for length in start["data"]["mean_length_by_stage"]] == [True, False, False]
    text = (run_dir / "logs/rank_0.log").read_text()
    assert "stage 2 of 3, from batch 4: max_seq_length 32, train_batch_size 2, mlm_probability 0.15" in text


@pytest.mark.parametrize("saved", [2, 6])
def test_a_run_goes_on_across_a_stage_s_end_with_the_same_bits(saved: int, workshop: Workshop) -> None:
    whole = workshop.run(RUN)
    run_dir = whole.with_name(f"resumed{saved}")
    shutil.copytree(whole, run_dir)
    (run_dir / "DONE").unlink()
    for step in range(saved + 2, 10, 2):
        shutil.rmtree(run_dir / f"checkpoints/global_step{step}")
    (run_dir / "metrics.jsonl").write_text("")
    files = ("--run", run_dir / "run_config.json", "--deepspeed_config", ROOT / "ds_configs/zero0.json")
    must(ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir, "--resume", "auto")
    assert figures(run_dir) == figures(whole)[saved:]
    ends = [load_fp32_state_dict(one / "checkpoints/global_step8") for one in (whole, run_dir)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_two_ranks_have_the_curve_of_one(workshop: Workshop) -> None:
    whole = workshop.run(RUN)
    run_dir = whole.with_name("two")
    files = ("--run", whole / "run_config.json", "--deepspeed_config", ROOT / "ds_configs/zero0.json")
    done = run_verb(ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir, world_size=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for one, other in zip(figures(whole), figures(run_dir), strict=True):
        assert one[3] == other[3] and one[1:3] == pytest.approx(other[1:3], rel=1e-4)


def test_the_loop_is_told_where_stages_begin(tmp_path: Path) -> None:
    plan = staged_plan(tmp_path)
    changes = StageChanges(plan.stages, [1.0, 2.0, 3.0], engine=Mock(), throughput=Mock(), log=Mock())
    assert recipe_loop(plan.run, changes.starts).stage_starts == (25, 60)


def test_stages_of_a_run_by_the_clock_begin_at_their_shares_of_the_steps_that_fit(
    workshop: Workshop, tmp_path: Path
) -> None:
    timed = {"training.total_steps": None, "training.max_minutes": 0.08, "checkpoints": {}}
    run_dir = workshop.run({**RUN, **timed, "stages": RUN["stages"][:1]})
    rows = read_metrics(run_dir / "metrics.jsonl")
    total = json.loads((run_dir / "run_config.json").read_text())["training"]["total_steps"]
    begun = [row["step"] for row in rows if "stage" in row]
    assert begun == [1, round(0.375 * total) + 1] and rows[-1]["step"] == total
    by_minutes = {"total_steps": None, "max_minutes": 2.0}
    plan = staged_plan(tmp_path, recipe={**PLAIN, "training": {**PLAIN["training"], **by_minutes}})
    assert dict(plan_table(plan))["stage 2 of 3"].startswith("from 25% to 60% of the steps: max_seq_length 128")
