"""Check a run before anything is taken: both files, their agreement, and the numbers that follow from them.

    python bert_ds/check_run.py --run ds_configs/recipes/bert_base_phase1.json --deepspeed_config ds_configs/zero2.json
    python bert_ds/check_run.py --run R.json --deepspeed_config ds_configs/zero1.json --gpu H100
    python bert_ds/check_run.py --task sst2 --data DATA --model DIR --deepspeed_config ds_configs/zero1.json

With --gpu it predicts tokens per second and days on 1, 8, 64 and 512 such cards, and says what bounds a step.
Needs no torch. Exit code 0: the run is valid; 2: every problem of both files is on stderr, one per line; 3: a data file
of a task cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.configuration.auto_batch import with_auto_micro_batch
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.precision import planned_on_gpus
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import make_plan
from bert_ds.configuration.run_speed import CARDS, Card, speed_rows
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.downstream.rows.records import read_records
from bert_ds.launch.command_line import run_main
from bert_ds.launch.launch_checks import checked_task
from bert_ds.launch.task_table import rows_left, task_table
from bert_ds.launch.verb_arguments import add_pair_options
from bert_ds.launch.verbs import verb_parser

MAX_COUNTED_BYTES = 1 << 27
"""Of training files: more is not read to count its rows."""


def main() -> int:
    """Print the derived numbers, or raise ConfigError with every problem."""
    args = _arguments()
    world_size = int(_number("--world_size", args.world_size))
    gpu_memory = int(_number("--gpu_memory_gb", args.gpu_memory_gb) * 1e9) if args.gpu_memory_gb else None
    if args.task is None:
        run, ds = load_pair(args.run, args.deepspeed_config, overrides=args.set)
        run = planned_on_gpus(run) if gpu_memory or args.gpu else run
        plan = make_plan(run, ds, world_size, gpu_memory_bytes=gpu_memory)
        if gpu_memory:  # without the text every sequence counts as full
            plan = with_auto_micro_batch(plan, memory_bytes=gpu_memory)
        predicted = speed_rows(plan, args.gpu, _card(args)) if args.gpu else []
        return show([*plan_table(plan), *predicted], plan.warnings)
    task, ds = checked_task(args)
    task = planned_on_gpus(task) if gpu_memory else task
    num_rows = count_rows(task)
    return show(
        *task_table(task, ds, args.model, world_size=world_size, num_rows=num_rows, gpu_memory_bytes=gpu_memory)
    )


def count_rows(task: TaskConfig) -> int | None:
    """Return about how many rows a task trains on; None where its files are too large to be read for that."""
    files = task.data.train
    if sum(Path(file.path).stat().st_size for file in files) > MAX_COUNTED_BYTES:
        return None
    return rows_left(task, sum(len(read_records(file)) for file in files))


def show(rows: Sequence[tuple[str, str]], warnings: Sequence[str]) -> int:
    """Print the numbers, and the warnings on stderr."""
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _arguments() -> argparse.Namespace:
    parser = verb_parser("check_run")
    add_pair_options(parser)
    parser.add_argument("--task", help="task file, or the name of a shipped task, instead of a recipe")
    parser.add_argument("--model", type=Path, help="with --task: Hugging Face folder of a pre-trained encoder")
    parser.add_argument("--data", type=Path, help="with --task: folder of the data files")
    parser.add_argument("--world_size", default="1", help="number of ranks (default 1)")
    parser.add_argument("--gpu_memory_gb", help="memory of one GPU, to warn of more and to plan precision auto as bf16")
    parser.add_argument("--gpu", choices=CARDS, help="predict the speed of a recipe on this card and on many")
    parser.add_argument("--node_gb_s", help="with --gpu: GB/s of a card to others of its node, one direction")
    parser.add_argument("--network_gb_s", help="with --gpu: GB/s of a card to other nodes (default 50)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override of recipe or task")
    args = parser.parse_args()
    if args.task is not None and args.run is not None:
        parser.error("--run and --task exclude each other")
    if args.task is not None and args.model is None:
        parser.error("--task wants --model, the folder that is fine-tuned")
    if args.gpu is None and (args.node_gb_s or args.network_gb_s):
        parser.error("--node_gb_s and --network_gb_s belong to a --gpu")
    if args.gpu is not None and args.task is not None:
        parser.error("--gpu predicts a recipe, not a --task")
    if args.task is None and (args.model is not None or args.data is not None):
        parser.error("--model and --data belong to a --task")
    return args


def _card(args: argparse.Namespace) -> Card:
    card = CARDS[args.gpu]
    if args.node_gb_s:
        card = card._replace(node_bytes_per_s=1e9 * _number("--node_gb_s", args.node_gb_s))
    if args.network_gb_s:
        card = card._replace(network_bytes_per_s=1e9 * _number("--network_gb_s", args.network_gb_s))
    return card


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7 or (option == "--world_size" and value != int(value)):
        raise ConfigError(f"{option}: found {text}, wanted a positive number")
    return value


if __name__ == "__main__":
    run_main(main)
