"""Micro-batches of few shapes: tokens, sequences and words to predict are filled up with some that no loss sees.

A compiled layer, and a library that keeps code for every shape, so meet a few sizes again and again. The fillings lie
behind what is real, in sequences of their own: nothing real attends to them, no target is among them, so they change
neither a loss nor a gradient.

N sequences, T tokens of all sequences together, P masked positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_ds.basics.micro_batch import Fillings, MicroBatch
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX

_STEPS_PER_OCTAVE = 16
"""Sizes from one power of two to the next: a filling is at most a sixteenth, half of that in the mean."""
_SMALLEST_STEP = 8


def size_above(number: int) -> int:
    """Return the smallest size that is at least `number`: multiples of 8, above 256 sixteen between powers of two."""
    return -(-number // _step(number)) * _step(number)


def filled(batch: MicroBatch) -> MicroBatch:
    """Return the batch with T, N and P filled up to sizes; of an evaluation, whose words lie by kind, T and N alone.

    A filling is no longer than the batch's longest sequence. How many there are depends on sizes alone, those that are
    not needed are empty.
    """
    num_tokens, num_sequences, longest = batch.input_ids_T.shape[0], batch.num_sequences, batch.max_seqlen
    tokens = size_above(num_tokens) - num_tokens
    sequences = size_above(num_sequences + _sequences_at_most(num_tokens, longest)) - num_sequences
    targets = dict(batch.targets)
    num_words = targets["masked_labels"].shape[0]
    words = 0 if batch.kind_counts else size_above(num_words) - num_words
    targets["masked_positions"] = _followed(targets["masked_positions"], words, num_tokens + tokens - 1)
    targets["masked_labels"] = _followed(targets["masked_labels"], words, IGNORE_INDEX)
    targets["pair_labels"] = _followed(targets["pair_labels"], sequences, IGNORE_INDEX)
    stream = (batch.input_ids_T, batch.token_type_ids_T, batch.position_ids_T, batch.cu_seqlens)
    filled_T = _filled_stream(*stream, tokens=tokens, sequences=sequences, longest=longest)
    return replace(
        batch,
        input_ids_T=filled_T[0],
        token_type_ids_T=filled_T[1],
        position_ids_T=filled_T[2],
        cu_seqlens=filled_T[3],
        targets=targets,
        fillings=Fillings(tokens, sequences, words),
    )


def filled_tokens(
    input_ids_T: Tensor, token_type_ids_T: Tensor, position_ids_T: Tensor, cu_seqlens: Tensor, *, longest: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream of a micro-batch on a CPU with T filled up to a size, in the order of the arguments.

    Args:
        input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens: see `MicroBatch`.
        longest: length of the longest sequence.
    """
    tokens = size_above(len(input_ids_T)) - len(input_ids_T)
    sequences = _sequences_at_most(len(input_ids_T), longest)
    stream = (input_ids_T, token_type_ids_T, position_ids_T, cu_seqlens)
    return _filled_stream(*stream, tokens=tokens, sequences=sequences, longest=longest)


def _filled_stream(
    input_ids_T: Tensor,
    token_type_ids_T: Tensor,
    position_ids_T: Tensor,
    cu_seqlens: Tensor,
    *,
    tokens: int,
    sequences: int,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the stream with so many tokens more, in sequences of their own, of which some may be empty."""
    lengths_N = torch.full((sequences,), longest).cumsum(0).clamp(max=tokens)
    return (
        # A piece that every vocabulary has: [CLS], with which the first sequence starts.
        _followed(input_ids_T, tokens, int(input_ids_T[0])),
        _followed(token_type_ids_T, tokens, 0),
        torch.cat((position_ids_T, torch.arange(tokens) % longest)),
        torch.cat((cu_seqlens, (len(input_ids_T) + lengths_N).int())),
    )


def _sequences_at_most(num_tokens: int, longest: int) -> int:
    """Return how many sequences of fillings there may be behind so many tokens."""
    return -(-(_step(num_tokens) - 1) // longest)


def _step(number: int) -> int:
    """Return how far sizes near `number` lie apart."""
    return max(_SMALLEST_STEP, (1 << max(number - 1, 0).bit_length() >> 1) // _STEPS_PER_OCTAVE)


def _followed(tensor: Tensor, times: int, value: int) -> Tensor:
    return F.pad(tensor, (0, times), value=value)
