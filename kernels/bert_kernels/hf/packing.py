"""Where the tokens of a padded batch lie once the padding is out.

Letters: B rows, S places of a row, T tokens, N sequences, D hidden size, H heads, K head dim. Tokens of the longest
row come first: rows of equal length then lie side by side, and attention over them is a view instead of a gather.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PACKING = "bert_kernels_packing"
"""The keyword by which transformers hands a Packing down to every layer and attention function."""


class Packing:
    """The places of the tokens of one call; nothing in it changes once it is made.

    Attributes:
        batch, length: B and S of the padded batch.
        rows_T: int64, index of every token in the flattened (B S); None where every place is a token.
        columns_T: int64, the place of every token in its row.
        lengths: of the sequences, in the order in which they are packed; none is 0.
        groups: (number of sequences, their length) of neighbours of equal length.
        cu_seqlens: int32 (N + 1), the start of each sequence and T.
        operators: the fused operators of this call; None where layers and attention are torch's.
        seed: int64 (1), key of the dropout masks of those operators; None until it is drawn.
    """

    def __init__(self, shape: tuple[int, int], rows_T: Tensor | None, columns_T: Tensor, lengths: list[int]) -> None:
        self.batch, self.length = shape
        self.rows_T, self.columns_T, self.lengths = rows_T, columns_T, lengths
        self.groups = [(len(list(same)), length) for length, same in itertools.groupby(lengths)]
        bounds = list(itertools.accumulate(lengths, initial=0))
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(columns_T.device, non_blocking=True)
        self.num_tokens = bounds[-1]
        self.operators: Any = None
        self.seed: Tensor | None = None
        self._near: dict[int, list[Tensor | None]] = {}

    @property
    def longest(self) -> int:
        """Length of the longest sequence, 0 without any."""
        return max(self.lengths, default=0)

    def near(self, window: int) -> list[Tensor | None]:
        """Return for each group which keys lie at most `window` places away, bool (N, 1, L, L); None where all do.

        A place that was masked counts: distance is that in the padded row, as transformers measures it.
        """
        if window not in self._near:
            self._near[window] = [
                _near(columns.view(number, length), window)
                for columns, (number, length) in zip(self.split(self.columns_T), self.groups, strict=True)
            ]
        return self._near[window]

    def reaches_over_hole(self, window: int) -> bool:
        """Return whether a sequence longer than the window has a masked place between its tokens. A host wait."""
        if self.rows_T is None or self.longest <= window:
            return False
        ends = self.cu_seqlens[1:].long()
        spans = self.columns_T[ends - 1] - self.columns_T[self.cu_seqlens[:-1].long()] + 1
        return bool((spans != ends.diff(prepend=ends.new_zeros(1))).any())

    def split(self, x_T: Tensor) -> Iterable[Tensor]:
        """Return the tokens (T, ...) of each group."""
        return x_T.split([number * length for number, length in self.groups])

    def pack(self, x: Tensor) -> Tensor:
        """Take the padding out: (B, S, ...), or (1, S, ...) that stands for every row, to (1, T, ...).

        Raises:
            ValueError: x has another shape.
        """
        if x.dim() < 2 or x.shape[0] not in (1, self.batch) or x.shape[1] != self.length:
            raise ValueError(
                f"an input has shape {list(x.shape)}, wanted {[self.batch, self.length]} as input_ids has it"
            )
        x = x.expand(self.batch, *x.shape[1:]).flatten(0, 1)
        return x[None] if self.rows_T is None else x.index_select(0, self.rows_T)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """Put the padding back: (1, T, ...) to (B, S, ...), zeros at padding."""
        shape = (self.batch, self.length, *x.shape[2:])
        if self.rows_T is None:
            return x.reshape(shape)
        out = x.new_zeros(self.batch * self.length, *x.shape[2:])
        return out.index_copy(0, self.rows_T, x[0]).view(shape)

    def key(self) -> Tensor:
        """Return the key of the dropout masks of this call, from torch's generator: manual_seed repeats it."""
        if self.seed is None:
            self.seed = torch.randint(1 << 62, (1,), device=self.columns_T.device)
        return self.seed

    def is_packed(self, x: Any) -> bool:
        """Return whether x has the shape of packed tokens."""
        return isinstance(x, Tensor) and x.dim() > 1 and tuple(x.shape[:2]) == (1, self.num_tokens)

    def places(self, rows_R: Tensor) -> Tensor:
        """Return where the given indices of the flattened (B S) lie among the tokens, -1 for padding."""
        if self.rows_T is None:
            return rows_R
        place = rows_R.new_full((self.batch * self.length,), -1)
        place[self.rows_T] = torch.arange(len(self.rows_T), device=rows_R.device)
        return place[rows_R]


def pack_rows(keep_BS: Tensor, *, even_if_full: bool) -> Packing | None:
    """Return the packing of a bool mask; None where every place is a token, unless that is wanted all the same."""
    batch, length = keep_BS.shape
    # A host wait, and nonzero is another: the layout of a batch must be known before its tensors can be made.
    lengths = keep_BS.sum(1).tolist()
    if all(each == length for each in lengths):
        return pack_full(batch, length, keep_BS.device) if even_if_full else None
    order = sorted(range(batch), key=lambda row: -lengths[row])
    order_B = torch.tensor(order, device=keep_BS.device)
    kept_T2 = keep_BS.index_select(0, order_B).nonzero()
    rows_T = order_B.index_select(0, kept_T2[:, 0]) * length + kept_T2[:, 1]
    return Packing((batch, length), rows_T, kept_T2[:, 1], [lengths[row] for row in order if lengths[row]])


def pack_full(batch: int, length: int, device: torch.device) -> Packing:
    """Return the packing of a batch without padding."""
    columns = torch.arange(length, device=device).expand(batch, length).flatten()
    return Packing((batch, length), None, columns, [length] * batch if length else [])


def pack_bounds(cu_seqlens: Tensor, num_tokens: int) -> Packing:
    """Return the packing of one row that its caller has packed already.

    Raises:
        ValueError: the bounds are not those of num_tokens tokens.
    """
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    if not bounds or bounds[0] != 0 or bounds[-1] != num_tokens or any(each < 0 for each in lengths):
        raise ValueError(f"cu_seq_lens_q is {bounds}, wanted bounds from 0 to {num_tokens} that never fall")
    starts_T = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=num_tokens)
    columns_T = torch.arange(num_tokens, device=cu_seqlens.device) - starts_T
    return Packing((1, num_tokens), None, columns_T, [each for each in lengths if each])


def _near(columns_NL: Tensor, window: int) -> Tensor | None:
    span = columns_NL[:, -1] - columns_NL[:, 0]
    if not len(span) or int(span.max()) <= window:
        return None
    return ((columns_NL[:, :, None] - columns_NL[:, None, :]).abs() <= window)[:, None]


def grouped_attention(
    qkv: tuple[Tensor, Tensor, Tensor], packing: Packing, *, dropout_p: float, scale: float | None, window: int | None
) -> Tensor:
    """Return torch's attention within each sequence, group by group.

    Args:
        qkv: queries, keys, values, each (1, H, T, K).
        dropout_p: probability, masks by torch's generator.
        window: keys at most this many places away are seen, all where None.

    Returns:
        (1, T, H, K).
    """
    masks = [None] * len(packing.groups) if window is None else packing.near(window)
    parts = []
    for (number, length), mask, *parts_qkv in zip(
        packing.groups, masks, *(packing.split(x[0].transpose(0, 1)) for x in qkv), strict=True
    ):
        q, k, v = (x.unflatten(0, (number, length)).transpose(1, 2) for x in parts_qkv)
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, scale=scale)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None] if parts else qkv[0].transpose(1, 2) * 0
