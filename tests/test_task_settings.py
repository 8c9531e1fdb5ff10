"""Each setting that a task may hold reaches what it is for: another value makes another run or other scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from downstream_cases import review_rows, write_lines
from recipe_workshop import run_here
from settings_walk import Change, changed, observed, setting_paths

import bert_ds.finetune
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.recipe.precision import with_precision
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.scores import figures
from bert_ds.launch.launch_checks import checked_task, task_folders
from bert_ds.launch.verb_arguments import finetune_arguments
from bert_ds.training.launch.restart import StopRequest

ROOT = Path(__file__).resolve().parents[1]
FILE = {"path": "train.tsv", "format": "tsv"}
TASK: dict[str, Any] = {
    "name": "tiny",
    "kind": "classification",
    "data": {"train": [FILE], "validation": [{"path": "held.tsv", "format": "tsv"}], "fields": {"text": 0, "label": 1}},
    "max_seq_length": 24,
    "optimizer": {"type": "adamw", "lr": 5e-3},
    "training": {"epochs": 1, "train_batch_size": 8, "log_every_steps": 1, "precision": "fp32", "kernels": "torch"},
}
HELD = {"data.validation_fraction": 0.25, "data.validation": []}
LINES = {
    **HELD,
    "data.train.0.path": "lines.txt",
    "data.train.0.format": "lines",
    "data.train.0.pattern": r"(?P<t>.*) (?P<l>\w+)",
    "data.fields": {"text": "t", "label": "l"},
}
MARKED = {
    **HELD,
    "data.train": [{**FILE, "values": {"l": "good"}}, {**FILE, "path": "other.tsv", "values": {"l": "bad"}}],
    "data.fields": {"text": 0, "label": "l"},
    "data.drop_overlap": False,
}
REASONS = {
    "$schema": "for editors",
    "format": "has one value",
    "name": "a label: it stands in the results and names the run folder",
    "training.kernels": "the same figures by other means: test_kernels_in_encoder",
    "evaluation.batch_size": "the same predictions, in other batches: test_task_engine",
    "checkpoints.asynchronous": "the same checkpoints, written later: test_checkpoint_saver",
    "schedule.power": "of a recipe's schedule: test_recipe_settings",
    "schedule.decay_fraction": "of a recipe's schedule: test_recipe_settings",
    **{
        f"optimizer:{kind}.": "of a recipe's optimizer: test_recipe_settings, and for foreign kernels what it says"
        for kind in ("lamb", "lans", "stableadamw", "lion", "muon", "apex_fused_lamb")
    },
    "optimizer:deepspeed_": "of a recipe's optimizer: see test_recipe_settings",
    "distillation.": "needs a fine-tuned teacher: test_taught_model",
    "question_answering.": "of one kind: test_qa_kind, test_answer_windows, test_qa_scores",
    "sentence_embedding.": "of one kind: test_embedding_kind",
    "prompt.": "of one kind: test_masked_scores, test_score",
    "data.train.record": "of one format: test_records",
    "data.train.strips_last_character": "of one format: test_records",
    "data.tag_scheme": "of one kind: test_tag_schemes, test_task_kinds",
    "data.validation.": "is read as a training file is, but for its path",
    "data.corpus.": "of one kind: test_retrieval",
    "retrieval.": "of one kind: test_retrieval",
    "data.test.": "is read as a training file is, but for its path",
}
"""Settings, or beginnings of settings, whose change no run here shows, and why."""
CHANGES = {
    "kind": Change("multi_label", also={"data.fields": {"text": 0, "labels": 1}}),
    "metric": Change("macro_f1"),
    "seed": Change(2),
    "max_seq_length": Change(5),
    "dropout": Change(0.5),
    "classifier_dropout": Change(0.9),
    "class_weights": Change("balanced"),
    "freeze.embeddings": Change(True),
    "freeze.layers": Change(1),
    "freeze.encoder": Change(True),
    "layerwise_lr_decay": Change(0.5),
    "optimizer:adamw.type": Change("lion"),
    "optimizer:adamw.lr": Change(4e-3),
    "optimizer:adamw.betas": Change([0.5, 0.6]),
    "optimizer:adamw.eps": Change(1e-2),
    "optimizer:adamw.weight_decay": Change(0.5),
    "schedule.type": Change("constant", {"schedule": {"type": "linear", "warmup_steps": 1}}),
    "schedule.warmup_steps": Change(3, {"schedule": {"warmup_steps": 1}}),
    "schedule.warmup_fraction": Change(0.9),
    "schedule.min_lr_fraction": Change(0.5, {"schedule": {"type": "linear", "warmup_steps": 1}}),
    "training.epochs": Change(2),
    "training.total_steps": Change(3, {"training.epochs": None}),
    "training.train_batch_size": Change(4),
    "training.precision": Change("bf16"),
    "training.gradient_clipping": Change(0.01),
    "training.log_every_steps": Change(3),
    "evaluation.every_epochs": Change(0.5),
    "evaluation.patience": Change(1, {"optimizer.lr": 1e-9, "training.epochs": 5}),
    "checkpoints.every_steps": Change(2),
    "checkpoints.keep_last": Change(1, {"checkpoints.every_steps": 1}),
    "checkpoints.keep_every_steps": Change(2, {"checkpoints": {"every_steps": 1, "keep_last": 1}}),
    "data.train.0.path": Change("other.tsv"),
    "data.train.0.format": Change("csv", {**HELD, "data.train.0.path": "either"}),
    "data.train.0.encoding": Change("latin-1", {"data.train.0.path": "accents.tsv"}),
    "data.train.0.has_header": Change(False),
    "data.train.0.pattern": Change(r"\w+ (?P<t>.*) (?P<l>\w+)", LINES),
    "data.train.0.values": Change({"l": "fine"}, MARKED),
    "data.test.0.path": Change("other.tsv", {"data.test": [FILE]}),
    "data.validation.0.path": Change("other.tsv"),
    "data.validation_fraction": Change(0.5, HELD),
    "data.drop_overlap": Change(False, {"data.validation.0.path": "other.tsv"}),
    "data.official": Change(["validation"], {"data.validation.0.path": "other.tsv"}),
    "data.fields": Change({"text": 0, "text_pair": 1, "label": 1}),
    "data.label_separator": Change("oo", {**HELD, "kind": "multi_label", "data.fields": {"text": 0, "labels": 1}}),
    "data.labels": Change(["good", "bad"]),
    "data.rename_labels": Change({"good": "fine", "bad": "worse"}),
    "data.max_train_rows": Change(10),
    "data.max_validation_rows": Change(3),
}


def finetuned(*words: object) -> int:
    """Run finetune.py with these words in this process, all but the way into a launch; its exit code."""

    def train() -> int:
        args = finetune_arguments([str(word) for word in words])
        task, ds = checked_task(args)
        run_dir, _ = task_folders(args, task)
        alone: dict[str, Any] = {"args": args, "ranks": Ranks(0, 0, 1), "stop": StopRequest(), "run_dirs": [run_dir]}
        start = bert_ds.finetune.open_task(task, ds, **alone)
        return bert_ds.finetune.finetune(with_precision(task, start.decision.precision), run_dir, start=start)

    return run_here(train)


class Desk:
    """A folder with everything a task may name, and the runs made in it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        rows = review_rows(30)
        write_lines(folder / "train.tsv", ["text\tlabel", *rows[:21:2], *rows[1:12:2]])
        write_lines(folder / "held.tsv", ["text\tlabel", *rows[23:]])
        turned = {"good": "bad", "bad": "good"}
        pairs = [row.split("\t") for row in rows[23:]]
        write_lines(folder / "turned.tsv", ["text\tlabel", *(f"{row}\t{turned[label]}" for row, label in pairs)])
        write_lines(folder / "other.tsv", ["text\tlabel", *rows[3:17]])
        write_lines(folder / "either", ["text\tlabel,label", *(f"{row},{row[-3:]}" for row in rows[:12])])
        write_lines(folder / "lines.txt", [row.replace("\t", " ") for row in rows[:12]])
        write_lines(folder / "accents.tsv", ["text\tlabel", *(f"é {row}" for row in rows[:12])])

    def run(self, changes: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Run a changed task; what it left, and its exit code."""
        task = json.dumps(changed(TASK, changes), sort_keys=True)
        run_dir = self.folder / f"runs/{hashlib.sha256(task.encode()).hexdigest()[:12]}"
        if not run_dir.exists():
            path = self.folder / f"{run_dir.name}.json"
            path.write_text(task, encoding="utf-8")
            files = ("--task", path, "--model", self.model, "--deepspeed_config", ROOT / "ds_configs/zero0.json")
            code = finetuned(*files, "--run_dir", run_dir, "--hang_limit", 0)
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "code").write_text(str(code), encoding="utf-8")
        return observed(run_dir), int((run_dir / "code").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_export: Path) -> Iterator[Desk]:
    with pytest.MonkeyPatch.context() as patch:
        # A third of a run's time would go into a picture of which only the name is looked at.
        patch.setattr(figures, "draw_confusion", lambda path, *rest: path.write_bytes(b""))
        yield Desk(tmp_path_factory.mktemp("tasks"), tiny_export)


@pytest.mark.parametrize("path", CHANGES)
def test_another_value_of_a_task_s_setting_makes_another_run(path: str, desk: Desk) -> None:
    change = CHANGES[path]
    before, code = desk.run(change.base)
    after, other_code = desk.run({**change.base, path: change.value, **change.also})
    assert code == other_code == 0
    assert before != after


def test_the_same_task_makes_the_same_run(desk: Desk) -> None:
    assert desk.run({}) == desk.run({"name": "again"})


def test_the_best_step_is_chosen_on_the_validation_side(desk: Desk) -> None:
    desk.run({"data.test": [{**FILE, "path": "turned.tsv"}], "data.drop_overlap": False})
    (config,) = (path for path in desk.folder.glob("runs/*/task_config.json") if "turned" in path.read_text())
    run_dir = config.parent
    results = json.loads((run_dir / "results.json").read_text())
    measured = [row["value"] for row in json.loads((run_dir / "evaluations.json").read_text())]
    assert max(measured) == results["validation"]["accuracy"] == pytest.approx(1 - results["test"]["accuracy"])
    assert results["validation"]["accuracy"] != results["test"]["accuracy"]


def test_every_setting_of_a_task_is_changed_above_or_has_a_reason() -> None:
    paths, changes = set(setting_paths(TaskConfig)), {path.replace(".0.", ".") for path in CHANGES}
    assert changes <= paths
    left = {path for path in paths - changes if not any(path.startswith(name) for name in REASONS)}
    assert not left


@pytest.mark.parametrize("change", [{"seed": 2}, {"training.train_batch_size": 4}, {"max_seq_length": 5}])
def test_a_run_does_not_go_on_with_other_batches(
    change: dict[str, Any], desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    path, whole = desk.folder / "other_batches.json", desk.folder / "whole"
    files = ("--model", desk.model, "--deepspeed_config", ROOT / "ds_configs/zero0.json", "--run_dir", whole)
    for changes, code in (({}, 0), (change, 4)):
        path.write_text(json.dumps(changed(TASK, changes)), encoding="utf-8")
        assert finetuned("--task", path, *files, "--resume", "auto", "--hang_limit", 0) == code
    assert "was saved with data" in capsys.readouterr().err
