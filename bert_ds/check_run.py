"""Check a run before anything is taken: both files, their agreement, and the numbers that follow from them.

    python bert_ds/check_run.py --run ds_configs/recipes/bert_base_phase1.json --deepspeed_config ds_configs/zero2.json

Needs no torch. Exit code 0: the run is valid; 2: every problem of both files is on stderr, one per line.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script run by path finds its package beside itself
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import make_plan, plan_table
from bert_ds.launch.command_line import make_parser, run_main


def main() -> int:
    """Print the derived numbers, or raise ConfigError with every problem."""
    parser = make_parser("Check a recipe and a DeepSpeed file, and print what follows from them.")
    parser.add_argument("--run", help="recipe; without it the embedded default")
    parser.add_argument("--deepspeed_config", required=True, help="DeepSpeed file")
    parser.add_argument("--world_size", default="1", help="number of ranks (default 1)")
    parser.add_argument("--gpu_memory_gb", help="memory of one GPU, to warn where the estimate is larger")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="override of the recipe")
    arguments = parser.parse_args()
    world_size = int(_number("--world_size", arguments.world_size))
    gpu_memory = _number("--gpu_memory_gb", arguments.gpu_memory_gb) if arguments.gpu_memory_gb else None
    run, ds = load_pair(arguments.run, arguments.deepspeed_config, overrides=arguments.set)
    plan = make_plan(run, ds, world_size, gpu_memory_bytes=int(gpu_memory * 1e9) if gpu_memory else None)
    rows = plan_table(plan)
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return 0


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
