"""The polynomials with which Muon orthogonalises: how a recipe says them, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from bert_ds.configuration.reading.config_problems import UNION_TAG

Polynomial = tuple[float, float, float]
"""(a, b, c) of a s + b s^3 + c s^5."""
JORDAN: Polynomial = (3.4445, -4.7750, 2.0315)
"""Jordan et al. 2024, and `torch.optim.Muon`."""


def _polynomials_form(value: Any) -> str:
    """Return which form of `ns_coefficients` a value is meant to have: its own mistakes are told, not both forms'."""
    is_nested = isinstance(value, list | tuple) and any(isinstance(part, list | tuple) for part in value)
    return UNION_TAG + ("of each step" if is_nested else "one")


Polynomials = Annotated[
    Annotated[Polynomial, Tag(f"{UNION_TAG}one")]
    | Annotated[tuple[Polynomial, ...], Field(min_length=1, max_length=20), Tag(f"{UNION_TAG}of each step")],
    Discriminator(_polynomials_form),
]
"""One polynomial for all steps, or one of each."""


def step_polynomials(coefficients: Polynomial | Sequence[Polynomial], steps: int) -> tuple[Polynomial, ...]:
    """Return the polynomial of each step: the only one in all of `steps`, or those that are given."""
    is_one = all(isinstance(value, float | int) for value in coefficients)
    return (tuple(coefficients),) * steps if is_one else tuple(coefficients)  # type: ignore[arg-type,return-value]


def orthogonalising_flops(rows: int, columns: int, steps: int) -> int:
    """Return the FLOPs of orthogonalising a matrix: three products a step, 2 per multiplication and addition."""
    small, large = sorted((rows, columns))
    return steps * (4 * small * small * large + 2 * small**3)
