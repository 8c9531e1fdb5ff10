"""What a notebook asks, read-only: `bert_ds.load_history`, `bert_ds.check` and `bert_ds.load_predictor`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.run_plan import make_plan
from bert_ds.reporting.run_history import read_history


class Check(NamedTuple):
    """What can be said of a run before it starts."""

    problems: tuple[str, ...]
    """One sentence each; a run with any of them does not start."""
    warnings: tuple[str, ...]
    numbers: dict[str, str]
    """Name -> text, as `bert-ds check_run` prints them; empty where there are problems."""


def load_history(run_dir: str | Path) -> Any:
    """Return the logged steps and evaluations of a run, finished or being written, in the order of their steps.

    Each row has `step`, `kind` ("train" or "evaluation") and the numbers that were logged. What an earlier attempt
    wrote and a later one has done again is left out.

    Returns:
        A pandas frame where pandas is installed, else a list of objects.

    Raises:
        DataError: it is not the folder of a run, or no step has been logged yet.
    """
    history = read_history(Path(run_dir))
    rows: list[dict[str, Any]] = [
        {"step": step, "kind": "train", **{name: values[place] for name, values in history.columns.items()}}
        for place, step in enumerate(history.numbers)
    ]
    for row in history.evaluations:
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
        rows.append({"step": row["step"], "kind": "evaluation", **numbers})
    rows.sort(key=lambda row: (row["step"], row["kind"] == "evaluation"))
    try:
        import pandas
    except ImportError:
        return rows
    return pandas.DataFrame(rows)


def check(
    recipe: str | Path | None = None,
    deepspeed_config: str | Path = "zero1",
    *,
    world_size: int = 1,
    overrides: Sequence[str] = (),
) -> Check:
    """Return what `bert-ds check_run` says of a recipe and a DeepSpeed file; nothing is raised for what they hold.

    Args:
        recipe: a file, or the name of a shipped one; None is the embedded default.
        deepspeed_config: a file, or the name of a shipped one.
        world_size: number of ranks.
        overrides: "section.name=value" each.
    """
    try:
        plan = make_plan(*load_pair(recipe, deepspeed_config, overrides=overrides), world_size)
    except ConfigError as error:
        return Check(tuple(str(error).splitlines()), (), {})
    return Check((), plan.warnings, dict(plan_table(plan)))


def load_predictor(folder: str | Path) -> Callable[..., list[dict[str, Any]]]:
    """Return a function from rows to answers, `predict(rows, batch_size=32)`, of a fine-tuned folder or an ONNX one.

    A row is a text, a pair of texts, or an object of the fields of its kind; see `bert-ds predict`.

    Raises:
        ConfigError, CheckpointError, DataError: the folder is none, is damaged, or has no head of a task.
    """
    from bert_ds.downstream.tuning.predictor import Predictor  # torch takes seconds

    return Predictor(folder)
