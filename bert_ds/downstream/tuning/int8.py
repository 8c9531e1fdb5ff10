"""The ONNX file of a fine-tuned folder with int8 matrices, proven by the metric of its task on the validation rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.outcome import labelled_figures
from bert_ds.downstream.tuning.predictor import kind_of
from bert_ds.downstream.tuning.scorers import Scorer, make_scorer, scores_by_length
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.encoder.hf_folder import read_json, write_json
from bert_ds.encoder.hf_onnx import ONNX_FILE, quantise, write_onnx
from bert_ds.encoder.pretrained import check_tokenizer


class Int8Check(NamedTuple):
    """A metric on the validation rows, and the size of the file, before and after."""

    metric: str
    fp32: float
    int8: float
    num_rows: int
    fp32_bytes: int
    int8_bytes: int


def write_int8(model: Path, folder: Path, task: TaskConfig, *, say: Callable[[str], None]) -> Int8Check:
    """Write the ONNX form of a fine-tuned folder, with int8 matrices, into an existing folder.

    Args:
        model: the fine-tuned folder.
        folder: where to; see `replaced_export`.
        task: that the folder was fine-tuned on; its validation rows are answered by both files.
        say: takes what is worth telling of the rows.

    Raises:
        ConfigError: the folder is of another kind of task, or a package of the extra "onnx" is missing.
        CheckpointError: the folder is damaged.
        DataError: a row is not as the task says.
    """
    if (kind := kind_of(model)) != task.kind:
        raise ConfigError(
            f"{model} was fine-tuned for {kind}, the task {task.name} is {task.kind}: wanted its own task"
        )
    write_onnx(model, folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(folder, **tokenizer.identity)
    scorer = make_scorer(folder, kind)
    rows = read_task(task, tokenizer, labels=scorer.labels, say=say)
    fp32, fp32_bytes = _metric(scorer, task, rows), (folder / ONNX_FILE).stat().st_size
    quantise(folder / ONNX_FILE)
    int8 = _metric(make_scorer(folder, kind), task, rows)
    sizes = fp32_bytes, (folder / ONNX_FILE).stat().st_size
    check = Int8Check(task.chosen_metric, fp32, int8, len(rows.validation.examples), *sizes)
    facts = {"file": ONNX_FILE, "matrices": "int8", "task": task.name, **check._asdict()}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "onnx": facts})
    return check


def _metric(scorer: Scorer, task: TaskConfig, rows: TaskRows) -> float:
    """Return the task's metric on the validation rows."""
    kind, side = KINDS[task.kind], rows.validation
    found = dict(scores_by_length(scorer, side.features, batch_size=task.evaluation.batch_size))
    summaries = [kind.summarise(feature, found[place]) for place, feature in enumerate(side.features)]
    predictions = kind.predict(side.examples, side.features, summaries, rows.labels)
    return labelled_figures(task, side, predictions, rows.labels, rows=range(len(predictions)))[task.chosen_metric]
