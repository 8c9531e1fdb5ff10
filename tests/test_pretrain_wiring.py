"""What pretrain.py hands to its parts, seen from outside: by transformers, by hand, by the batches of the corpus."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forked_verbs import run_verb
from recipe_workshop import RECIPE, ROOT, Workshop, must
from settings_walk import changed
from test_recipe_settings import ROUGH
from torch.nn.functional import cross_entropy

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import RunConfig, load_run_config
from bert_ds.configuration.run_checks import drawn_weights
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.shards.shard_folder import read_manifest
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import read_metrics, read_rows
from bert_ds.training.checkpoints.checkpoint_folder import parse_manifest, write_manifest
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

DRY = {"model.hidden_dropout_prob": 0.0, "model.attention_probs_dropout_prob": 0.0}
MIXED = {
    "corpus.sources": [{"path": "shards", "weight": 2.0}, {"path": "more"}],
    "sequences": {"max_seq_length": 64, "short_seq_prob": 0.5},
}
"""Of two sources, with examples of all lengths."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("wiring"))


def recipe_of(run_dir: Path) -> RunConfig:
    return load_run_config(run_dir / "run_config.json")


def data_of(run: RunConfig) -> PretrainingData:
    """The corpus of a run, opened as the loader's own tests do."""
    assert run.corpus.type == "shards"
    sources = [Source(Path(source.path), source.path, source.weight) for source in run.corpus.sources]
    settings = DataSettings(run.sequences, run.masking, run.seed, run.training.train_batch_size)
    return PretrainingData(sources, Path(run.corpus.tokenizer), settings=settings)


def batch_of(data: PretrainingData, number: int) -> MicroBatch:
    """The whole batch at a place of the order, from 1."""
    (batch,) = data.rank_batches(number - 1, rank=0, split=BatchSplit(1, 1, 1))
    return batch


def sums_of(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Summed losses of masked words and of pairs, sequence by sequence, and how many masked words are right."""
    words, pairs, right = torch.zeros(()), torch.zeros(()), 0
    bounds, places = batch.cu_seqlens.tolist(), batch.targets["masked_positions"]
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        found = model(
            input_ids=batch.input_ids_T[start:stop][None], token_type_ids=batch.token_type_ids_T[start:stop][None]
        )
        mine = (places >= start) & (places < stop)
        scores, labels = found.prediction_logits[0, places[mine] - start], batch.targets["masked_labels"][mine]
        words = words + cross_entropy(scores, labels, reduction="sum")
        pairs = pairs + cross_entropy(found.seq_relationship_logits, batch.targets["pair_labels"][index : index + 1])
        right += int((scores.argmax(1) == labels).sum())
    return torch.stack((words, pairs, torch.tensor(float(right))))


def test_a_run_is_what_transformers_and_torch_make_of_the_same_batches(workshop: Workshop) -> None:
    changes = {
        **DRY,
        "init_from": "teacher",
        "training.total_steps": 6,
        "training.gradient_clipping": 1.5,
        "schedule": {"type": "linear", "warmup_steps": 2},
        "optimizer": {"type": "adamw", "lr": 4e-3, "betas": [0.7, 0.9], "eps": 1e-5, "weight_decay": 0.4},
    }
    run_dir = workshop.run(changes)
    rows, data = read_metrics(run_dir / "metrics.jsonl"), data_of(recipe_of(run_dir))
    model = transformers.BertForPreTraining.from_pretrained(workshop.folder / "teacher").eval()
    flat = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    groups = [
        {"params": [p for p in model.parameters() if not any(p is one for one in flat)], "weight_decay": 0.4},
        {"params": flat, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.7, 0.9), eps=1e-5)
    for number, height in enumerate((0.5, 1.0, 0.75, 0.5, 0.25, 0.0), start=1):
        batch = batch_of(data, number)
        sums = sums_of(model, batch)
        words, pairs = sums[0] / batch.counts["masked_words"], sums[1] / batch.counts["sentence_pair"]
        optimizer.zero_grad()
        (words + pairs).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        row = rows[number - 1]
        assert (row["step"], row["lr"]) == (number, pytest.approx(4e-3 * height))
        found = [row[name] for name in ("loss_mlm", "loss_pair", "loss", "grad_norm")]
        assert found == pytest.approx([float(x.detach()) for x in (words, pairs, words + pairs, norm)], rel=2e-4)
        assert row["mlm_accuracy"] == float(sums[2].detach()) / batch.counts["masked_words"]
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * height
        optimizer.step()
    (last,) = read_metrics(run_dir / "metrics.jsonl", "evaluation")
    held_out = list(data.evaluation_batches(8, batch_size=4, rank=0, world_size=1))
    with torch.no_grad():
        words, pairs, _ = sum(sums_of(model, batch) for batch in held_out).tolist()
    counts = [sum(batch.counts[name] for batch in held_out) for name in ("masked_words", "sentence_pair")]
    wanted = [words / counts[0], pairs / counts[1], words / counts[0] + pairs / counts[1]]
    assert [last[name] for name in ("loss_mlm", "loss_pair", "loss")] == pytest.approx(wanted, rel=2e-4)


def test_an_open_micro_batch_is_settled_by_the_real_lengths_of_the_text(workshop: Workshop) -> None:
    short = {
        "training.total_steps": 1,
        "schedule.warmup_steps": 0,
        "sequences": {"max_seq_length": 64, "short_seq_prob": 1.0},
    }
    run_dir = workshop.run({**short, "training.train_batch_size": 384})
    (row,) = read_metrics(run_dir / "metrics.jsonl")
    assert 192 * 64 < row["num_tokens"] < 16_384 < 384 * 64
    assert json.loads((run_dir / "ds_config.json").read_text())["train_micro_batch_size_per_gpu"] == 384


@pytest.mark.parametrize("sentence_pair", ["nsp", "none"])
def test_the_first_step_of_lamb_moves_every_part_by_the_rate_times_its_norm(
    sentence_pair: str, workshop: Workshop
) -> None:
    changes = {
        "optimizer": {"type": "lamb", "lr": 0.03, "weight_decay": 0.2},
        "schedule": {"type": "constant", "warmup_steps": 0},
        "training.total_steps": 1,
        "sequences.sentence_pair": sentence_pair,
        "seed": 7,
    }
    run_dir = workshop.run(changes)
    run = recipe_of(run_dir)
    model = PretrainingModel(run.model, kernels="torch", has_pair_head=sentence_pair != "none", init_seed=7)
    end = load_fp32_state_dict(run_dir / "checkpoints/global_step1")
    assert set(end) == set(model.state_dict())
    for name, start in model.state_dict().items():
        if start.ndim < 2:
            continue
        num_parts = 3 if "qkv" in name else 1
        for before, after in zip(start.chunk(num_parts), end[name].chunk(num_parts), strict=True):
            assert float((after - before).norm() / before.norm()) == pytest.approx(0.03, rel=1e-3), name


def numbered(run_dir: Path) -> list[tuple[dict[str, Any], int]]:
    """Every training row with the number of the batch that its step has to be trained on."""
    passed_over, found = 0, []
    for row in read_rows(run_dir / "metrics.jsonl"):
        passed_over = row.get("passed_over", passed_over) if row["kind"] == "start" else passed_over
        if row["kind"] == "train":
            found.append((row, row["step"] + passed_over))
    return found


def test_after_going_back_steps_train_on_batches_that_come_after_those_seen(workshop: Workshop) -> None:
    recovery = {**ROUGH["recovery"], "spike_sigmas": 0.01, "max_rollbacks": 99}
    wild = {**ROUGH, **MIXED, "recovery": recovery, "optimizer.lr": 0.5, "training.num_workers": 1}
    run_dir = workshop.run(wild)
    data, rows = data_of(recipe_of(run_dir)), numbered(run_dir)
    assert max(number - row["step"] for row, number in rows) > 0, "the run has not gone back"
    for row, number in rows:
        assert row["num_tokens"] == batch_of(data, number).num_tokens


def test_a_resumed_run_passes_over_the_batches_that_its_checkpoint_says(workshop: Workshop) -> None:
    whole = workshop.run({**MIXED, "checkpoints.every_steps": 2})
    run_dir = whole.with_name("passed_over")
    shutil.copytree(whole, run_dir)
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints/global_step4")
    checkpoint = run_dir / "checkpoints/global_step2"
    manifest = parse_manifest(checkpoint)
    write_manifest(checkpoint, {**manifest, "state": {**manifest["state"], "passed_over": 3}})
    files = ("--run", run_dir / "run_config.json", "--deepspeed_config", ROOT / "ds_configs/zero0.json")
    script = (ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir)
    (run_dir / "metrics.jsonl").write_text("")
    must(*script, "--resume", "auto")
    data, rows = data_of(recipe_of(run_dir)), read_metrics(run_dir / "metrics.jsonl")
    assert len({row["num_tokens"] for row, _ in numbered(whole)}) > 1
    assert [(row["step"], row["num_tokens"]) for row in rows] == [
        (step, batch_of(data, step + 3).num_tokens) for step in (3, 4)
    ]
    counts = [data.source_counts(step + 2, step + 3) for step in (3, 4)]
    assert [row["sources"] for row in rows] == [
        {name: one._asdict() for name, one in count.items()} for count in counts
    ]
    replayed = must(*script, "--replay_step", 3)
    assert "step 3, batch 6, on the weights of step 2" in replayed
    part = json.loads(replayed.split("rank 0 micro-step 0: ")[1].splitlines()[0])
    assert part["example_ids"] == batch_of(data, 6).example_ids.tolist()
    assert part["loss_shares"] == pytest.approx({name: rows[0][f"loss_{name}"] for name in ("mlm", "pair")}, rel=1e-6)


def test_a_row_of_a_mixture_counts_the_tokens_of_its_own_step(workshop: Workshop) -> None:
    run_dir = workshop.run({**MIXED, "checkpoints.every_steps": 2})
    data, rows = data_of(recipe_of(run_dir)), read_metrics(run_dir / "metrics.jsonl")
    assert parse_manifest(run_dir / "checkpoints/global_step2")["facts"] == {
        **recipe_of(run_dir).model.form(),
        "data": data.fingerprint,
    }
    assert len({row["num_tokens"] for row in rows}) > 1
    for row in rows:
        assert sum(source["tokens"] for source in row["sources"].values()) == row["num_tokens"]
        assert sum(source["examples"] for source in row["sources"].values()) == RECIPE["training"]["train_batch_size"]


def test_every_source_is_judged_by_itself_and_drawn_from_at_its_temperature(workshop: Workshop) -> None:
    changes = {**MIXED, "evaluation": {"num_examples": 10**6, "batch_size": 4}, "corpus.temperature": 4.0}
    changes["sequences"] = {"max_seq_length": 64, "short_seq_prob": 0.0, "sentence_pair": "none"}  # no drawn pairs
    run_dir = workshop.run(changes)
    run = recipe_of(run_dir)
    (row,) = read_metrics(run_dir / "metrics.jsonl", "evaluation")
    targets = {name: row[f"mlm_masked_targets of {name}"] for name in ("shards", "more")}
    assert min(targets.values()) > 0 and sum(targets.values()) == row["mlm_masked_targets"]
    total = sum(row[f"loss_mlm_masked of {name}"] * count for name, count in targets.items())
    assert total / sum(targets.values()) == pytest.approx(row["loss_mlm_masked"], rel=1e-5)
    assert row["loss_mlm_masked of shards"] != row["loss_mlm_masked of more"]

    given = [2.0, 1.0]
    tokens = [read_manifest(Path(source.path)).splits["train"].num_tokens for source in run.corpus.sources]
    seen = [weight * count for weight, count in zip(given, tokens, strict=True)]
    drawn = [weight * count for weight, count in zip(drawn_weights(run.corpus), tokens, strict=True)]
    assert sum(drawn) == pytest.approx(sum(seen))
    assert drawn[0] / drawn[1] == pytest.approx((seen[0] / seen[1]) ** 0.25)
    (start,) = read_metrics(run_dir / "metrics.jsonl", "start")
    by_source = list(start["data"]["examples_per_epoch_by_source"].values())
    assert by_source[0] / by_source[1] == pytest.approx(drawn[0] / drawn[1], rel=0.2)
    assert drawn_weights(run.corpus.model_copy(update={"temperature": 1.0})) == (2.0, 1.0)


BY_THE_CLOCK = {"training.total_steps": None, "training.max_minutes": 0.05, "evaluation.every_steps": 7}


def lengths_of(run_dir: Path) -> tuple[Any, Any]:
    training = json.loads((run_dir / "run_config.json").read_bytes())["training"]
    return training["total_steps"], training["max_minutes"]


def test_minutes_become_steps_that_are_written_down_and_kept(workshop: Workshop) -> None:
    run_dir = workshop.run(BY_THE_CLOCK)
    steps, minutes = lengths_of(run_dir)
    assert minutes is None
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == steps
    assert read_metrics(run_dir / "metrics.jsonl", "start")[-1]["plan"]["steps"].startswith(f"{steps:,},")
    (found,) = read_metrics(run_dir / "metrics.jsonl", "timing")
    assert found["total_steps"] == steps and found["max_minutes"] == 0.05
    left_s = 60 * 0.05 - found["spent_s"] - found["evaluation_s"]
    assert steps == int(left_s / (found["step_s"] + found["evaluation_s"] / 7))
    assert f"training.max_minutes 0.05: {steps:,} steps; a step took" in (run_dir / "logs/rank_0.log").read_text()

    (run_dir / "DONE").unlink()
    recipe, told = run_dir.parent.parent / f"{run_dir.name}.json", run_dir / "run_config.json"
    told.write_text(told.read_text().replace(f'"total_steps": {steps}', f'"total_steps": {steps + 2}'))
    files = ("--run", recipe, "--deepspeed_config", ROOT / "ds_configs/zero0.json", "--run_dir", run_dir)
    must(ROOT / "bert_ds/pretrain.py", *files, "--resume", "auto")
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] == steps + 2
    assert lengths_of(run_dir) == (steps + 2, None)

    told.write_text(told.read_text().replace(f'"total_steps": {steps + 2}', '"total_steps": null'))
    done = run_verb(ROOT / "bert_ds/pretrain.py", *files, "--resume", "auto")
    assert done.returncode == 4
    assert f"{told}: training.total_steps is missing" in done.stderr + done.stdout


def test_minutes_too_few_for_the_warm_up_are_refused(workshop: Workshop) -> None:
    recipe, run_dir = workshop.folder / "long_warm_up.json", workshop.folder / "runs/long_warm_up"
    changes = {**BY_THE_CLOCK, "schedule": {"type": "linear", "warmup_steps": 100_000}}
    recipe.write_text(json.dumps(changed(RECIPE, changes)), encoding="utf-8")
    files = ("--run", recipe, "--deepspeed_config", ROOT / "ds_configs/zero0.json", "--run_dir", run_dir)
    done = run_verb(ROOT / "bert_ds/pretrain.py", *files)
    assert done.returncode == 2
    assert re.search(
        r"max_minutes 0.05 leaves \d+ steps: .*schedule.warmup_steps: 100000 is more than training.total_steps",
        done.stderr,
    )
    assert not (run_dir / "checkpoints").exists()
