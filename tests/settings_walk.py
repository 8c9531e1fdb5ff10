"""Every setting of a schema, a change of each, and what of a run a change can be seen in."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from bert_ds.reporting.run_log import read_rows
from bert_ds.training.checkpoints.checkpoint_folder import candidates
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

FIGURES = re.compile(r"kind|step|lr|grad_norm|num_tokens|filling_share|sources|trust.*|loss.*|perplexity|.*_accuracy")
"""What of a row of training does not depend on a clock."""


class Change(NamedTuple):
    """Another value of a setting, and what the file has to hold besides for it to matter."""

    value: Any
    base: dict[str, Any] = {}
    """Dotted setting -> value, of both runs."""
    also: dict[str, Any] = {}
    """Dotted setting -> value that has to change with it."""
    code: int = 0
    """How the changed run ends."""


def setting_paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted name of every setting; of several forms of a section each is named, "optimizer:lamb.eps"."""
    paths = []
    for name, field in section.model_fields.items():
        forms = _sections(field.annotation)
        path = prefix + (field.alias or name)
        if not forms:
            paths.append(path)
        for form in forms:
            kind = form.model_fields.get("type") if len(forms) > 1 else None
            label = path if kind is None else f"{path}:{kind.default}"
            paths += setting_paths(form, f"{label}.")
    return paths


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return [form for part in typing.get_args(annotation) for form in _sections(part)]
    return []


def changed(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy with dotted settings set; of "optimizer:lamb.eps" the form is left out."""
    result = copy.deepcopy(content)
    for path, value in changes.items():
        block: Any = result
        *outer, last = [part.partition(":")[0] for part in path.split(".")]
        for part in outer:
            block = block[int(part)] if isinstance(block, list) else block.setdefault(part, {})
        block[int(last) if isinstance(block, list) else last] = copy.deepcopy(value)
    return result


def observed(run_dir: Path) -> dict[str, Any]:
    """Return what a run left behind that does not merely repeat its settings, without what a clock decides."""
    rows = read_rows(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    kept = [{name: value for name, value in row.items() if _is_figure(row["kind"], name)} for row in rows]
    saved = candidates(run_dir)
    weights = {name: _digest(tensor) for name, tensor in load_fp32_state_dict(saved[0]).items()} if saved else {}
    files = sorted(
        f"{path.relative_to(run_dir)} {'' if path.suffix in ('.png', '.pt') else _digest_of(path)}"
        for folder in ("predictions", "figures")
        for path in (run_dir / folder).rglob("*.*")
    )
    results = run_dir / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    found.pop("task", None)
    return {"rows": kept, "saved": [p.name for p in saved], "weights": weights, "files": files, "results": found}


def _is_figure(kind: str, name: str) -> bool:
    return bool(FIGURES.fullmatch(name)) if kind == "train" else name not in ("plan", "warnings", "time", "seconds")


def _digest(tensor: Any) -> str:
    return f"{tuple(tensor.shape)} {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]}"


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
