"""Pre-train an encoder under DeepSpeed: recipe, corpus, model, engine, loop.

    deepspeed bert_ds/pretrain.py --deepspeed_config ds_configs/zero2.json
    deepspeed bert_ds/pretrain.py --run recipe.json --deepspeed_config ds_configs/zero2.json --run_dir runs/mine

Without --run the embedded default is trained. The recipe says what is trained, the DeepSpeed file how it is spread.
Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 diverged, 75 stopped on request, run me again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# First of all: a rank may end in the imports below, and the others would wait for it.
from bert_ds.launch.start_watch import watch_start

if __name__ == "__main__":
    watch_start()

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.launch_checks import checked_run
from bert_ds.launch.verb_arguments import pretrain_arguments

if __name__ == "__main__":
    answer_early(lambda: checked_run(pretrain_arguments()))

from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import EXIT_DONE, EXIT_RUN_AGAIN, Ranks, read_ranks
from bert_ds.configuration.deepspeed_file.ds_config import resolve_ds_config
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.precision import decided, with_precision
from bert_ds.configuration.recipe.run_config import RunConfig, dump_run_config
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.corpus.batches.batch_stages import data_settings
from bert_ds.corpus.batches.loader import PretrainingData
from bert_ds.corpus.batches.plan_batches import (
    corpus_of,
    evaluated_batches,
    held_out_batches,
    longest_batches,
    source_facts,
    training_batches,
)
from bert_ds.corpus.shards.embedded import build_embedded
from bert_ds.corpus.shards.shard_folder import MANIFEST
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer, load_tokenizer_for
from bert_ds.corpus.tokenizer.word_vectors import read_word_vectors
from bert_ds.encoder.compiled_layers import compile_layers
from bert_ds.encoder.distillation import make_student
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.fused_ops import kernels_for
from bert_ds.encoder.initial_weights import load_initial_weights, start_at_unigram, start_at_vectors
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretrained import check_tokenizer
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.checkpoints.checkpoint_loader import roll_back
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.fp32_weights import newest_fp32_weights
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.launch.hang_watchdog import collective_timeout
from bert_ds.training.launch.launch_precision import decide_precision
from bert_ds.training.launch.node_facts import needs_of
from bert_ds.training.launch.preflight import preflight
from bert_ds.training.launch.process_group import device_name, joined_ranks
from bert_ds.training.launch.restart import StopRequest, follow_launcher, mark_done
from bert_ds.training.launch.run_folder import prove_same_files, refuse_foreign_folders, write_tokenizer
from bert_ds.training.loop.evaluation import Evaluation, evaluate_sources
from bert_ds.training.loop.launch_steps import LaunchFolder, enter, recipe_loop, start_state, train_watched
from bert_ds.training.loop.rank_times import RankTimes
from bert_ds.training.loop.replay import replay_step
from bert_ds.training.loop.stage_changes import StageChanges
from bert_ds.training.loop.step_budget import with_total_steps
from bert_ds.training.loop.throughput import Throughput, peak_flops
from bert_ds.training.loop.train_loop import Services
from bert_ds.training.loop.trial_step import settle_micro_batch, try_longest
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts


def main() -> int:
    args = pretrain_arguments()
    run, ds = checked_run(args)
    ranks = read_ranks()
    plan = make_plan(run, ds, ranks.world_size)
    stop = StopRequest()
    stop.install(speaks=ranks.is_main)
    follow_launcher(stop)

    def look() -> None:
        refuse_foreign_folders([args.run_dir])  # before anything is tried in it
        preflight(args.run_dir, ranks, when=args.preflight, needs=needs_of(plan, args.run_dir))

    timeout = collective_timeout(args.hang_limit)
    with joined_ranks(ranks, timeout=timeout, start_limit_s=args.start_limit, first=look):
        return pretrain(plan, ranks, args=args, stop=stop)


def pretrain(plan: RunPlan, ranks: Ranks, *, args: argparse.Namespace, stop: StopRequest) -> int:
    """Run folder, corpus, engine, loop; a collective. Returns the exit code."""
    opened = open_run(plan, ranks, args=args)
    plan, engine, data, log, facts = opened.plan, opened.engine, opened.data, opened.log, opened.facts
    if args.dry_run or args.find_micro_batch:
        try_longest(engine, longest_batches(plan, data), split=plan.split, log=log, search=args.find_micro_batch)
        return EXIT_DONE
    if args.replay_step is not None:
        replay_step(engine, args.replay_step, batch=opened.batch_at, seed=plan.run.seed, facts=facts, log=log)
        return EXIT_DONE
    state = start_state(engine, opened.folder, facts=facts, log=log)
    log.start(state.step, announce(plan, data, log=log))
    stages = follow_stages(plan, data, engine, log=log)
    services = make_services(opened, state, stages, stop=stop)
    batches = opened.batches_from(state.step + state.passed_over, stages)
    loop = recipe_loop(plan.run, stages.starts)
    train_watched(engine, batches, state=state, loop=loop, services=services, limit_s=args.hang_limit)
    if state.step < plan.run.training.steps:
        return EXIT_RUN_AGAIN
    on_main_rank(lambda: mark_done(args.run_dir, {"step": state.step}))
    log.close()
    return EXIT_DONE


@dataclass(frozen=True)
class OpenedRun:
    """A run whose folder, corpus and engine are there."""

    plan: RunPlan
    ranks: Ranks
    folder: LaunchFolder
    log: RunLog
    data: PretrainingData
    engine: DeepSpeedEngine

    @property
    def facts(self) -> dict[str, str]:
        """What a checkpoint has to have been made with."""
        return {**self.plan.run.form(), "data": self.data.fingerprint}

    def batch_at(self, place: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of a place in the order of the data, counted from 0."""
        return next(training_batches(self.plan, self.data, self.ranks, start=place))

    def batches_from(self, place: int, stages: StageChanges) -> Iterator[list[MicroBatch]]:
        """Yield those of every place from this one on, with what changes between stages."""
        return stages.follow(training_batches(self.plan, self.data, self.ranks, start=place), place)


def open_run(plan: RunPlan, ranks: Ranks, *, args: argparse.Namespace) -> OpenedRun:
    """Decide precision and steps, enter the run folder, open the corpus and build the engine; a collective."""
    run_dir = args.run_dir
    earlier = [] if args.resume == "never" else [run_dir]
    decision = decide_precision(plan.run.training.precision, plan.run.model, earlier=earlier)
    run = with_precision(plan.run, decision.precision)
    plan = make_plan(run, plan.ds, ranks.world_size)
    ds_config = resolve_ds_config(run, plan.ds, ranks.world_size, run_dir=str(run_dir))
    folder = LaunchFolder(run_dir, descriptions(run, ds_config), args.resume)
    log = enter(folder, ranks, total_steps=run.training.total_steps or 0, decision=decision)
    data = open_corpus(plan, run_dir, log=log)
    plan = settle_micro_batch(plan, data.mean_lengths(), log=log)
    ds_config = resolve_ds_config(run, plan.ds, ranks.world_size, run_dir=str(run_dir))
    folder = folder._replace(descriptions=descriptions(run, ds_config))
    if run.training.total_steps is None and not (args.dry_run or args.find_micro_batch):
        plan = with_total_steps(
            plan,
            lambda: build_engine(plan, data, ds_config, log=log),
            batches=lambda place: training_batches(plan, data, ranks, start=place),
            held_out=lambda: held_out_batches(run, data, ranks),
            run_dir=run_dir,
            log=log,
        )
        folder = folder._replace(descriptions=descriptions(plan.run, ds_config))
        data = open_corpus(plan, run_dir, log=log) if run.stages else data  # now that it is known where stages begin
    return OpenedRun(plan, ranks, folder, log, data, build_engine(plan, data, ds_config, log=log))


def make_services(opened: OpenedRun, state: TrainState, stages: StageChanges, *, stop: StopRequest) -> Services:
    """Return what surrounds the loop of a run."""
    engine, run, data, ranks, log = opened.engine, opened.plan.run, opened.data, opened.ranks, opened.log
    policy = CheckpointPolicy(
        keep_last=run.checkpoints.keep_last,
        keep_every_steps=run.checkpoints.keep_every_steps,
        facts=opened.facts,
        asynchronous=run.checkpoints.asynchronous,
    )
    saver = CheckpointSaver(engine, opened.folder.path, policy=policy, log=log)

    def go_back(at: TrainState) -> Iterator[list[MicroBatch]] | None:
        went = roll_back(engine, opened.folder.path, state=at, facts=policy.facts, log=log)
        return opened.batches_from(at.step + at.passed_over, stages) if went else None

    return Services(
        log=log,
        stop=stop,
        throughput=stages.throughput,
        save=saver.save,
        settle=saver.settle if policy.asynchronous else None,
        evaluate=lambda reached: Evaluation(evaluate_sources(engine, evaluated_batches(run, data, ranks))),
        row_facts=lambda step: stages.row(place := step + state.passed_over - 1) | source_facts(data, place),
        roll_back=go_back,
        rank_times=RankTimes(engine.module) if ranks.world_size > 1 else None,
    )


def descriptions(run: RunConfig, ds_config: dict[str, Any]) -> dict[str, str]:
    """Return the files that describe a run, name to text."""
    return {"run_config.json": dump_run_config(run), "ds_config.json": json.dumps(ds_config, indent=2) + "\n"}


def open_corpus(plan: RunPlan, run_dir: Path, *, log: RunLog) -> PretrainingData:
    """Open the shards, building the embedded ones first where the recipe asks for them; a collective."""
    run = plan.run
    if run.corpus.type == "embedded":
        config, parent = run.corpus, run_dir.parent
        on_main_rank(lambda: build_embedded(config, parent, say=log.info) and None)
    tokenizer, sources = corpus_of(run, run_dir.parent)
    prove_same_files([source.folder / MANIFEST for source in sources])
    on_main_rank(lambda: write_tokenizer(run_dir, load_tokenizer_for(run.model, tokenizer).save))
    settings = data_settings(run, plan.stages)
    return PretrainingData(sources, tokenizer, settings=settings, cache_dir=run_dir / "examples")


def build_engine(plan: RunPlan, data: PretrainingData, ds_config: dict[str, Any], *, log: RunLog) -> DeepSpeedEngine:
    """Make model and optimizer and hand them to DeepSpeed; a collective. A checkpoint replaces the weights later."""
    run = plan.run
    model = build_model(plan, log.run_dir)
    if run.init_from is not None:
        load_initial_weights(model, Path(run.init_from), read_run=newest_fp32_weights)
    if run.word_vectors is not None:
        path, tokenizer = Path(run.word_vectors), load_tokenizer(log.run_dir / "tokenizer")
        found = read_word_vectors(path, tokenizer, width=run.model.embedding_width)
        start_at_vectors(model, found.ids, found.vectors)
        log.info(found.text)
    if run.output_bias == "log_unigram":
        start_at_unigram(model, data.piece_counts)
    optimizer = make_optimizer(
        run.optimizer,
        model.named_parameters(),
        facts=TensorFacts(*weight_patterns(model.config)),
        kernels=run.training.kernels,
        precision=decided(run.training.precision),
    )
    return make_engine(model, optimizer, ds_config)


def build_model(plan: RunPlan, run_dir: Path) -> PretrainingModel:
    """Make the model, with its teacher where the recipe names one."""
    run, distillation = plan.run, plan.run.distillation
    options: dict[str, Any] = {
        "kernels": kernels_for(run.training.kernels, on_cuda=get_accelerator().device_name() == "cuda"),
        "objectives": make_objectives(run.objective_weights, generator=run.generator),
        "activation_checkpointing": plan.ds.activation_checkpointing,
        **{"init_seed": run.seed, **run.training.left_out},
    }
    if distillation is None:
        model = PretrainingModel(run.model, **options)
    else:
        tokenizer, teacher = load_tokenizer(run_dir / "tokenizer"), Path(distillation.teacher)
        check_tokenizer(teacher, vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint)
        model = make_student(run.model, distillation, **options)
    if run.training.compile:
        compile_layers((layer for one in model.encoders() for layer in one.layer), kernels=options["kernels"])
    return model


def announce(plan: RunPlan, data: PretrainingData, *, log: RunLog) -> dict[str, Any]:
    """Log the derived numbers, the warnings and the facts of the data; return them for the start row."""
    settings = plan.run.evaluation
    evaluated: dict[str, Any] = {"batch_size": settings.batch_size, "world_size": plan.world_size}
    data.evaluation_batches(settings.num_examples, rank=0, **evaluated)  # too few of them are refused on every rank
    unigram = data.unigram_cross_entropy(settings.num_examples, **evaluated) if log.is_main else None
    data_facts = {**data.facts(num_parts=plan.split.num_parts), "unigram_cross_entropy": unigram}
    for name, text in [*plan_table(plan), *((name, str(value)) for name, value in data_facts.items())]:
        log.info(f"{name:>28}: {text}")
    for warning in plan.warnings:
        log.warning(f"warning: {warning}")
    return {"plan": dict(plan_table(plan)), "data": data_facts, "warnings": list(plan.warnings)}


def follow_stages(plan: RunPlan, data: PretrainingData, engine: DeepSpeedEngine, *, log: RunLog) -> StageChanges:
    """Return what tells engine, log and the meter of tokens/s and MFU of the run's stages."""
    peak = peak_flops(device_name(), decided(plan.run.training.precision))
    flops = [
        plan.flops_per_token(length, stage.run) for stage, length in zip(plan.stages, data.mean_lengths(), strict=True)
    ]
    meter = Throughput(world_size=plan.world_size, peak_flops_per_rank=peak)
    return StageChanges(plan.stages, flops, engine=engine, throughput=meter, log=log)


if __name__ == "__main__":
    run_main(main, leave_at_once=True)
