"""Fine-tuned models as Hugging Face folders: written, proved right by transformers itself, and read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.downstream.kinds.kind import HeadContext, HfForm, Kind
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel, role_of
from bert_ds.downstream.rows.examples import Labels
from bert_ds.encoder.blocks import mean_rows
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.hf_folder import load_hf_folder, read_json, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import hf_config, modern_names
from bert_ds.encoder.hf_verify import (
    MAX_RELATIVE_DIFFERENCE,
    ExportCheck,
    load_with_transformers,
    probe_sequences,
    verify_tokenizer,
)
from bert_ds.encoder.tensor_rows import TensorRow, rows_from_hf, rows_to_hf
from bert_ds.folders.replaced_folders import replaced_export


class TaskFacts(NamedTuple):
    """What a folder says of the fine-tuning that it comes from."""

    task: str
    kind: str
    labels: Labels
    tokenizer_fingerprint: str
    max_seq_length: int
    """Tokens of the longest sequence of the task: what the folder's tokenizer cuts to."""
    figures: Mapping[str, object]
    """Rows of the model card."""
    answering: Mapping[str, Any] = {}
    """Of question answering: how contexts are cut and answers chosen."""
    settings: Any = None
    """The section of the task that is for its kind alone, where other files of the folder say it."""


def make_task_model(
    kind: Kind,
    config: EncoderConfig,
    labels: Labels,
    *,
    kernels: str,
    class_weights: tuple[float, ...] | None = None,
    make: Callable[..., TaskModel] = TaskModel,
    activation_checkpointing: bool = False,
    init_seed: int = 0,
    settings: Any = None,
) -> TaskModel:
    """Return a new model of a kind, on the CPU.

    Args:
        kind: of the task.
        config: shape of the encoder, with the dropout of the task.
        labels: of the task.
        kernels: "auto", "triton" or "torch".
        class_weights: weight of each label in the loss.
        make: puts encoder and head together.
        activation_checkpointing: recompute each layer in the backward pass.
        init_seed: seed of the weights.
        settings: the section of the task that is for its kind alone.
    """
    ops = fused_ops(kernels)
    head = kind.make_head(HeadContext(config, labels, ops, class_weights, settings))
    return make(config, head, ops=ops, activation_checkpointing=activation_checkpointing, init_seed=init_seed)


def write_task_folder(output: Path, model: TaskModel, *, facts: TaskFacts, tokenizer: Path) -> list[ExportCheck]:
    """Write a model in every form that its kind has, and compare each with what transformers loads.

    Args:
        output: folder to write; an older export of ours is replaced.
        model: on the CPU, fp32.
        facts: of the fine-tuning.
        tokenizer: folder of the tokenizer.

    Raises:
        ConfigError: the folder holds more than an unchanged export.
        CheckpointError: a tensor is broken, or transformers computes other scores.
    """
    checks = []
    with replaced_export(output) as staged:
        for form in KINDS[facts.kind].hf_forms:
            folder = staged / form.folder
            folder.mkdir(exist_ok=True)
            table = _form_rows(form, model)
            used = {row.name: model.state_dict()[row.name] for row in table}
            write_hf_folder(
                folder,
                config=_config(form, model.config, facts, tokenizer),
                tensors=rows_to_hf(used, table),
                tokenizer=tokenizer,
                model_card=_model_card(form, facts, config=model.config),
                max_length=facts.max_seq_length,
            )
            for name, content in form.extra_files(model.config, facts.max_seq_length, facts.settings).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
            checks.append(_verify(folder, form, model))
            verify_tokenizer(folder, model.config, tokenizer, max_length=facts.max_seq_length)
    return checks


def read_task_folder(folder: Path, kind: Kind, *, kernels: str) -> tuple[TaskModel, Labels]:
    """Return the model of a fine-tuned folder, ours or another's of the same architecture, and its labels.

    Raises:
        ConfigError, CheckpointError: the folder is no such model or is damaged.
        DataError: its labels have no names.
    """
    labels: dict[str, tuple[str, ...]] = {}
    sources = []
    for form in kind.hf_forms:
        source, content = load_hf_folder(folder / form.folder), read_json(folder / form.folder / "config.json")
        wanted = [role_of(source.config, form.role).architecture]
        if content.get("architectures") != wanted:
            found = content.get("architectures")
            raise CheckpointError(f"{folder}: architectures is {found}, wanted {wanted} for this task")
        if form.labels_name is not None:
            labels[form.labels_name] = folder_labels(folder, content)
        sources.append(source)
    settings = kind.folder_settings(folder)
    model = make_task_model(kind, sources[0].config, labels, kernels=kernels, settings=settings)
    state: dict[str, Tensor] = {}
    for form, source in zip(kind.hf_forms, sources, strict=True):
        state.update(rows_from_hf(modern_names(source.tensors, source.config), _form_rows(form, model)))
    model.load_state_dict(state)
    return model.eval(), labels


def tokenizer_folder(folder: Path, kind: Kind) -> Path:
    """Return the folder of a fine-tuned model that holds its tokenizer and its config.json."""
    return folder / kind.hf_forms[0].folder


def _form_rows(form: HfForm, model: TaskModel) -> list[TensorRow]:
    """Return the tensors of a form: the encoder's and those of its part of the head."""
    config = model.config
    role = role_of(config, form.role)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    encoder = [
        row._replace(hf_names=tuple(name.replace(*role.front_renamed) for name in row.hf_names))
        for row in family_of(config).encoder_rows(config, has_front=role.reads_front)
    ]
    if not form.classifier:
        return encoder
    names = {f"{form.classifier}.{kind}": f"{role.classifier}.{kind}" for kind in ("weight", "bias")}
    return encoder + [TensorRow(ours, shapes[ours], (theirs,), shapes[ours][0]) for ours, theirs in names.items()]


def _config(form: HfForm, config: EncoderConfig, facts: TaskFacts, tokenizer: Path) -> dict[str, Any]:
    content = hf_config(config, sentence_pair="none", special_ids=special_ids(tokenizer))
    del content["sentence_pair_objective"]
    names = facts.labels[form.labels_name] if form.labels_name is not None else ("LABEL_0",)
    return {
        **content,
        "architectures": [role_of(config, form.role).architecture],
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        **form.facts,
        **({"question_answering": dict(facts.answering)} if facts.answering else {}),
        "finetuned_task": facts.task,
        "tokenizer_fingerprint": facts.tokenizer_fingerprint,
    }


def folder_labels(folder: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels of a folder in the order of their ids; DataError where they have no names."""
    names = content.get("id2label")
    found = [names.get(str(index)) for index in range(len(names))] if isinstance(names, dict) else []
    if not found or not all(isinstance(name, str) for name in found) or len(set(found)) != len(found):
        raise DataError(f"{folder}/config.json: id2label does not name the labels 0, 1, 2 and so on, each differently")
    return tuple(map(str, found))


@torch.no_grad()
def _verify(folder: Path, form: HfForm, model: TaskModel) -> ExportCheck:
    """Compare our scores with those of transformers' model of the folder."""
    theirs = load_with_transformers(folder, role_of(model.config, form.role))
    probe = probe_sequences(model.config)
    mask_NS = probe.padded["attention_mask"].bool()
    *_, scores = model.eval()(**probe.packed, targets={}, with_scores=True)
    found = scores[form.scores]
    if form.role == "multiple choice":
        answer = theirs(**{name: tensor[:, None] for name, tensor in probe.padded.items()})
    else:
        answer = theirs(**probe.padded, output_hidden_states=form.role == "encoder")
    if form.role == "question answering":
        wanted = torch.stack([answer.start_logits, answer.end_logits], dim=-1)
    elif form.role == "encoder":
        num_layers, hidden_NSD = model.head.num_layers_read, answer.last_hidden_state
        if num_layers > 1:
            hidden_NSD = torch.stack(answer.hidden_states[-num_layers:]).mean(dim=0)
        is_first = model.head.settings.pooling == "cls"
        wanted = hidden_NSD[:, 0] if is_first else mean_rows(hidden_NSD[mask_NS], probe.packed["cu_seqlens"])
    else:
        wanted = answer.logits
    wanted = wanted[mask_NS] if form.scores.startswith("token_") else wanted.view(found.shape)
    check = ExportCheck((found - wanted).abs().max().item(), wanted.abs().max().item())
    if not check.max_difference <= MAX_RELATIVE_DIFFERENCE * check.scale:
        raise CheckpointError(
            f"{folder}: scores differ from transformers' by {check.max_difference:.3e}, wanted at most "
            f"{MAX_RELATIVE_DIFFERENCE} of the largest score {check.scale:.3e}"
        )
    return check


def _model_card(form: HfForm, facts: TaskFacts, *, config: EncoderConfig) -> str:
    rows = [f"| {name} | {value} |" for name, value in facts.figures.items()]
    load = f"{role_of(config, form.role).architecture}.from_pretrained"
    if form.pipeline:
        load = f'pipeline("{form.pipeline}", model='
    lines = [
        "---",
        "library_name: transformers",
        *([f"pipeline_tag: {form.pipeline}"] if form.pipeline else []),
        "---",
        f"# {facts.task}",
        "",
        f"A {config.TITLE} encoder fine-tuned on the task {facts.task} ({facts.kind.replace('_', ' ')}).",
        f'Load it with `transformers.{load}{"" if form.pipeline else "("}"path/to/this/folder")`.',
        "",
        "| fact | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)
