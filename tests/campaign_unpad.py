"""Every class under every mask, in training and evaluation, by each kind of operators: unpadded against plain, fp64.

    make campaign-unpad        with the installed transformers and with the oldest supported one

A row of tests/results/unpad.jsonl is a class and a kind of operators under one transformers: how many cases agree, the
largest difference of an output and of a gradient (relative to that parameter's largest), and what was refused, by its
sentence's first words. Rows that are there are not run again; the command fails where a case disagrees.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
import unpad_cases as cases
from torch import Tensor

from bert_kernels.hf import unpad

RESULTS = Path(__file__).parent / "results/unpad.jsonl"
KERNELS = ("auto", "torch")
LIMIT = 1e-9
FP32_LIMIT = 1e-6
"""Of a loss that transformers computes in fp32 whatever the model's dtype."""


def main() -> None:
    """Run what has no row yet and print all rows of this transformers."""
    torch.set_num_threads(1)
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(row["transformers"], row["class"], row["kernels"]) for row in rows}
    for name in cases.CLASSES:
        for kernels in KERNELS:
            if (transformers.__version__, name, kernels) not in done:
                row = row_of(name, kernels)
                rows.append(row)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    mine = [row for row in rows if row["transformers"] == transformers.__version__]
    for row in mine:
        print(row["class"], row["kernels"], row["equal"], row["output"], row["gradient"], row["refused"])
    wrong = [row for row in mine if row["different"]]
    sys.exit(f"different from plain: {wrong}" if wrong else 0)


def row_of(name: str, kernels: Any) -> dict[str, Any]:
    """Return the row of a class."""
    equal, different, refused = 0, [], Counter[str]()
    output = gradient = 0.0
    plain_model = cases.make_model(name)
    for mask in cases.MASKS:
        for train in (True, False):
            plain, ours = copy.deepcopy(plain_model), unpad(copy.deepcopy(plain_model), kernels=kernels)
            try:
                errors = differences(name, mask, (plain.train(train), ours.train(train)))
            except ValueError as error:
                refused[str(error).split(";")[0].split(" (")[0]] += 1
                continue
            except RuntimeError as error:  # of transformers itself: it takes no bool mask there
                refused[f"RuntimeError of the plain model: {str(error)[:40]}"] += 1
                continue
            output, gradient = max(output, errors[0]), max(gradient, errors[1])
            equal += max(errors) <= LIMIT
            different += [] if max(errors) <= LIMIT else [[mask, train, *errors]]
    facts = {"transformers": transformers.__version__, "torch": torch.__version__, "class": name, "kernels": kernels}
    numbers = {"output": f"{output:.1e}", "gradient": f"{gradient:.1e}"}
    return facts | {"equal": equal, "different": different} | numbers | {"refused": dict(refused)}


def differences(name: str, mask: str, models: tuple[Any, Any]) -> tuple[float, float]:
    """Return the largest difference of an output at real tokens, and of a gradient."""
    batch = cases.make_batch(name, mask)
    theirs, mine = (model(**batch.inputs, output_hidden_states=True) for model in models)
    output = max(far(mine[key], theirs[key], batch.keep) for key in theirs if key in mine)
    if not models[0].training or torch.isnan(total := cases.total(theirs, batch.keep)):
        return output, 0.0
    total.backward()
    cases.total(mine, batch.keep).backward()
    gradients = dict(models[1].named_parameters())
    worst = 0.0
    for key, parameter in models[0].named_parameters():
        if parameter.grad is not None:
            off = (gradients[key].grad - parameter.grad).abs().max() / parameter.grad.abs().max().clamp(min=1e-3)
            worst = max(worst, float(off))
    return output, worst


def far(mine: Any, theirs: Any, keep: Tensor) -> float:
    """Return the largest difference of an output, at real tokens where it has a row for each."""
    if isinstance(theirs, tuple):
        return max(far(one, other, keep) for one, other in zip(mine, theirs, strict=True))
    if theirs.shape[:2] == keep.shape:
        mine, theirs = mine[keep], theirs[keep]
    off = float((mine - theirs).detach().abs().nan_to_num().max()) if theirs.numel() else 0.0
    return 0.0 if theirs.dtype == torch.float32 and off < FP32_LIMIT else off


if __name__ == "__main__":
    main()
