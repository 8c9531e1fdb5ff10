"""What command lines, corpora and reports hand on, looked at in this process."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
from call_watch import Calls
from config_cases import RECIPE, changed, write_json
from corpus_fixtures import FIRST_TEXT_ID, random_documents, write_shards
from downstream_cases import review_task
from test_report import logged, written

from bert_ds import export_hf, init, judge_launch, submit
from bert_ds.basics.ranks import DataError, Ranks
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config, load_pair
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.run_config import ConfigError, EmbeddedCorpus, MaskingConfig, SequenceConfig
from bert_ds.configuration.run_plan import make_plan
from bert_ds.configuration.run_speed import CARDS
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.batches import loader
from bert_ds.corpus.batches.batch_stages import DataSettings, DataStage
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.batches.plan_batches import evaluated_batches
from bert_ds.corpus.batches.sequences import content_hash
from bert_ds.corpus.shards import build, embedded
from bert_ds.corpus.shards.segments import KINDS, SegmentRecord
from bert_ds.corpus.shards.shard_folder import FileRecord, ShardRecord, open_shards
from bert_ds.corpus.text.documents import Document
from bert_ds.corpus.text.text_input import DocumentInput
from bert_ds.export_hf import _measured
from bert_ds.launch.launch_checks import CHECKS, _disagreements, checked_task
from bert_ds.launch.task_table import rows_left, task_table
from bert_ds.launch.verb_arguments import finetune_arguments, pretrain_arguments
from bert_ds.reporting.run_history import below_unigram, read_history
from bert_ds.reporting.run_overview import _job_number, read_overview
from bert_ds.training.launch.restart_policy import Progress, Verdict


def test_short_words_of_a_command_line_become_settings(tmp_path: Path, tiny_export: Path) -> None:
    given = pretrain_arguments(["--init_from", "runs/old", "--set", "seed=4", "--replay_step", "7"])
    assert (given.set, given.resume) == (["seed=4", "init_from=runs/old"], "must")
    assert pretrain_arguments([]).resume == "never"
    words = ["--task", str(review_task(tmp_path)), "--model", str(tiny_export)]
    assert finetune_arguments([*words, "--seed", "7"]).set == ["seed=7"]


def test_every_folder_and_file_that_a_fine_tuning_names_is_looked_at_before_the_launch(
    tmp_path: Path, tiny_export: Path
) -> None:
    task = review_task(tmp_path, distillation={"teacher": "nowhere"})
    words = ["--task", str(task), "--model", str(tiny_export), "--run_dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=r"distillation\.teacher: .*nowhere does not exist"):
        checked_task(finetune_arguments(words))
    review_task(tmp_path)
    (tmp_path / "run/seed_2").mkdir(parents=True)
    (tmp_path / "run/seed_2/mine").touch()
    with pytest.raises(ConfigError, match="seed_2 holds 'mine'"):
        CHECKS["finetune"]([*words, "--seeds", "1", "2"])


def test_what_depends_on_a_model_that_is_not_known_yet_is_left_to_the_ranks(tmp_path: Path) -> None:
    task, ds = load_task(review_task(tmp_path)), load_ds_config("zero1")
    ds = replace(ds, settings={**ds.settings, "activation_checkpointing": {"number_checkpoints": 2}})
    assert [problem.path for problem in _disagreements(task, ds, None)] == []
    found = [problem.path for problem in _disagreements(task, ds, BertConfig(num_hidden_layers=3))]
    assert [path.partition(".")[0] for path in found] == ["activation_checkpointing"]


def test_the_table_of_a_fine_tuning_counts_the_rows_that_are_trained_on(tmp_path: Path, tiny_export: Path) -> None:
    task = load_task(review_task(tmp_path, training={"epochs": 2, "train_batch_size": 8}))
    assert rows_left(task, 100) == 75
    fewer = task.model_copy(update={"data": task.data.model_copy(update={"max_train_rows": 30})})
    assert rows_left(fewer, 100) == 30
    rows, _ = task_table(task, load_ds_config("zero1"), tiny_export, world_size=1, num_rows=80)
    assert dict(rows)["steps"].startswith("about 20 (2 epochs)")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A recipe in fp32 and a DeepSpeed file, as a command line names them."""
    recipe = changed(RECIPE, "training.precision", "fp32")
    paths = (
        write_json(tmp_path, "run.json", recipe),
        write_json(tmp_path, "ds.json", {"zero_optimization": {"stage": 1}}),
    )
    return ["--run", str(paths[0]), "--deepspeed_config", str(paths[1])]


def test_a_job_is_planned_with_its_overrides_and_by_its_precision(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = ["--run_dir", str(tmp_path / "run"), "--nodes", "1", "--gpus_per_node", "1", "--time", "1:00:00", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["submit.py", *files, *job, "--set", "training.total_steps=777"])
    assert submit.main() == 0
    said = capsys.readouterr().out
    assert "777" in said.split("sbatch")[0] and "training.total_steps=777" in said.split("sbatch")[1]
    args = Namespace(tokens_per_s=None, like=None, gpu="H100", mfu=0.35)
    run, ds = load_pair(files[1], files[3], overrides=[])
    assert submit.speed_of(args, make_plan(run, ds, 1)) is None  # an H100 has no peak in fp32 here
    run, ds = load_pair(files[1], files[3], overrides=["training.precision=bf16"])
    assert submit.speed_of(args, make_plan(run, ds, 1)) is not None


def test_a_recipe_is_chosen_for_the_card_the_ranks_and_the_time_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"given_sections": {}, "choose": MagicMock(), "on_card": None, "make_plan": Mock(warnings=())}
    nothing: dict[str, Any] = {"load_tokenizer_for": None, "write_recipe": None, "load_run_config": None}
    calls = Calls(monkeypatch, init, **parts, **nothing, told=[], epoch_warnings=[])
    words = ["--corpus", "shards", "--hours", "2", "--gpu", "H200", "--world_size", "4"]
    monkeypatch.setattr(sys, "argv", ["init.py", str(tmp_path / "run.json"), *words])
    init.main()
    (given,) = calls["choose"]
    assert (given["minutes"], given["world_size"]) == (120, 4)
    assert calls["on_card"][0]["card"] == CARDS["H200"] and calls["make_plan"][0]["world_size"] == 4


def test_sbatch_is_started_with_what_the_site_says_unless_the_user_says_otherwise(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site.env").write_text("export SBATCH_ACCOUNT=nlp\nexport SBATCH_QOS=high\n")
    monkeypatch.setenv("BERT_DS_SITE", str(tmp_path / "site.env"))
    monkeypatch.setenv("SBATCH_QOS", "mine")
    started = Mock(return_value=Mock(returncode=0, stdout="7;cluster\n"))
    monkeypatch.setattr(submit.subprocess, "run", started)
    monkeypatch.setattr(sys, "argv", ["submit.py", *files, "--run_dir", str(tmp_path / "run"), "--gpus_per_node", "1"])
    assert submit.main() == 0
    environment = started.call_args.kwargs["env"]
    assert (environment["SBATCH_ACCOUNT"], environment["SBATCH_QOS"]) == ("nlp", "mine")


def test_a_job_is_judged_by_the_limit_that_its_script_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, judge_launch, judge=(Verdict("again", 75, 0, "why"), Progress()))
    words = ["--run_dir", str(tmp_path), "--job", "7", "--world_size", "2", "--srun_code", "1", "--limit", "9"]
    monkeypatch.setattr(sys, "argv", ["judge_launch.py", *words])
    judge_launch.main()
    assert calls["judge"][0]["limit"] == 9


def test_the_embedded_corpus_is_made_as_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"docstring_documents": [Document("a", "x" * 600_000)], "train_wordpiece": None, "build_shards": None}
    calls = Calls(monkeypatch, embedded, **parts)
    config = EmbeddedCorpus(vocab_size=99, lowercase=False, max_bytes=700_000, validation_fraction=0.25)
    embedded.build_embedded(config, tmp_path, say=lambda text: None)
    (read,), (trained,), (built,) = (calls[name] for name in parts)
    assert read["max_bytes"] == 700_000
    assert (trained["vocab_size"], trained["lowercase"]) == (99, False)
    assert built["settings"].validation_fraction == 0.25


def test_a_build_is_told_of_its_workers_and_counts_what_is_unknown_in_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", random_documents(6))
    calls = Calls(monkeypatch, build, encode_in_order=(none for none in ()))
    text = DocumentInput(lambda: iter([Document("a", "the film")]), description={"of": "a test"})
    with pytest.raises(DataError, match="too little text"):
        build.build_shards(text, shards / "tokenizer", tmp_path / "built", workers=3)
    assert calls["encode_in_order"][0]["workers"] == 3
    no_file = {kind: FileRecord(bytes=1, sha256="0" * 64) for kind in KINDS}
    records = [
        ShardRecord(name=f"train-{n:05d}", num_documents=1, num_sentences=2, num_tokens=9, num_unknown=n, files=no_file)
        for n in (3, 1)
    ]
    segments = [SegmentRecord(file_index=0, num_documents=1, shards={"train": record}) for record in records]
    assert build._sum_of(segments, "train").num_unknown == 4


def test_what_a_split_holds_is_known_by_its_sentences_and_documents_too(tmp_path: Path) -> None:
    one, other = [FIRST_TEXT_ID] * 4, [FIRST_TEXT_ID] * 2
    cuts = {"whole": [[one, one]], "sentences": [[one, other, other]], "documents": [[one], [one]]}
    held = [content_hash(open_shards(write_shards(tmp_path / name, text), "train")) for name, text in cuts.items()]
    assert len(set(held)) == 3
    split = open_shards(tmp_path / "whole", "train")
    split.fingerprint = "of another tokenizer with the same pieces"
    assert content_hash(split) not in held


def test_tables_of_examples_may_lie_in_the_run_and_sources_share_the_examples_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        write_shards(tmp_path / name, random_documents(20, seed=seed), random_documents(20, seed=seed + 5))
        for seed, name in enumerate(("a", "b"))
    ]
    calls = Calls(monkeypatch, loader, build_examples=Calls.THROUGH)
    settings = DataSettings(SequenceConfig(max_seq_length=32, sentence_pair="none"), MaskingConfig(), 5, 4)
    sources = [Source(folder, folder.name) for folder in folders]
    data = PretrainingData(sources, folders[0] / "tokenizer", settings=settings, cache_dir=tmp_path / "cache")
    assert [call["cache_dirs"] for call in calls["build_examples"]] == [(one, tmp_path / "cache") for one in folders]
    recipe: Any = Namespace(evaluation=Namespace(num_examples=6, batch_size=4))
    found = {
        name: [batch.num_sequences for batch in some] for name, some in evaluated_batches(recipe, data, Ranks(0, 0, 1))
    }
    assert found == {"": [3, 3], "a": [3], "b": [3]}
    alone = PretrainingData(sources[1:], folders[0] / "tokenizer", settings=settings)
    spread: Any = {"batch_size": 4, "rank": 0, "world_size": 1}
    one, wanted = data.evaluation_batches(4, source="b", **spread), alone.evaluation_batches(4, **spread)
    assert next(one).input_ids_T.tolist() == next(wanted).input_ids_T.tolist()


def test_a_source_with_too_little_held_out_text_is_left_out_alone() -> None:
    def batches(number: int, *, source: str | None = None, **spread: int) -> Any:
        if source == "small":
            raise DataError("too few")
        return iter([])

    recipe: Any = Namespace(evaluation=Namespace(num_examples=8, batch_size=4))
    data: Any = Namespace(names=["a", "small", "b"], evaluation_batches=batches)
    assert [name for name, _ in evaluated_batches(recipe, data, Ranks(0, 0, 1))] == ["", "a", "b"]


@pytest.mark.parametrize("more", [[], ["--onnx"]])
def test_what_is_pushed_is_the_model_with_the_words_of_its_card(
    more: list[str], tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, export_hf, push_folder="there", written=["said"])
    words = ["--push_to_hub", "me/a", "--private", "--license", "mit", "--language", "en", "--datasets", "d"]
    output = ["--output", str(tmp_path / "onnx")] if more else []
    monkeypatch.setattr(sys, "argv", ["export_hf.py", "--model", str(tiny_export), *words, *more, *output])
    export_hf.main()
    (given,) = calls["push_folder"]
    assert (given["folder"], given["name"], given["private"]) == (tiny_export, "me/a", True)
    assert given["card"] == ("mit", ["en"], ["d"])


def test_stages_of_one_length_read_on_where_the_one_before_has_ended(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", random_documents(20))
    sequences, masking = SequenceConfig(max_seq_length=32, sentence_pair="none"), MaskingConfig()
    earlier = (DataStage(0, sequences, masking, 4), DataStage(3, sequences, masking, 8))
    settings = DataSettings(sequences, masking, 5, 12, 5, earlier=earlier)
    data = PretrainingData([Source(shards, "text")], shards / "tokenizer", settings=settings)
    assert [stage.first_position for stage in data._stages] == [0, 12, 28]
    assert [data.source_counts(step, step + 1)["text"].examples for step in (2, 3, 5)] == [4, 8, 12]


def test_the_balance_that_is_told_is_the_worst_of_the_steps_looked_at(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", random_documents(60))
    settings = DataSettings(SequenceConfig(max_seq_length=64), MaskingConfig(), 0, 16)
    data = PretrainingData([Source(shards, "text")], shards / "tokenizer", settings=settings)
    balances = []
    for step in range(4):
        tokens = [batch.num_tokens for batch in data.rank_batches(step, rank=0, split=BatchSplit(4, 4, 1))]
        balances.append(max(tokens) / (sum(tokens) / 4))
    assert pytest.approx(data.facts(num_parts=4)["tokens_max_over_mean"]) == max(balances) > balances[0]


def test_a_report_goes_by_the_last_attempt_and_the_last_evaluation(tmp_path: Path) -> None:
    attempts = [
        {"kind": "start", "step": step, "attempt": 1 + step, "time": 0.0, "data": {"unigram_cross_entropy": 7.0 + step}}
        for step in (0, 1)
    ]
    evaluated = [logged("evaluation", step, loss_mlm_masked=6.0 - step, mlm_masked_accuracy=0.5) for step in (1, 2)]
    run = written(
        tmp_path, attempts[0], logged("train", 1), evaluated[0], attempts[1], logged("train", 2), evaluated[1]
    )
    history = read_history(run)
    assert (history.unigram, below_unigram(history)) == (8.0, 4.0)
    assert _measured(run / "metrics.jsonl", 2) == {"held-out text at [MASK]": "loss 4.000 nats, accuracy 0.500"}
    assert _measured(run / "metrics.jsonl", 3) == {}


@pytest.mark.parametrize(("age_s", "number"), [(1, "18"), (-1, "17")])
def test_the_job_of_a_run_is_the_newer_of_the_one_that_ran_and_the_one_that_waits(
    age_s: int, number: str, tmp_path: Path
) -> None:
    (tmp_path / "slurm_job").write_text("17\n")
    (tmp_path / "submit.json").write_text('{"job": "18"}')
    os.utime(tmp_path / "submit.json", (0, 1000))
    os.utime(tmp_path / "slurm_job", (0, 1000 - age_s))
    assert _job_number(tmp_path) == number


def test_a_run_of_long_steps_may_be_silent_for_long(tmp_path: Path) -> None:
    row = {"kind": "train", "step": 1, "attempt": 1, "time": 1000.0, "loss": 8.0, "seconds": 100.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    states = [read_overview(tmp_path, queue=None, now=1000.0 + silent_s).state for silent_s in (900.0, 1100.0)]
    assert states == ["running", "dead"]
