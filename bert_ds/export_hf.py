"""Turn a checkpoint of any ZeRO stage into a Hugging Face folder, and prove the folder right before saying done.

    python bert_ds/export_hf.py --run_dir runs/mine [--onnx]       the newest checkpoint -> runs/mine/hf
    python bert_ds/export_hf.py --model runs/mine/hf --onnx        a folder there is already, fine-tuned or not
    python bert_ds/export_hf.py --model runs/sst2/hf --onnx --int8    with int8 matrices, and what they cost the task
    python bert_ds/export_hf.py --model runs/sst2/hf --push_to_hub ME/NAME --license apache-2.0 --language en

With --onnx the folder gets an onnx/ with model.onnx, config.json and tokenizer, run once in onnxruntime to prove it.
With --layers 0 2 --output FOLDER a network of these layers alone is written.
Exit codes: 0 done, 2 configuration, 3 data or a disk that is full, 4 checkpoint. An older export is replaced by a whole
new one or stays as it is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.hub import Card, push_folder
from bert_ds.launch.verb_arguments import export_hf_arguments

if __name__ == "__main__":
    answer_early(export_hf_arguments)

# Nothing here may reach for the network; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.model_folder import GENERATOR_FOLDER
from bert_ds.configuration.plan_table import generator_text
from bert_ds.configuration.recipe.run_config import RunConfig, load_run_config
from bert_ds.configuration.run_stages import stages_text
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.tuning.int8 import write_int8
from bert_ds.encoder.hf_folder import model_card_text, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import hf_config, role_of, share_unseen_segments, to_hf
from bert_ds.encoder.hf_onnx import ONNX_FILE, write_onnx
from bert_ds.encoder.hf_verify import verify_export
from bert_ds.encoder.initial_weights import layers_alone
from bert_ds.encoder.objectives.replaced_tokens import halves
from bert_ds.encoder.objectives.sentence_structure import two_classes
from bert_ds.folders.replaced_folders import INT8_FOLDER, ONNX_FOLDER, replaced_export
from bert_ds.reporting.run_log import AT_MASK, read_metrics
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint, read_manifest
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

_OF_THREE = "of the three classes of pairs next and previous are exported: transformers' head has two"
"""Said of an export where sentence structure was learned."""


def main() -> None:
    args = export_hf_arguments()
    name = "hf" if args.model is None else INT8_FOLDER if args.int8 else ONNX_FOLDER
    source: Path = args.run_dir if args.model is None else args.model
    output: Path = args.output or source / name
    if args.model is None or args.onnx:
        with replaced_export(output) as folder:
            said = written(args, source, folder, shown=output)
        print("\n".join(said))
    if args.push_to_hub is not None:
        card = Card(args.license, args.language, args.datasets)
        pushed = output if args.model is None else args.model
        print(f"pushed {pushed}: {push_folder(pushed, args.push_to_hub, private=args.private, card=card)}")


def written(args: argparse.Namespace, source: Path, folder: Path, *, shown: Path) -> list[str]:
    """Write what is asked for into an empty folder, which will be called `shown`; return what to say of it."""
    if args.int8:
        return [export_int8(source, folder, args.task, shown=shown)]
    if args.model is not None:
        return [export_onnx(source, folder, shown=shown)]
    said = [export(source, args.checkpoint, folder, shown=shown, layers=args.layers)]
    if args.onnx:
        (folder / ONNX_FOLDER).mkdir()
        said.append(export_onnx(folder, folder / ONNX_FOLDER, shown=shown / ONNX_FOLDER))
    return said


def export(run_dir: Path, name: str | None, folder: Path, *, shown: Path, layers: Sequence[int] | None = None) -> str:
    """Write a checkpoint of a run into an empty folder, which will be called `shown`; return what to say of it.

    With `layers` the network of these alone is written.
    """
    run = load_run_config(run_dir / "run_config.json")
    checkpoint = find_checkpoint(run_dir, name)
    if checkpoint is None:
        raise CheckpointError(f"{run_dir} has no checkpoint yet")
    state_dict = load_fp32_state_dict(checkpoint)
    tokenizer = run_dir / "tokenizer"

    if run.sequences.sentence_pair == "structure":
        state_dict = two_classes(state_dict)
    if run.sequences.sentence_pair == "none":
        state_dict = share_unseen_segments(state_dict)
    parts: dict[str, tuple[Mapping[str, Tensor], EncoderConfig]] = {"": (state_dict, run.model)}
    if run.generator is not None:
        both = halves(state_dict)
        parts = {"": (both.discriminator, run.model), GENERATOR_FOLDER: (both.generator, run.generator)}
    facts, checks = _facts(run, checkpoint, run_dir / "metrics.jsonl"), []
    if layers is not None:
        parts = {name: layers_alone(*part, layers) for name, part in parts.items()}
        facts |= {"layers": f"{', '.join(map(str, layers))} of {run.model.num_hidden_layers}; figures are of all"}
    for name, (weights, model) in parts.items():
        (folder / name).mkdir(exist_ok=True)
        write_model(folder / name, run, model, weights, tokenizer=tokenizer, facts=facts)
        checks.append(verify_export(folder / name, model, state_dict=weights, tokenizer=tokenizer))
    worst = max(checks, key=lambda check: check.max_difference)
    return (
        f"exported {checkpoint.name} to {shown}: transformers' scores differ by at most "
        f"{worst.max_difference:.1e} (largest score {worst.scale:.1f}), tokenizer equal"
        + (f"; {_OF_THREE}" if run.sequences.sentence_pair == "structure" else "")
    )


def write_model(
    folder: Path,
    run: RunConfig,
    model: EncoderConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path,
    facts: Mapping[str, object],
) -> None:
    """Write what a run has trained, or one of the two halves of it, into an empty folder."""
    detects = role_of(weights) == "replaced tokens"
    pair, ids = run.sequences.exported_pair, special_ids(tokenizer)
    config = hf_config(model, sentence_pair=pair, special_ids=ids, has_detector=detects)
    # So that a task notices when the folder's tokenizer is exchanged for another of the same size.
    config["tokenizer_fingerprint"] = load_tokenizer(tokenizer).fingerprint
    card = model_card_text(run.name, model, facts, detects=detects)
    write_hf_folder(folder, config=config, tensors=to_hf(weights, model), tokenizer=tokenizer, model_card=card)


def export_onnx(model: Path, folder: Path, *, shown: Path) -> str:
    """Write the ONNX form of a Hugging Face folder into an empty folder; return what to say of it."""
    check = write_onnx(model, folder)
    return (
        f"wrote {shown / ONNX_FILE}: onnxruntime's scores differ from transformers' by at most "
        f"{check.max_difference:.1e} (largest score {check.scale:.1f})"
    )


def export_int8(model: Path, folder: Path, task: TaskConfig, *, shown: Path) -> str:
    """Write the ONNX form of a fine-tuned folder with int8 matrices into an empty folder; return what to say of it."""
    check = write_int8(model, folder, task, say=print)
    return (
        f"wrote {shown / ONNX_FILE}: {check.metric} of {task.name} {check.fp32:.4f} in fp32, {check.int8:.4f} in int8 "
        f"({check.num_rows:,} validation rows), {check.fp32_bytes / 1e6:,.1f} MB and {check.int8_bytes / 1e6:,.1f} MB"
    )


def _facts(run: RunConfig, checkpoint: Path, metrics: Path) -> dict[str, object]:
    """What the model card says of the run; no paths, which are nobody else's business."""
    state = read_manifest(checkpoint)["state"]
    has_unseen = run.sequences.sentence_pair == "none" and run.model.num_segments > 1
    return {
        "steps": f"{state['step']} of {run.training.steps} planned",
        "examples seen": state["consumed_examples"],
        **_measured(metrics, state["step"]),
        "examples per step": run.training.train_batch_size,
        "longest sequence in training": run.sequences.max_seq_length,
        "sentence pair objective": run.sequences.sentence_pair,
        **({"pair classifier": _OF_THREE} if run.sequences.sentence_pair == "structure" else {}),
        **({} if run.generator is None else {"generator": generator_text(run.generator, run.objective_weights)}),
        **({"segments": "trained on one; the others are equal to it"} if has_unseen else {}),
        "masked share of the tokens": run.masking.mlm_probability,
        "whole words masked": "in spans" if run.masking.span_mask else run.masking.whole_word_mask,
        **({"stages before that": stages_text(run)} if run.stages else {}),
        "optimizer": f"{run.optimizer.type}, peak learning rate {run.optimizer.lr:g}",
        "schedule": run.schedule.type,
        **({"layers left out of a step": run.training.layer_drop} if run.training.layer_drop else {}),
        **({"stochastic depth": run.training.stochastic_depth} if run.training.stochastic_depth else {}),
        "precision of training": run.training.precision,
        "text": "docstrings of installed Python packages" if run.corpus.type == "embedded" else "token shards",
        "seed": run.seed,
    }


def _measured(metrics: Path, step: int) -> dict[str, object]:
    """What the run's evaluation at this step says at [MASK]; nothing where it has none of this version."""
    found = next((row for row in read_metrics(metrics, "evaluation") if row["step"] == step), {})
    if found.get(AT_MASK) is None:
        return {}
    loss, accuracy = found[AT_MASK], found["mlm_masked_accuracy"]
    measured = {"held-out text at [MASK]": f"loss {loss:.3f} nats, accuracy {accuracy:.3f}"}
    if (loss := found.get("loss_replaced")) is not None:
        measured["replaced tokens in it"] = f"loss {loss:.3f} nats, accuracy {found['replaced_accuracy']:.3f}"
    return dict(measured)


if __name__ == "__main__":
    run_main(main)
