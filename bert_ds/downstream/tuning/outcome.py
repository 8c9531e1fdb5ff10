"""What remains of a run: figures, predictions, the report of each class, the model as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.kinds.kind import Prediction
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.examples import Labels
from bert_ds.downstream.rows.splits import scored_parts
from bert_ds.downstream.scores.figures import class_figures, write_class_figures
from bert_ds.downstream.scores.metrics import mean_and_deviation
from bert_ds.downstream.tuning.predicting import predict_features
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, write_task_folder
from bert_ds.downstream.tuning.task_rows import Side, TaskRows
from bert_ds.folders.kept_files import keeping_files
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.checkpoints.checkpoint_folder import checkpoints_dir
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

_SCORED = [f"{side}{part}" for side in ("validation", "test") for part in ("", "_overlapping", "_others")]


class Measurement(NamedTuple):
    """A model on one side of a task; the same on all ranks."""

    figures: dict[str, float]
    """Metrics and losses by name; empty where no row has a label."""
    predictions: list[Prediction]


class Outcome(NamedTuple):
    """What the end of a run is made of."""

    task: TaskConfig
    rows: TaskRows
    tokenizer: TextTokenizer
    run_dir: Path
    config: EncoderConfig
    """Shape of the encoder, as it was pre-trained."""
    trivial: dict[str, float] | None = None
    """Metrics of the trivial method on the validation rows, where they were asked for."""


def measure_side(model: Any, task: TaskConfig, side: Side, labels: Labels) -> Measurement:
    """Predict all rows of a side and measure those that have a label; a collective.

    Args:
        model: a DeepSpeed engine or a `TaskModel`.
        task: of the rows.
        side: its rows.
        labels: of the model.
    """
    kind = KINDS[task.kind]
    found = predict_features(
        model,
        side.features,
        batch_size=task.evaluation.batch_size,
        summarise=kind.summarise,
        count_targets=kind.count_targets,
    )
    predictions = kind.predict(side.examples, side.features, found.summaries, labels)
    figures = labelled_figures(task, side, predictions, labels, rows=range(len(predictions)))
    return Measurement({**figures, **found.means} if figures else {}, predictions)


def part_figures(
    name: str, task: TaskConfig, side: Side, found: Measurement, labels: Labels
) -> dict[str, dict[str, float]]:
    """Return the figures of a side under its name and, where it is official, of each part that has labelled rows.

    See `scored_parts`. The parts have metrics and no losses.
    """
    parts = scored_parts(name, len(side.examples), side.overlapping)
    figures = {part: labelled_figures(task, side, found.predictions, labels, rows=rows) for part, rows in parts.items()}
    return {**{part: one for part, one in figures.items() if one}, name: found.figures}


def row_counts(rows: TaskRows) -> dict[str, dict[str, int]]:
    """Return how many rows were used, of each side and part, and how many were left out as part of another side's."""
    counts = {"train": len(rows.train.examples)}
    for name, side in (("validation", rows.validation), ("test", rows.test)):
        if side is not None:
            parts = scored_parts(name, len(side.examples), side.overlapping)
            counts |= {part: len(indices) for part, indices in parts.items()}
    return {"rows": counts, "rows_removed": rows.num_removed}


def labelled_figures(
    task: TaskConfig, side: Side, predictions: Sequence[Prediction], labels: Labels, *, rows: Iterable[int]
) -> dict[str, float]:
    """Return the metrics of some rows of a side, of those that have a label; {} where none has."""
    labelled = [index for index in rows if side.examples[index].target is not None]
    if not labelled:
        return {}
    examples, values = [side.examples[i] for i in labelled], [predictions[i] for i in labelled]
    return KINDS[task.kind].measure(examples, values, labels)


def conclude(outcome: Outcome, step: int, *, log: RunLog) -> None:
    """Measure and export the best step; a collective.

    Every rank holds the whole model here: what a folder will give is what is measured.

    Raises:
        CheckpointError: the checkpoint of the best step is missing or damaged, or transformers computes other scores.
    """
    task, run_dir = outcome.task, outcome.run_dir
    model = best_model(outcome, step)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sides = {"validation": outcome.rows.validation, **({"test": outcome.rows.test} if outcome.rows.test else {})}
    found = {name: measure_side(model, task, side, outcome.rows.labels) for name, side in sides.items()}
    figures: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        figures |= part_figures(name, task, side, found[name], outcome.rows.labels)

    def write_sides() -> None:
        for name, side in sides.items():
            write_side(run_dir, name, task, side, found[name])

    on_main_rank(write_sides)
    on_main_rank(lambda: _export(outcome, model.cpu(), step, figures["validation"], log=log))
    facts = row_counts(outcome.rows)
    results: dict[str, Any] = {"task": task.name, "metric": task.chosen_metric, "seed": task.seed, "step": step}
    results |= {**facts, **figures}
    if outcome.trivial is not None:
        results["trivial"] = outcome.trivial
    on_main_rank(lambda: write_results(run_dir, results))
    shown = "  ".join(f"{name} {value:.4f}" for name, value in figures["validation"].items())
    log.info(f"best step {step} of {task.name}: {shown}")
    for name, measured in figures.items():
        if name not in sides:
            log.info(f"{name}, {facts['rows'][name]:,} rows: {task.chosen_metric} {measured[task.chosen_metric]:.4f}")


def best_model(outcome: Outcome, step: int) -> TaskModel:
    """Return the model of a step, in fp32 on the CPU, from its checkpoint."""
    checkpoint = checkpoints_dir(outcome.run_dir) / f"global_step{step}"
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is gone: it was the best step of the run")
    kind = KINDS[outcome.task.kind]
    task, labels = outcome.task, outcome.rows.labels
    model = make_task_model(kind, outcome.config, labels, kernels=task.training.kernels, settings=task.own_section)
    model.load_state_dict(load_fp32_state_dict(checkpoint))
    return model.eval()


def write_side(folder: Path, name: str, task: TaskConfig, side: Side, found: Measurement) -> None:
    """Write predictions/NAME/ and, for classes, the report and the figure of each class."""
    kind = KINDS[task.kind]
    write_predictions(folder, name, kind.prediction_files(side.examples, found.predictions))
    labelled = [i for i, example in enumerate(side.examples) if example.target is not None]
    if kind.class_pairs is not None and labelled:
        pairs = kind.class_pairs([side.examples[i] for i in labelled], [found.predictions[i] for i in labelled])
        with keeping_files(folder, (f"figures/{file}" for file in class_figures(name))):
            write_class_figures(folder / "figures", name, pairs)


def write_predictions(folder: Path, name: str, files: Mapping[str, str]) -> None:
    """Write the files of predictions/NAME/, given as name to text."""
    target = folder / "predictions" / name
    with keeping_files(folder, (f"predictions/{name}/{file}" for file in files)):
        target.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (target / file).write_text(text, encoding="utf-8")


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    with keeping_files(folder, ["results.json"]):
        write_json(folder / "results.json", results)


def write_summary(run_dir: Path, folders: Sequence[Path]) -> None:
    """Write results.json over several seeds: each figure per seed, its mean and its deviation."""
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    summary: dict[str, Any] = {"task": results[0]["task"], "metric": results[0]["metric"]}
    summary["seeds"] = [result["seed"] for result in results]
    summary |= {name: results[0][name] for name in ("rows", "rows_removed") if name in results[0]}
    for side in _SCORED:
        if all(side in result for result in results):
            # An earlier version may have measured less.
            names = [name for name in results[0][side] if all(name in result[side] for result in results)]
            summary[side] = {name: _spread([result[side][name] for result in results]) for name in names}
    if "trivial" in results[0]:
        summary["trivial"] = results[0]["trivial"]
    write_results(run_dir, summary)
    metric = summary["metric"]
    chosen = summary["validation"][metric]
    print(f"{summary['task']}: {metric} {chosen['mean']:.4f} +- {chosen['deviation']:.4f}, {len(folders)} seeds")


def _spread(values: Sequence[float]) -> dict[str, Any]:
    mean, deviation = mean_and_deviation(values)
    return {"mean": mean, "deviation": deviation, "values": list(values)}


def _export(outcome: Outcome, model: TaskModel, step: int, figures: dict[str, float], *, log: RunLog) -> None:
    task = outcome.task
    facts = TaskFacts(
        task=task.name,
        kind=task.kind,
        labels=outcome.rows.labels,
        tokenizer_fingerprint=outcome.tokenizer.fingerprint,
        max_seq_length=task.max_seq_length,
        figures={
            "training rows": len(outcome.rows.train.examples),
            "best step": step,
            **{f"validation {name}": f"{value:.4f}" for name, value in figures.items()},
        },
        answering=task.answering.model_dump() if task.kind == "question_answering" else {},
        settings=task.own_section,
    )
    output = outcome.run_dir / "hf"
    try:
        checks = write_task_folder(output, model, facts=facts, tokenizer=outcome.run_dir / "tokenizer")
    except DataError as error:
        raise DataError(f"{error}. The checkpoint of step {step} is kept: --resume auto exports it") from None
    for check in checks:
        log.info(
            f"exported to {output}: transformers' scores differ by at most {check.max_difference:.1e} "
            f"(largest score {check.scale:.1f}), tokenizer equal"
        )
