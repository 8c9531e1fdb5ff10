"""Fine-tune a pre-trained encoder under DeepSpeed: rows, model, engine, loop, predictions, Hugging Face folder.

    deepspeed bert_ds/finetune.py --task sst2 --data DATA --model DIR --deepspeed_config ds_configs/zero1.json
    deepspeed bert_ds/finetune.py --task mine.json --model DIR --deepspeed_config ds_configs/zero1.json --seeds 1 2 3
    python bert_ds/finetune.py --task mine.json --model DIR --search space.json --run_dir runs/search

The task file says what is trained, the DeepSpeed file how it is spread. The step with the best metric on the validation
rows is what is predicted with and exported.
Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 75 stopped on request, run me again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# First of all: a rank may end in the imports below, and the others would wait for it.
from bert_ds.launch.start_watch import watch_start

if __name__ == "__main__":
    watch_start()

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.launch_checks import checked_task, task_folders
from bert_ds.launch.search import check_or_search
from bert_ds.launch.verb_arguments import finetune_arguments
from bert_ds.reporting.search_page import show_search

if __name__ == "__main__":
    answer_early(lambda: check_or_search(finetune_arguments(), show=show_search))

# Nothing here may reach for the network; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import EXIT_DONE, EXIT_RUN_AGAIN, Ranks, read_ranks
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, resolve_ds_config
from bert_ds.configuration.recipe.precision import decided, with_precision
from bert_ds.configuration.task.task_checks import checked_split
from bert_ds.configuration.task.task_config import TaskConfig, TrainedTask, dump_task, trained_task
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.trivial import trivial_figures
from bert_ds.downstream.rows.task_batches import features_fingerprint, step_batches
from bert_ds.downstream.scores.metrics import require_metrics
from bert_ds.downstream.tuning.outcome import Outcome, conclude, write_summary
from bert_ds.downstream.tuning.task_engine import EvaluationHistory, build_model
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.downstream.tuning.taught_model import load_teacher
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretrained import Pretrained, check_tokenizer, load_pretrained
from bert_ds.folders.output_folders import open_run_folder
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import LoopSettings, TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.launch.hang_watchdog import collective_timeout
from bert_ds.training.launch.launch_precision import Decision, decide_precision
from bert_ds.training.launch.preflight import preflight
from bert_ds.training.launch.process_group import joined_ranks
from bert_ds.training.launch.restart import StopRequest, follow_launcher, is_done, mark_done
from bert_ds.training.launch.run_folder import prove_same_files, refuse_foreign_folders, write_tokenizer
from bert_ds.training.loop.launch_steps import LaunchFolder, enter, start_state, train_watched
from bert_ds.training.loop.throughput import Throughput
from bert_ds.training.loop.train_loop import Services
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts


@dataclass(frozen=True)
class Start:
    """What all seeds of a task share."""

    ds: DsConfig
    pretrained: Pretrained
    tokenizer: TextTokenizer
    rows: TaskRows
    ranks: Ranks
    stop: StopRequest
    args: argparse.Namespace
    trivial: dict[str, float] | None
    decision: Decision


def main() -> int:
    args = finetune_arguments()
    task, ds = checked_task(args)
    require_metrics()
    run_dir, folders = task_folders(args, task)
    ranks = read_ranks()
    stop = StopRequest()
    stop.install(speaks=ranks.is_main)
    follow_launcher(stop)
    run_dirs = list(folders.values()) or [run_dir]

    def look() -> None:
        refuse_foreign_folders(run_dirs, export="hf")  # before anything is tried in them
        refuse_foreign_folders([run_dir])
        preflight(run_dir, ranks, when=args.preflight)

    timeout = collective_timeout(args.hang_limit)
    with joined_ranks(ranks, timeout=timeout, start_limit_s=args.start_limit, first=look):
        start = open_task(task, ds, args=args, ranks=ranks, stop=stop, run_dirs=run_dirs)
        task = with_precision(task, start.decision.precision)
        if not folders:
            return finetune(task, run_dir, start=start)
        on_main_rank(lambda: open_run_folder(run_dir))
        done = on_main_rank(lambda: [seed for seed, folder in folders.items() if is_done(folder)])
        for seed, folder in folders.items():
            if args.resume != "never" and seed in done:
                continue
            code = finetune(task.model_copy(update={"seed": seed}), folder, start=start)
            if code != EXIT_DONE:
                return code
        on_main_rank(lambda: write_summary(run_dir, list(folders.values())))
    return EXIT_DONE


def open_task(
    task: TaskConfig, ds: DsConfig, *, args: argparse.Namespace, ranks: Ranks, stop: StopRequest, run_dirs: list[Path]
) -> Start:
    """Read model, tokenizer and rows, and decide the precision of all seeds; a collective."""
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(args.model, **tokenizer.identity)
    pretrained = load_pretrained(args.model)
    prove_same_files([Path(file.path) for file in (*task.data.train, *task.data.validation, *task.data.test)])
    rows = read_task(task, tokenizer, say=print if ranks.is_main else lambda text: None)
    if args.search is not None:
        rows = rows._replace(test=None)  # read all the same: training rows that are among them have been left out
    trivial = None
    if args.trivial:
        sides = rows.train.examples, rows.validation.examples
        trivial = on_main_rank(lambda: trivial_figures(KINDS[task.kind], *sides, rows.labels))
    earlier = [] if args.resume == "never" else run_dirs
    decision = decide_precision(task.training.precision, pretrained.config, earlier=earlier)
    return Start(ds, pretrained, tokenizer, rows, ranks, stop, args, trivial, decision)


def finetune(task: TaskConfig, run_dir: Path, *, start: Start) -> int:
    """Run folder, engine, loop and outcome of one seed; a collective. Returns the exit code."""
    ranks, rows = start.ranks, start.rows
    trained = trained_task(task, start.pretrained.config, num_sequences=len(rows.train.features))
    split = checked_split(trained, start.ds, ranks.world_size)
    model = trained.model.with_dropout(task.dropout, classifier=task.classifier_dropout)
    trained = replace(trained, model=model)
    ds_config = resolve_ds_config(trained, start.ds, ranks.world_size, run_dir=str(run_dir))
    folder = LaunchFolder(run_dir, described(task, ds_config), start.args.resume)
    log = enter(folder, ranks, total_steps=trained.training.steps, decision=start.decision)
    on_main_rank(lambda: write_tokenizer(run_dir, start.tokenizer.save))
    state, best = run_training(trained, ds_config, folder, split=split, start=start, log=log)
    if state.step < trained.training.steps and not best.is_exhausted:
        return EXIT_RUN_AGAIN
    outcome = Outcome(task, rows, start.tokenizer, run_dir, start.pretrained.config, start.trivial)
    conclude(outcome, best.step, log=log)
    on_main_rank(lambda: mark_done(run_dir, {"step": state.step, "best_step": best.step}))
    log.close()
    return EXIT_DONE


def described(task: TaskConfig, ds_config: dict[str, Any]) -> dict[str, str]:
    """Return the files that describe a run: name to text."""
    return {"task_config.json": dump_task(task), "ds_config.json": json.dumps(ds_config, indent=2) + "\n"}


def run_training(
    trained: TrainedTask,
    ds_config: dict[str, Any],
    folder: LaunchFolder,
    *,
    split: BatchSplit,
    start: Start,
    log: RunLog,
) -> tuple[TrainState, EvaluationHistory]:
    """Build the engine, resume if asked to, and train until the last step or until nothing more is gained."""
    task, rows = trained.task, start.rows
    engine = build_engine(trained, ds_config, start=start, log=log)
    settings = f"{task.seed} {task.training.train_batch_size} {start.tokenizer.fingerprint}"
    facts = {**trained.model.form(), "data": features_fingerprint(rows.train.features, settings=settings)}
    state = start_state(engine, folder, facts=facts, log=log)
    best = EvaluationHistory(engine, task, rows.validation, rows.labels, run_dir=folder.path, from_step=state.step)
    policy = CheckpointPolicy(
        keep_last=task.checkpoints.keep_last,
        keep_every_steps=task.checkpoints.keep_every_steps,
        facts=facts,
        keep_steps=best.kept_steps,
        asynchronous=task.checkpoints.asynchronous,
    )
    saver = CheckpointSaver(engine, folder.path, policy=policy, log=log)
    log.start(state.step, {"training_rows": len(rows.train.examples), "validation_rows": len(rows.validation.examples)})
    services = Services(
        log=log,
        stop=start.stop,
        throughput=Throughput(world_size=start.ranks.world_size),
        save=saver.save,
        settle=saver.settle if policy.asynchronous else None,
        evaluate=best.evaluate,
    )
    batches = training_batches(task, split, start=start, from_step=state.step)
    if not best.is_exhausted:
        loop = loop_settings(trained, len(rows.train.features))
        train_watched(engine, batches, state=state, loop=loop, services=services, limit_s=start.args.hang_limit)
    engine.destroy()
    return state, best


def training_batches(
    task: TaskConfig, split: BatchSplit, *, start: Start, from_step: int
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of every step after from_step."""
    return step_batches(
        start.rows.train.features,
        from_step,
        seed=task.seed,
        rank=start.ranks.rank,
        split=split,
        count_targets=KINDS[task.kind].count_targets,
    )


def build_engine(trained: TrainedTask, ds_config: dict[str, Any], *, start: Start, log: RunLog) -> DeepSpeedEngine:
    """Make model and optimizer and hand them to DeepSpeed; a collective."""
    teacher = None
    if trained.task.distillation is not None:
        teacher = load_teacher(
            trained.task,
            start.rows.labels,
            vocab_size=start.tokenizer.vocab_size,
            fingerprint=start.tokenizer.fingerprint,
        )
    model, lr_scale_of = build_model(
        trained,
        start.rows,
        tensors={} if start.args.random_weights else start.pretrained.tensors,
        teacher=teacher,
        activation_checkpointing=start.ds.activation_checkpointing,
        say=log.info,
    )
    optimizer = make_optimizer(
        trained.optimizer,
        model.named_parameters(),
        facts=TensorFacts(*weight_patterns(model.config)),
        kernels=trained.training.kernels,
        precision=decided(trained.training.precision),
        lr_scale_of=lr_scale_of,
    )
    return make_engine(model, optimizer, ds_config)


def loop_settings(trained: TrainedTask, num_sequences: int) -> LoopSettings:
    """Return what the loop needs of the task."""
    return LoopSettings(
        total_steps=trained.training.steps,
        seed=trained.task.seed,
        peak_lr=trained.optimizer.lr,
        schedule=trained.schedule,
        log_every_steps=trained.training.log_every_steps,
        evaluate_every_steps=trained.every_steps(trained.task.evaluation.every_epochs, num_sequences=num_sequences),
        checkpoint_every_steps=trained.task.checkpoints.every_steps,
        draws=trained.model.drops,
    )


if __name__ == "__main__":
    run_main(main, leave_at_once=True)
