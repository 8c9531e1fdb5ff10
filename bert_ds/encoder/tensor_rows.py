"""Tables that say which Hugging Face tensors each of our tensors is made of, read in both directions.

Our encoders keep query, key and value in one matrix and pad the vocabulary; Hugging Face may have three matrices, and
has the real vocabulary. `rows_to_hf` then `rows_from_hf` is the identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
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
    copies: tuple[tuple[str, ...], ...] = ()
    """More names each like `hf_names`, of tensors with the same values: other layers that share ours."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Those of the copies too."""
        return (*self.hf_names, *chain.from_iterable(self.copies))


def same_row(name: str, hf_name: str, *shape: int) -> TensorRow:
    """Return the row of a tensor that is the same on both sides, up to its name."""
    return TensorRow(name, shape, (hf_name,), shape[0])


def linear_rows(name: str, hf_name: str, *shape: int, has_bias: bool = True) -> Iterator[TensorRow]:
    """Yield weight and, where there is one, bias of a dense layer [rows, columns] or of a LayerNorm [rows]."""
    yield same_row(f"{name}_weight", f"{hf_name}.weight", *shape)
    if has_bias:
        yield same_row(f"{name}_bias", f"{hf_name}.bias", shape[0])


def shared_rows(table: Iterable[TensorRow]) -> Iterator[TensorRow]:
    """Yield rows of one name as one row, which has the Hugging Face tensors of the others as copies."""
    by_name: dict[str, TensorRow] = {}
    for row in table:
        first = by_name.setdefault(row.name, row)
        if first is not row:
            by_name[row.name] = first._replace(copies=(*first.copies, row.hf_names))
    yield from by_name.values()


def rows_to_hf(state_dict: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return Hugging Face's tensors of a state dict that consists of the rows of a table.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    _check({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, {row.name: row.shape for row in table})
    result = {}
    for row in table:
        used = state_dict[row.name][: row.num_hf_rows * len(row.hf_names)]
        for hf_names in (row.hf_names, *row.copies):
            for hf_name, part in zip(hf_names, used.split(row.num_hf_rows), strict=True):
                result[hf_name] = part.detach().clone()
    return result


def rows_from_hf(tensors: Mapping[str, Tensor], table: Sequence[TensorRow]) -> dict[str, Tensor]:
    """Return our state dict of Hugging Face's tensors, padding with zero rows.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, or no copy of the one that it shares here.
    """
    wanted = {name: (row.num_hf_rows, *row.shape[1:]) for row in table for name in row.all_names}
    _check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted)
    result = {}
    for row in table:
        for copies in row.copies:
            for name, copy in zip(row.hf_names, copies, strict=True):
                if not torch.equal(tensors[copy], tensors[name]):
                    raise CheckpointError(f"{copy} differs from {name}, but this model shares the two")
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
