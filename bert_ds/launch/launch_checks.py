"""What of a verb that trains or scores can be refused without torch: its words, its files, and the files they name.

`bert-ds` asks before it starts the DeepSpeed launcher, so that a typo is answered in about a second, and every rank
asks again, so that the same sentence comes whatever has started it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from bert_ds.configuration.deepspeed_file.ds_agreement import settled
from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, load_ds_config, load_pair, pair_problems
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.model_folder import folder_model, folder_problem
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig
from bert_ds.configuration.run_plan import require_files
from bert_ds.configuration.task.task_config import TaskConfig, load_task, trained_task
from bert_ds.configuration.task.task_data_config import SIDES
from bert_ds.configuration.task.task_kinds import KIND_FACTS
from bert_ds.folders.output_folders import (
    WANTED_RESULTS,
    WANTED_RUN,
    foreign_in_results,
    foreign_in_run,
    refuse_foreign,
)
from bert_ds.launch.verb_arguments import Words, finetune_arguments, pretrain_arguments, score_arguments


def checked_run(args: argparse.Namespace) -> tuple[RunConfig, DsConfig]:
    """Return the two files of a pre-training, after all checks that hold for any number of ranks.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    run, ds = load_pair(args.run, args.deepspeed_config, overrides=args.set)
    require_files(run, ds)
    return run, ds


def checked_task(args: argparse.Namespace) -> tuple[TaskConfig, DsConfig]:
    """Return the two files of a fine-tuning, after the checks that need neither the model's weights nor the rows.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    messages, ds = [], None
    try:
        ds = replace(load_ds_config(args.deepspeed_config), recipe_name=str(args.task))
    except ConfigError as error:
        messages.append(str(error))
    task, problems = _read_task(args)
    messages += problems
    if task is not None and not KIND_FACTS[task.kind].is_trained:
        messages.append(f"{args.task}: a {task.kind} task has nothing to train: score.py scores a folder on it")
    elif task is not None and ds is not None:
        task = settled(task, ds.settings)
        messages += [problem.line(ds.name) for problem in _disagreements(task, ds, folder_model(args.model))]
    _raise(messages)
    assert task is not None and ds is not None, "no problem was found and a file was not loaded"
    return task, ds


def checked_scoring(args: argparse.Namespace) -> TaskConfig:
    """Return the task of a command line whose model and data files are there.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    task, messages = _read_task(args)
    if args.task == "masked_words" and args.data is None:
        messages.append("--data: is missing, wanted the text, or the shards, that the model is to be scored on")
    _raise(messages)
    assert task is not None, "no problem was found and no task was loaded"
    return task


def task_folders(args: argparse.Namespace, task: TaskConfig) -> tuple[Path, dict[int, Path]]:
    """Return the run folder of a fine-tuning, and the folder in it of each of several seeds.

    That of a trial lies below the folder of its search.
    """
    run_dir: Path = (args.run_dir or Path("runs") / task.name).absolute()
    run_dir /= "" if args.trial is None else args.trials[args.trial].folder
    return run_dir, {seed: run_dir / f"seed_{seed}" for seed in args.seeds or ()}


def _check_pretrain(words: Words) -> Path | None:
    args = pretrain_arguments(words)
    checked_run(args)
    _refuse_foreign_runs([args.run_dir])
    return args.run_dir


def _check_finetune(words: Words) -> Path | None:
    args = finetune_arguments(words)
    run_dir, seeds = task_folders(args, checked_task(args)[0])
    _refuse_foreign_runs([*seeds.values(), run_dir])
    return run_dir


def _check_score(words: Words) -> Path | None:
    args = score_arguments(words)
    checked_scoring(args)
    if args.output is not None:
        refuse_foreign(args.output, foreign_in_results, wanted=WANTED_RESULTS)
    return None


CHECKS: dict[str, Callable[[Words], Path | None]] = {
    "pretrain": _check_pretrain,
    "finetune": _check_finetune,
    "score": _check_score,
}
"""Verb -> what refuses its command line, and the folder that it would write into; returns the run folder of a run."""


def _refuse_foreign_runs(run_dirs: Iterable[Path]) -> None:
    for run_dir in run_dirs:
        refuse_foreign(run_dir, foreign_in_run, wanted=WANTED_RUN)


def _read_task(args: argparse.Namespace) -> tuple[TaskConfig | None, list[str]]:
    """Return the task, where it can be read, and what is wrong with it and with the files that the words name."""
    task, messages = None, []
    try:
        task = load_task(args.task, args.set, data=args.data)
        messages += [problem.line(str(args.task)) for problem in _missing_files(task)]
    except ConfigError as error:
        messages.append(str(error))
    if (text := folder_problem(args.model)) is not None:
        messages.append(f"--model {args.model}{text}")
    return task, messages


def _raise(messages: Sequence[str]) -> None:
    if messages:
        raise ConfigError("\n".join(messages))


def _disagreements(task: TaskConfig, ds: DsConfig, model: EncoderConfig | None) -> list[Problem]:
    """Return what the DeepSpeed file says against the task and its model, as far as the rows do not matter.

    A folder whose config.json does not describe a model is asked by the ranks: till then nothing that depends on it is.
    """
    later = ("scheduler",) if model else ("scheduler", "vocabulary_size", "activation_checkpointing")
    plan = trained_task(task, model or BertConfig(), num_sequences=1)
    return [problem for problem in pair_problems(plan, ds) if not problem.path.startswith(later)]


def _missing_files(task: TaskConfig) -> Iterable[Problem]:
    for side in SIDES:
        for index, file in enumerate(getattr(task.data, side)):
            if not Path(file.path).exists():
                text = f"{file.path} does not exist; --data names the folder that data files are in"
                yield Problem(f"data.{side}.{index}.path", text)
    teacher = task.distillation.teacher if task.distillation is not None else None
    if teacher is not None and not Path(teacher).exists():
        yield Problem("distillation.teacher", f"{teacher} does not exist")
