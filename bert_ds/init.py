"""Write a recipe of one's own for a corpus of shards, a machine and a time, and say why it is as it is.

    bert-ds init my_run.json --corpus shards/ --minutes 30
    bert-ds init my_run.json --corpus shards/ --hours 24 --gpu H100 --world_size 8
    bert-ds init my_run.json --corpus shards/ --from bert_base_phase1 --minutes 600
    bert-ds init my_run.json --corpus shards/ --like some/hf/folder

Without --gpu the cores here are measured for a second. Exit codes: 0 done, 2 configuration, 3 data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.basics.ranks import DataError
from bert_ds.basics.whole_files import write_text
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.model_folder import folder_model, has_pair_head
from bert_ds.configuration.reading.config_files import ConfigError, shipped_file
from bert_ds.configuration.recipe.precision import computed_in
from bert_ds.configuration.recipe.run_config import RunConfig, load_run_config
from bert_ds.configuration.run_choice import (
    CPU_SHARES,
    Choice,
    Measure,
    choose,
    enough_tokens,
    on_card,
    on_cpu,
    useful_tokens,
)
from bert_ds.configuration.run_plan import epoch_warnings, make_plan
from bert_ds.configuration.run_speed import CARDS
from bert_ds.corpus.shards.shard_folder import MANIFEST, TOKENIZER_FOLDER, read_manifest
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer, load_tokenizer_for
from bert_ds.launch.command_line import run_main
from bert_ds.launch.verb_arguments import init_arguments


def main() -> None:
    args = init_arguments()
    minutes = 60 * args.hours if args.hours is not None else args.minutes
    ds = load_ds_config("zero1")
    choice = choose(
        given_sections(args),
        ds,
        minutes=minutes,
        measure=on_card(CARDS[args.gpu]) if args.gpu else cpu_measure(),
        world_size=args.world_size,
    )
    load_tokenizer_for(choice.plan.run.model, Path(choice.recipe["corpus"]["tokenizer"]))
    write_recipe(args.output, choice)
    warnings = make_plan(load_run_config(args.output), ds, args.world_size).warnings
    for name, text in told(args, choice):
        print(f"{name:<9} {text}")
    for warning in (*warnings, *epoch_warnings(choice.epochs or 1.0)):
        print(f"warning: {warning}", file=sys.stderr)


def given_sections(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sections of the recipe that are not chosen: corpus and vocabulary, and those of --from or --like."""
    shards = Path(args.corpus)
    if not (shards / MANIFEST).is_file():
        raise DataError(
            f"--corpus {shards} holds no {MANIFEST} of a finished build: bert-ds build_shards makes shards of text"
        )
    manifest, folder = read_manifest(shards), Path(args.tokenizer or shards / TOKENIZER_FOLDER)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(f"--tokenizer {folder} is not the one that {shards} was built with")
    sections = _of_folder(args.like) if args.like is not None else _of_recipe(args.base) if args.base else {}
    source, parts = {"path": str(shards.absolute())}, str(folder.absolute())
    return {
        "$schema": str(shipped_file("schema.json")),
        "format": 1,
        "name": args.output.stem,
        "seed": 1,
        **sections,
        "model": {**sections.get("model", {}), "vocab_size": tokenizer.vocab_size},
        "corpus": {"type": "shards", "sources": [source], "tokenizer": parts},
        # On a CPU code is made and kept for every shape of a bf16 product.
        "training": {**sections.get("training", {}), "few_shapes": not args.gpu},
    }


def _of_recipe(name: str) -> dict[str, Any]:
    """Return the sections of a recipe but those that say where it was to be trained and for how long."""
    try:
        run = load_run_config(shipped_file(f"recipes/{name}_phase1.json"))
    except ConfigError:
        run = load_run_config(name)
    content = run.model_dump(mode="json", by_alias=True, exclude={"schema_", "name", "corpus"}, exclude_none=True)
    if run.schedule.warmup_steps is not None and run.training.total_steps is not None:
        del content["schedule"]["warmup_steps"]
        content["schedule"]["warmup_fraction"] = round(run.schedule.warmup_steps / run.training.total_steps, 4)
    content["training"].pop("max_minutes", None)
    return content


def _of_folder(folder: Path) -> dict[str, Any]:
    """Return the shape of a Hugging Face folder, and the pairs that its weights have a head for."""
    shape = folder_model(folder)
    if shape is None:
        raise ConfigError(f"--like {folder}: config.json does not hold the sizes of an encoder")
    content = {"model": shape.model_dump(mode="json", exclude_none=True)}
    if shape.num_segments and has_pair_head(folder):
        content["sequences"] = {"sentence_pair": "nsp", "cross_documents": False, "short_seq_prob": 0.1}
    return content


def cpu_measure() -> Measure:
    """Return what predicts the speed on the cores here; a matrix product is timed at most once for each width."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it is the cores that are measured
    from bert_ds.training.launch.launch_precision import faster_precision, gemm_rates  # torch takes seconds

    rates: dict[int, float] = {}

    def rate(run: RunConfig) -> float:
        width = run.model.hidden_size
        if width not in rates:
            found = gemm_rates(run.model)
            is_bf16 = computed_in(run, where_auto=faster_precision(found)) == "bf16"
            rates[width] = CPU_SHARES["bf16"] * found.bf16 if is_bf16 else CPU_SHARES["fp32"] * found.fp32
        return rates[width]

    return on_cpu(rate)


def write_recipe(path: Path, choice: Choice) -> None:
    """Write the recipe, with the paths of the corpus as seen from its folder."""
    corpus, base = dict(choice.recipe["corpus"]), path.absolute().parent
    corpus["sources"] = [{"path": os.path.relpath(source["path"], base)} for source in corpus["sources"]]
    corpus["tokenizer"] = os.path.relpath(corpus["tokenizer"], base)
    try:
        write_text(path, json.dumps({**choice.recipe, "corpus": corpus}, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def told(args: argparse.Namespace, choice: Choice) -> list[tuple[str, str]]:
    """Return what was chosen and why, and what comes next, as rows of name and text."""
    run, model = choice.plan.run, choice.plan.run.model
    seen = useful_tokens(choice) / choice.weights
    why = f"{seen:.1f} tokens for each in the time, {enough_tokens(choice):.1f} are enough"
    if args.like or args.base:
        why = f"as {args.like or args.base}"
    where = f"{args.world_size} {args.gpu}, counted from data sheets" if args.gpu else "the cores here, measured"
    speed = f"about {choice.plan.max_tokens_per_step / choice.speed.step_s:,.0f} tokens/s ({where})"
    epochs = f", {choice.epochs:,.1f} epochs of the corpus" if choice.epochs is not None else ""
    pair = run.sequences.sentence_pair
    heads = "no head for pairs is trained" if pair == "none" else f"as {args.like or args.base} has a head for them"
    return [
        ("recipe", f"{args.output}: {model.family} under {run.optimizer.type}, rate {run.optimizer.lr:g}"),
        ("size", f"{model.num_hidden_layers} layers of {model.hidden_size}, {choice.weights:,} weights in them; {why}"),
        ("batch", f"{run.training.train_batch_size:,} x {run.max_seq_length} tokens; about {choice.num_steps:,} steps"),
        ("pairs", f"{pair}: {heads}"),
        ("time", f"{run.training.max_minutes:g} minutes at {speed}: {choice.tokens:,} tokens{epochs}"),
        ("next", f"bert-ds pretrain --run {args.output} --run_dir runs/{run.name}"),
    ]


if __name__ == "__main__":
    run_main(main)
