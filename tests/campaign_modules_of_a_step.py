"""How many modules of ours one training step passes: `make campaign-modules-of-a-step`.

    python tests/campaign_modules_of_a_step.py [--checkout FOLDER] [--run RECIPE]

The verb pretrain of a checkout trains a few steps of its embedded default, on one rank under ZeRO-2, with its loader in
a process of its own as shipped, then with the loader in the rank. Of step 4, which is no step that is logged, saved or
evaluated, `sys.setprofile` sees every Python function that is entered or left, from the end of `DeepSpeedEngine.step`
to the end of the next one; counted are the files of `bert_ds` and `bert_kernels` that these functions stand in. What
autograd's other threads do is not seen; on a CPU there are none. Rows go to results/modules_of_a_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from campaign_rows import add_row, commit_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results/modules_of_a_step.jsonl"
SEEN_STEP, TOTAL_STEPS = 4, 6
WORKERS = {"the rank": 1, "the rank, which loads too": 0}
"""What is counted -> training.num_workers."""


def main() -> None:
    """Count, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT)
    parser.add_argument("--run", help="a recipe in place of the embedded default")
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        for what, num_workers in WORKERS.items():
            modules = passed_modules(checkout, Path(folder), num_workers=num_workers, recipe=args.run)
            row = {
                "commit": commit_of(checkout),
                "recipe": Path(args.run).stem if args.run else "embedded_default",
                "what": what,
            }
            add_row(RESULTS, {**row, "number": len(modules), "modules": modules})


def passed_modules(checkout: Path, folder: Path, *, num_workers: int, recipe: str | None = None) -> list[str]:
    """Return the modules of one step, as paths in the checkout.

    Args:
        checkout: whose code trains.
        folder: for the run; the corpus in it is built once.
        num_workers: loader processes.
        recipe: None is the embedded default.
    """
    answer, script = folder / f"modules-{num_workers}.json", checkout / "bert_ds/pretrain.py"
    settings = {"training.total_steps": TOTAL_STEPS, "training.num_workers": num_workers}
    settings |= {"schedule": '{"type": "linear", "warmup_steps": 2}'}
    settings |= {"evaluation.num_examples": 32, "corpus.max_bytes": 3_000_000}
    words: list[object] = [sys.executable, __file__, "watch", checkout, answer, script]
    words += ["--run_dir", folder / f"run-{num_workers}", "--deepspeed_config", checkout / "ds_configs/zero2.json"]
    words += ["--run", recipe] if recipe else []
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    places = {"PYTHONPATH": f"{checkout}:{checkout / 'kernels'}", "BERT_DS_START_WATCH": "0"}
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, **places}, cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(answer.read_text())


def watch(checkout: str, answer: str, *command: str) -> None:
    """Be the rank: run the verb, and write what its step SEEN_STEP passes."""
    import runpy

    import deepspeed

    ours = tuple(f"{checkout}/{package}/" for package in ("bert_ds", "kernels/bert_kernels"))
    files: set[str] = set()
    taken = 0

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(ours):
            files.add(frame.f_code.co_filename)

    plain_step = deepspeed.DeepSpeedEngine.step

    def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        result = plain_step(engine, *args, **kwargs)
        taken += 1
        if taken == SEEN_STEP - 1:
            sys.setprofile(look)
        elif taken == SEEN_STEP:
            sys.setprofile(None)
            Path(answer).write_text(json.dumps(sorted(os.path.relpath(file, checkout) for file in files)))
        return result

    deepspeed.DeepSpeedEngine.step = step
    sys.argv, sys.path[0] = list(command), str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1:2] == ["watch"]:
        watch(*sys.argv[2:])
    else:
        main()
