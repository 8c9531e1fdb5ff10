"""The command lines of the verbs that import torch: read before they do, so that a slip is answered at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.model_folder import folder_problem, require_model_folder
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.run_speed import CARDS
from bert_ds.configuration.task.search_space import load_trials
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.launch.command_line import add_launch_options, positive
from bert_ds.launch.hub import NAME, hub_folder
from bert_ds.launch.verbs import verb_parser

Words = Sequence[str] | None
"""A command line without its first word; None is that of this process."""


def init_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of init.py, whose output is not there yet."""
    parser = verb_parser("init")
    parser.add_argument("output", type=Path, metavar="RECIPE", help="file to write, as in my_run.json")
    parser.add_argument("--corpus", type=Path, required=True, metavar="SHARDS", help="folder made by build_shards")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the one in the shard folder")
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--from", dest="base", metavar="RECIPE", help="recipe, or the name of a shipped one, to adapt")
    of.add_argument("--like", type=Path, metavar="DIR", help="Hugging Face folder whose shape is taken")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--minutes", type=positive, default=30.0, help="of training and evaluation (default 30)")
    time.add_argument("--hours", type=positive, help="in place of minutes")
    parser.add_argument("--gpu", choices=CARDS, help="predict for this card (default: the cores here, measured)")
    parser.add_argument("--world_size", type=int, default=1, help="number of ranks (default %(default)s)")
    args = parser.parse_args(words)
    if args.world_size < 1:
        parser.error(f"--world_size: found {args.world_size}, wanted at least 1")
    if args.output.exists():
        raise ConfigError(f"{args.output} is there already, and nothing was touched: wanted a new name")
    args.like = None if args.like is None else hub_folder(args.like, "--like")
    if args.like is not None and (text := folder_problem(args.like)) is not None:
        raise ConfigError(f"--like {args.like}{text}")
    return args


def pretrain_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of pretrain.py."""
    parser = verb_parser("pretrain")
    add_pair_options(parser)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/default"), help="run folder (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one recipe setting")
    parser.add_argument("--init_from", type=Path, help="start from the weights of a run or of a Hugging Face folder")
    add_launch_options(parser)
    parser.add_argument(
        "--replay_step", type=int, metavar="N", help="show what the examples of step N do to the gradients, and end"
    )
    parser.add_argument("--dry_run", action="store_true", help="take one step on the longest batch, print the memory")
    parser.add_argument("--find_micro_batch", action="store_true", help="double the micro-batch until it does not fit")
    args = parser.parse_args(words)
    if args.replay_step is not None:
        args.resume = "must"
    args.run_dir = args.run_dir.absolute()
    args.set += [f"init_from={args.init_from}"] if args.init_from else []
    return args


def finetune_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of finetune.py."""
    parser = verb_parser("finetune")
    _add_task_options(parser, model="Hugging Face folder of a pre-trained encoder, or its name on the hub")
    add_spread_option(parser)
    parser.add_argument("--run_dir", type=Path, help="run folder (default: runs/NAME of the task)")
    parser.add_argument("--seed", type=int, help="seed of this run, instead of the task's")
    parser.add_argument("--seeds", type=int, nargs="+", help="a run for each seed, with mean and deviation at the end")
    parser.add_argument("--trivial", action="store_true", help="measure the trivial method on the same rows too")
    parser.add_argument("--random_weights", action="store_true", help="the same network from random weights")
    parser.add_argument("--search", metavar="SPACE", help="file of settings to try: the best on the validation rows")
    parser.add_argument("--trial", type=int, metavar="N", help="train this trial of the search alone, counted from 0")
    parser.add_argument("--parallel", type=int, metavar="N", help="trials at a time (default: GPUs, or cores / 4)")
    add_launch_options(parser)
    args = parser.parse_args(words)
    args.model = hub_folder(args.model, "--model")
    if args.seed is not None and args.seeds:
        parser.error("--seed and --seeds exclude each other")
    if args.search is None and (args.trial, args.parallel) != (None, None):
        parser.error("--trial and --parallel are of a search: wanted --search beside them")
    if args.parallel is not None and args.parallel < 1:
        parser.error(f"--parallel: found {args.parallel}, wanted at least 1")
    args.set += [] if args.seed is None else [f"seed={args.seed}"]
    _add_search(args)
    return args


def score_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of score.py."""
    parser = verb_parser("score")
    _add_task_options(parser, model="Hugging Face folder")
    parser.add_argument("--side", choices=("train", "validation", "test"), default="validation", help="which rows")
    parser.add_argument("--output", type=Path, help="folder for predictions, figures and results.json")
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    args.model = hub_folder(args.model, "--model")
    return args


def predict_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of predict.py, whose folder and input are there."""
    parser = verb_parser("predict")
    parser.add_argument("--model", type=Path, required=True, help="fine-tuned folder, its onnx/, or a name on the hub")
    parser.add_argument("--input", default="-", metavar="FILE", help=".txt, .jsonl or .csv (default: standard input)")
    parser.add_argument("--output", default="-", metavar="FILE", help=".jsonl or .csv (default: standard output)")
    parser.add_argument("--input_format", choices=("txt", "jsonl", "csv"), help="where the ending does not say it")
    parser.add_argument("--output_format", choices=("jsonl", "csv"), help="where the ending does not say it")
    columns = "fields of a row (text, text_pair, question, context, choices, words, query, passage) by their columns"
    parser.add_argument("--columns", nargs="+", default=[], metavar="FIELD=COLUMN", help=columns)
    parser.add_argument("--batch_size", type=int, default=32, help="rows at a time (default %(default)s)")
    args = parser.parse_args(words)
    if args.batch_size < 1:
        parser.error(f"--batch_size: found {args.batch_size}, wanted at least 1")
    for word in args.columns:
        if "=" not in word:
            parser.error(f"--columns: found {word}, wanted FIELD=COLUMN")
    args.model = _model_folder(args.model)
    if args.input != "-" and not Path(args.input).is_file():
        raise DataError(f"--input {args.input}: there is no such file")
    return args


def probe_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of probe.py, whose folder is there."""
    parser = verb_parser("probe")
    _add_task_options(parser, model="Hugging Face folder")
    parser.add_argument("--max_vectors", type=int, default=10_000, help="per side (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for probes.json and probes.png")
    args = parser.parse_args(words)
    args.model = _model_folder(args.model)
    return args


def show_masks_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of show_masks.py, whose folder is there."""
    parser = verb_parser("show_masks")
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--text", action="append", help="sentence with one [MASK]; may be repeated")
    parser.add_argument("--top_k", type=int, default=5, help="words per sentence")
    args = parser.parse_args(words)
    args.model = _model_folder(args.model)
    return args


def export_hf_arguments(words: Words = None) -> argparse.Namespace:
    """Return the command line of export_hf.py, whose source is there."""
    parser = verb_parser("export_hf")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", type=Path, help="folder of the run")
    source.add_argument("--model", type=Path, help="folder, exported or fine-tuned; wants --onnx or --push_to_hub")
    parser.add_argument("--checkpoint", metavar="global_stepN", help="name of the checkpoint (default: the newest)")
    parser.add_argument("--onnx", action="store_true", help="write an ONNX file and its tokenizer as well")
    parser.add_argument("--int8", action="store_true", help="with int8 matrices; says what they cost the task")
    parser.add_argument("--task", help="of --int8: what MODEL was fine-tuned on (default: that of the run it lies in)")
    parser.add_argument("--data", type=Path, help="of --task: folder of its data files")
    output = "folder to write (default: RUN_DIR/hf, MODEL/onnx or MODEL/onnx_int8)"
    parser.add_argument("--output", type=Path, help=output)
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="export a network of these layers alone, counted from 0"
    )
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="put the folder there, with the token in HF_TOKEN")
    parser.add_argument("--private", action="store_true", help="of --push_to_hub: for yourself and your organisation")
    parser.add_argument("--license", help="of --push_to_hub: as the hub calls it, apache-2.0 for example")
    parser.add_argument("--language", nargs="+", default=[], help="of --push_to_hub: en, zh, ...")
    parser.add_argument("--datasets", nargs="+", default=[], help="of --push_to_hub: names of the data sets on the hub")
    args = parser.parse_args(words)
    if (text := _export_problem(args)) is not None:
        parser.error(text)
    if args.model is not None:
        args.model = _model_folder(args.model)
        args.task = _own_task(args) if args.int8 else None
    elif not args.run_dir.is_dir():
        raise ConfigError(f"{args.run_dir} is not a folder: wanted a run, or a Hugging Face folder")
    return args


def _export_problem(args: argparse.Namespace) -> str | None:
    """Say which options of an export do not go together."""
    is_model, is_pushed = args.model is not None, args.push_to_hub is not None
    if args.layers is not None and (is_model or args.output is None):
        return "--layers makes another network of a run: wanted --run_dir and --output beside it"
    if is_model and (not (args.onnx or is_pushed) or args.checkpoint):
        return "--model is a finished folder: wanted --onnx or --push_to_hub beside it, and no --checkpoint"
    if args.int8 and not (is_model and args.onnx):
        return "--int8 is proven by the metric of a task: wanted --onnx and a fine-tuned --model beside it"
    if not args.int8 and (args.task or args.data):
        return "--task and --data are of --int8: wanted it beside them"
    if not is_pushed and (args.private or args.license or args.language or args.datasets):
        return "--private, --license, --language and --datasets are of --push_to_hub: wanted it beside them"
    if is_pushed and NAME.fullmatch(args.push_to_hub) is None:
        return f"--push_to_hub: found {args.push_to_hub}, wanted OWNER/NAME"
    if is_pushed and not (args.license and args.language):
        return "--push_to_hub: wanted --license and --language beside it, which nothing in the folder says"
    return None


def _model_folder(path: Path) -> Path:
    """Return the folder of a --model, which may be a name of the hub."""
    folder = hub_folder(path, "--model")
    require_model_folder(folder)
    return folder


def _add_search(args: argparse.Namespace) -> None:
    """Put the trials of a search beside the words, and the settings of the one that is asked for among them."""
    args.base_set, args.trials = list(args.set), load_trials(args.search) if args.search is not None else []
    if args.search is None:
        return
    given = {override.partition("=")[0] for override in args.set} | ({"seed"} if args.seeds else set())
    if both := sorted(given & args.trials[0].settings.keys()):
        raise ConfigError(f"{args.search}: settings.{both[0]}: the command line sets it too, wanted one of them")
    if args.trial is not None:
        if not 0 <= args.trial < len(args.trials):
            raise ConfigError(
                f"--trial: found {args.trial}, wanted 0 to {len(args.trials) - 1}: {args.search} has no more"
            )
        args.set += args.trials[args.trial].overrides
        args.resume = "auto" if args.resume == "never" else args.resume


def _own_task(args: argparse.Namespace) -> TaskConfig:
    """Return the task that a folder was fine-tuned on."""
    beside = args.model.absolute().parent / "task_config.json"
    if args.task is None and not beside.is_file():
        raise ConfigError(
            f"--int8: {args.model} does not lie in the run that made it: wanted --task, and --data with it"
        )
    return load_task(args.task or beside, data=args.data)


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Add the two files of a pre-training."""
    parser.add_argument("--run", help="recipe file, or the name of a shipped one (default: the embedded default)")
    add_spread_option(parser)


def add_spread_option(parser: argparse.ArgumentParser) -> None:
    """Add the DeepSpeed file, which has a default."""
    help_text = "DeepSpeed file, or the name of a shipped one (default: %(default)s)"
    parser.add_argument("--deepspeed_config", default="zero1", help=help_text)


def _add_task_options(parser: argparse.ArgumentParser, *, model: str) -> None:
    parser.add_argument("--task", required=True, help="task file, or the name of a shipped task")
    parser.add_argument("--model", type=Path, required=True, help=model)
    parser.add_argument("--data", type=Path, help="folder of the data files (default: that of the task file)")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
