"""The optimizers with their formulas, out of the docstrings of the code that computes them."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bert_ds/training/optimizers"
FILES = {
    "lamb": "LAMB, LANS",
    "muon": "Muon",
    "newton_schulz": "Orthogonalising a matrix",
    "muon_exchange": "Matrices that are spread over ranks",
    "elementwise_optimizers": "AdamW, StableAdamW, Lion",
    "foreign_optimizers": "Kernels of DeepSpeed and apex",
    "lr_schedule": "The rate of a step",
    "sharded_optimizer": "How pieces of tensors are stepped",
}
"""File -> heading."""
PROVEN_BY = {
    "lamb": ("test_lamb", "test_lamb_zero"),
    "muon": ("test_muon", "test_muon_zero"),
    "elementwise_optimizers": ("test_elementwise_optimizers", "test_optimizer_precision"),
    "foreign_optimizers": ("test_optimizers",),
    "lr_schedule": ("test_lr_schedule",),
    "sharded_optimizer": ("test_parameter_layout", "test_elastic"),
}
"""File -> the tests that hold it against whole tensors."""


def optimizers_page(*, title: str, opening: str) -> str:
    """Return the page of all optimizers: of each file its docstring, of its classes their first paragraph."""
    sections = [f"# {title}\n\n{opening}"]
    for name, heading in FILES.items():
        tree = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        rows = [f"* `{node.name}`: {_first_paragraph(node)}" for node in classes]
        tests = ", ".join(f"`{test}`" for test in PROVEN_BY.get(name, ()))
        held = f"Tests: {tests}." if tests else ""
        parts = [f"## {heading}", f"`bert_ds/training/optimizers/{name}.py`", _docstring(tree), "\n".join(rows), held]
        sections.append("\n\n".join(part for part in parts if part))
    return "\n\n".join(sections) + "\n"


def _first_paragraph(node: ast.ClassDef) -> str:
    return " ".join(_docstring(node).split("\n\n")[0].split())


def _docstring(node: ast.Module | ast.ClassDef) -> str:
    return (ast.get_docstring(node) or "").replace("<", "&lt;")
