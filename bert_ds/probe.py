"""Ask every layer of a model what it knows of a task: a linear classifier on its frozen vectors.

    python bert_ds/probe.py --model runs/mine/hf --task ud_pos --data DATA
    python bert_ds/probe.py --model DIR --task my_task.json --output probes --max_vectors 20000

Tasks of the kinds classification and token_classification; any folder that finetune.py takes, fine-tuned ones too.
Exit codes: 0 done, 2 configuration, 3 data, 4 checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.verb_arguments import probe_arguments

if __name__ == "__main__":
    answer_early(probe_arguments)

import torch

from bert_ds.basics.whole_files import write_json
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.configuration.task.task_kinds import KIND_FACTS
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.scores.figures import draw_probes
from bert_ds.downstream.scores.metrics import require_metrics
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.downstream.untrained.probing import (
    Probe,
    layer_vectors,
    majority_accuracy,
    probe_layers,
)
from bert_ds.encoder.pretrained import check_tokenizer, load_pretrained, make_encoder
from bert_ds.folders.kept_files import keeping_files
from bert_ds.folders.output_folders import open_results_folder

MODELS = ("this model", "random weights")


def main() -> None:
    args = probe_arguments()
    require_metrics()
    task = load_task(args.task, args.set, data=args.data)
    if not KIND_FACTS[task.kind].probed_target:
        kinds = " or ".join(kind for kind, facts in KIND_FACTS.items() if facts.probed_target)
        raise ConfigError(f"task {task.name} is {task.kind}; what can be probed for is {kinds}")
    if args.max_vectors < 1:
        raise ConfigError(f"--max_vectors is {args.max_vectors}, wanted at least 1")
    if args.output is not None:
        open_results_folder(args.output)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(args.model, **tokenizer.identity)
    pretrained = load_pretrained(args.model)
    rows = read_task(task, tokenizer, say=print)
    found = {}
    for name, tensors in zip(MODELS, (pretrained.tensors, None), strict=True):
        encoder = make_encoder(pretrained.config, tensors, kernels=task.training.kernels, init_seed=task.seed)
        print(f"probing {name}")
        found[name] = probe_encoder(encoder, task, rows, limit=args.max_vectors)
    report(task, found, output=args.output)


def probe_encoder(encoder: Any, task: TaskConfig, rows: TaskRows, *, limit: int) -> list[Probe]:
    """Return the probes of every layer of an encoder."""
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = (
        layer_vectors(
            encoder, side.features, kind=task.kind, batch_size=task.evaluation.batch_size, limit=limit, seed=task.seed
        )
        for side in (rows.train, rows.validation)
    )
    majority = majority_accuracy(train, held_out)
    print(
        f"{len(train.targets_n):,} vectors to learn from, {len(held_out.targets_n):,} held out, majority {majority:.4f}"
    )
    return probe_layers(train, held_out, rows.labels[KIND_FACTS[task.kind].probed_target], seed=task.seed)


def report(task: TaskConfig, found: dict[str, list[Probe]], *, output: Path | None) -> None:
    """Print the table, and write it where there is an output folder."""
    trained, random = (found[name] for name in MODELS)
    print(f"{'layer':>5} {'accuracy':>9} {'macro F1':>9} {'selectivity':>12} {'accuracy, random weights':>25}")
    for one, other in zip(trained, random, strict=True):
        selectivity = "-" if one.selectivity is None else f"{one.selectivity:.4f}"
        print(f"{one.layer:>5} {one.accuracy:>9.4f} {one.macro_f1:>9.4f} {selectivity:>12} {other.accuracy:>25.4f}")
    if output is not None:
        rows = {
            name: [probe._asdict() | {"selectivity": probe.selectivity} for probe in found[name]] for name in MODELS
        }
        with keeping_files(output, ["probes.json", "probes.png"]):
            write_json(output / "probes.json", {"task": task.name, **rows})
            draw_probes(output / "probes.png", {name: [probe.accuracy for probe in found[name]] for name in MODELS})


if __name__ == "__main__":
    run_main(main)
