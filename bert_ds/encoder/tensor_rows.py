"""Tables that say which Hugging Face tensors each of our tensors is made of, read in both directions.

Our encoders keep query, key and value in one matrix and pad the vocabulary; Hugging Face may have three matrices, and
has the real vocabulary. `rows_to_hf` then `rows_from_hf` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError


class TensorRow(NamedTuple):
    """One of our tensors: its name and shape, and the Hugging Face tensors it is made of, row block after row block."""

    name: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    num_hf_rows: int


def same_row(name: str, hf_name: str, *shape: int) -> TensorRow:
    """Return the row of a tensor that is the same on both sides, up to its name."""
    return TensorRow(name, shape, (hf_name,), shape[0])


def linear_rows(name: str, hf_name: str, *shape: int, has_bias: bool = True) -> Iterator[TensorRow]:
    """Yield weight and, where there is one, bias of a dense layer [rows, columns] or of a LayerNorm [rows]."""
    yield same_row(f"{name}_weight", f"{hf_name}.weight", *shape)
    if has_bias:
        yield same_row(f"{name}_bias", f"{hf_name}.bias", shape[0])


def rows_to_hf(state_dict: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of a state dict that consists of the rows of a table.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    _check({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, {row.name: row.shape for row in table})
    result = {}
    for row in table:
        used = state_dict[row.name][: row.num_hf_rows * len(row.hf_names)]
        for hf_name, part in zip(row.hf_names, used.split(row.num_hf_rows), strict=True):
            result[hf_name] = part.detach().clone()
    return result


def rows_from_hf(tensors: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return our state dict of Hugging Face's tensors, padding with zero rows.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    wanted = {name: (row.num_hf_rows, *row.shape[1:]) for row in table for name in row.hf_names}
    _check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
    result = {}
    for row in table:
        joined = torch.cat([tensors[name].detach() for name in row.hf_names])
        result[row.name] = torch.cat([joined, joined.new_zeros(row.shape[0] - joined.shape[0], *row.shape[1:])])
    return result


def without_tied(tensors: Mapping[str, Tensor], decoder: str, *, words: str) -> dict[str, Tensor]:
    """Return the tensors without a decoder that is the word embedding; CheckpointError where it is another."""
    result = dict(tensors)
    found = result.pop(decoder, None)
    if found is not None and words in result and not torch.equal(found, result[words]):
        raise CheckpointError(f"{decoder} differs from {words}, but this model ties the two")
    return result


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError listing every missing, unknown and misshapen tensor."""
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unknown {name}" for name in found if name not in wanted]
    problems += [
        f"{name} has shape {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(f"{len(problems)} wrong tensors: " + "; ".join(problems))
