"""What the masked-word head of a pre-trained model says of texts: log-probabilities, in batches without padding.

The pseudo-log-likelihood of a text is the sum, over its pieces, of the log-probability of each when it alone is masked
(Salazar et al. 2020, arXiv 1910.14659).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.rows.features import encode_text
from bert_ds.encoder.pretraining_model import PretrainingModel

TOKENS_PER_BATCH = 8192
_TEXTS_AT_A_TIME = 512


class Query(NamedTuple):
    """One masked place of a sequence, and the pieces whose log-probability there is wanted."""

    input_ids: np.ndarray
    """int32 [n], from [CLS] to the last [SEP], with [MASK] at the place."""
    place: int
    pieces: np.ndarray
    """int32 [k]."""


@torch.no_grad()
def log_probabilities(
    model: PretrainingModel, queries: Sequence[Query], *, tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[np.ndarray]:
    """Return the log-probabilities, in nats, fp32 [k] for each query, in their order.

    Args:
        model: in evaluation mode, on the device where it is to run.
        queries: of any length up to that of the model; all tokens are of the first segment.
        tokens_per_batch: tokens of a forward pass at most; a longer query has a pass of its own.
    """
    found: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(queries)
    order = sorted(range(len(queries)), key=lambda index: -len(queries[index].input_ids))
    for group in _groups(order, [len(query.input_ids) for query in queries], tokens_per_batch):
        chosen = [queries[index] for index in group]
        for index, row in zip(group, _one_pass(model, chosen), strict=True):
            found[index] = row
    return found


def pseudo_log_likelihoods(model: PretrainingModel, tokenizer: TextTokenizer, texts: Sequence[str]) -> list[float]:
    """Return the pseudo-log-likelihood of each text, in nats.

    Raises:
        DataError: a text has no piece, or more than the model has positions for.
    """
    found: list[float] = []
    for first in range(0, len(texts), _TEXTS_AT_A_TIME):
        groups = [_one_masked_at_a_time(model, tokenizer, text) for text in texts[first : first + _TEXTS_AT_A_TIME]]
        rows = iter(log_probabilities(model, [query for group in groups for query in group]))
        found += [float(sum(next(rows)[0] for _ in group)) for group in groups]
    return found


def _one_masked_at_a_time(model: PretrainingModel, tokenizer: TextTokenizer, text: str) -> list[Query]:
    special = tokenizer.special_ids
    pieces = encode_text(tokenizer, text)
    longest = model.config.max_position_embeddings
    if not 1 <= len(pieces) <= longest - 2:
        raise DataError(f"the text {text[:60]!r} has {len(pieces)} pieces, wanted 1 to {longest - 2}")
    ids = np.concatenate(([special.cls], pieces, [special.sep])).astype(np.int32)
    queries = []
    for place in range(1, len(ids) - 1):
        masked = ids.copy()
        masked[place] = special.mask
        queries.append(Query(masked, place, ids[place : place + 1]))
    return queries


def _groups(order: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield runs of indices whose lengths add up to at most tokens_per_batch."""
    group: list[int] = []
    num_tokens = 0
    for index in order:
        if group and num_tokens + lengths[index] > tokens_per_batch:
            yield group
            group, num_tokens = [], 0
        group.append(index)
        num_tokens += lengths[index]
    if group:
        yield group


def _one_pass(model: PretrainingModel, queries: Sequence[Query]) -> list[np.ndarray]:
    device = next(model.parameters()).device
    lengths = [len(query.input_ids) for query in queries]
    starts = list(accumulate(lengths, initial=0))
    ids_T = torch.from_numpy(np.concatenate([query.input_ids for query in queries]).astype(np.int64)).to(device)
    positions_T = torch.cat([torch.arange(length) for length in lengths]).to(device)
    places_P = [start + query.place for start, query in zip(starts, queries, strict=False)]
    logits_PV = model.logits(
        masked_positions_P=torch.tensor(places_P, device=device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
        input_ids_T=ids_T,
        token_type_ids_T=torch.zeros_like(ids_T),
        position_ids_T=positions_T,
        max_seqlen=max(lengths),
    ).mlm_PV
    # host sync: the numbers are wanted here
    scores_PV = logits_PV.float().log_softmax(dim=-1).cpu().numpy()
    return [row[query.pieces] for row, query in zip(scores_PV, queries, strict=True)]
