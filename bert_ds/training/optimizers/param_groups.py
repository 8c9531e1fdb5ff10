"""Which parameters are decayed, decided by name.

Names, never `ndim`: under ZeRO-3's `zero.Init` every parameter looks one-dimensional. LAMB takes one group and asks
for the decay of each tensor; AdamW takes the usual two groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

NO_DECAY_PATTERNS = ("*.bias", "*LayerNorm.weight")
"""Biases and LayerNorm, as in the BERT paper's code. `fnmatch` patterns over the full parameter name."""

NamedParameters = Iterable[tuple[str, nn.Parameter]]


class TensorFacts(NamedTuple):
    """What a model says of its parameters to an optimizer, by `fnmatch` patterns over their names."""

    no_decay: Sequence[str] = NO_DECAY_PATTERNS
    """Parameters that are not decayed."""
    equal_parts: Mapping[str, Sequence[str]] | None = None
    """Tensors that hold several weights side by side -> names of these equal parts; each has a trust ratio of its own
    and is a matrix of its own. Foreign kernels treat such a tensor as one."""
    matrices: Sequence[str] = ()
    """Weights that Muon may treat as a matrix: those of the layers, no embedding and no head."""


NO_FACTS = TensorFacts()


def without_decay(names: Sequence[str], patterns: Sequence[str] = NO_DECAY_PATTERNS) -> frozenset[str]:
    """Return the names that match at least one pattern.

    Raises:
        ValueError: a pattern matches no name at all, which is a misspelling or a renamed layer.
    """
    matches = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in patterns}
    unused = [pattern for pattern, found in matches.items() if not found]
    if unused:
        raise ValueError(
            f"no parameter matches the no-decay pattern {unused[0]!r}; the model has {len(names)} parameters, "
            f"for example {', '.join(names[:3])}"
        )
    return frozenset().union(*matches.values())


def decay_groups(
    named_parameters: NamedParameters, weight_decay: float, *, patterns: Sequence[str] = NO_DECAY_PATTERNS
) -> list[dict[str, Any]]:
    """Split trainable parameters into a decayed group and one without decay, each in the model's order.

    Returns:
        Parameter groups for a torch optimizer; an empty group is left out.
    """
    parameters = list(named_parameters)
    exempt = without_decay([name for name, _ in parameters], patterns)
    trainable = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decay_per_tensor(
    named_parameters: NamedParameters, weight_decay: float, *, patterns: Sequence[str] = NO_DECAY_PATTERNS
) -> Callable[[nn.Parameter], float]:
    """Return the decay of each parameter as a function, for an optimizer that holds all of them in one group.

    Raises:
        KeyError: the returned function is asked for a parameter that is not among named_parameters.
    """
    parameters = list(named_parameters)
    exempt = without_decay([name for name, _ in parameters], patterns)
    decays = {p: 0.0 if name in exempt else weight_decay for name, p in parameters if p.requires_grad}
    return decays.__getitem__
