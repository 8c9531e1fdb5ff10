"""A small valid recipe and DeepSpeed file for the tests of configuration, and a way to change one setting."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from bert_ds.configuration.recipe.precision import Trained, planned, with_precision

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 128,
    },
    "corpus": {"type": "embedded", "vocab_size": 4096},
    "optimizer": {"type": "lamb", "lr": 0.002},
    "schedule": {"type": "linear", "warmup_steps": 10},
    "training": {"total_steps": 100, "train_batch_size": 48, "precision": "bf16"},
}

DEEPSPEED: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "csv_monitor": {"enabled": False, "output_path": "", "job_name": "tiny"},
}

DELETED = object()
"""As a value: the setting is taken out."""


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with one dotted setting set, added or taken out."""
    result = copy.deepcopy(config)
    *outer, last = path.split(".")
    block = result
    for part in outer:
        block = block.setdefault(part, {})
    if value is DELETED:
        del block[last]
    else:
        block[last] = value
    return result


def launched(run: Trained) -> Trained:
    """Return a recipe or task as a launch makes it that decides for fp32 where the file leaves that open."""
    return with_precision(run, planned(run.training.precision))


def write_json(folder: Path, name: str, content: Any) -> Path:
    """Write a JSON file and return its path."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path
