"""Word similarity: do the vectors of words stand to each other as people say the words do?

Two vectors of a word are tried: the mean of its pieces' rows of the input embedding, and the mean of what the encoder
makes of them in "[CLS] word [SEP]". Cosine, then Spearman's rank correlation with the human scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert_ds.basics.ranks import DataError
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.rows.features import encode_part

_WORDS_PER_BATCH = 512


class WordPair(NamedTuple):
    """Two words and how similar people find them."""

    left: str
    right: str
    score: float


class WordVectors(NamedTuple):
    """Vectors of words, fp32 [D] each."""

    embedding: dict[str, np.ndarray]
    encoder: dict[str, np.ndarray]


@torch.no_grad()
def word_vectors(encoder: Any, tokenizer: TextTokenizer, words: Sequence[str]) -> WordVectors:
    """Return both vectors of each word.

    Raises:
        DataError: a word has no piece.
    """
    ordered = sorted(set(words))
    pieces = [encode_part(tokenizer, word) for word in ordered]
    empty = [word for word, ids in zip(ordered, pieces, strict=True) if not len(ids)]
    if empty:
        raise DataError(f"the word {empty[0]!r} has no piece in this vocabulary")
    table = encoder.embeddings.word_weight
    embedding, encoded = {}, {}
    for first in range(0, len(ordered), _WORDS_PER_BATCH):
        part = slice(first, first + _WORDS_PER_BATCH)
        for word, ids, hidden_LD in zip(
            ordered[part], pieces[part], _hidden(encoder, tokenizer, pieces[part]), strict=True
        ):
            embedding[word] = table[torch.from_numpy(ids).long().to(table.device)].float().mean(dim=0).cpu().numpy()
            encoded[word] = hidden_LD[1:-1].float().mean(dim=0).cpu().numpy()
    return WordVectors(embedding, encoded)


def similarity_correlation(vectors: Mapping[str, np.ndarray], pairs: Sequence[WordPair]) -> float:
    """Return Spearman's correlation of cosine and human score over the pairs."""
    from scipy.stats import spearmanr

    cosines = [_cosine(vectors[pair.left], vectors[pair.right]) for pair in pairs]
    return float(spearmanr(cosines, [pair.score for pair in pairs]).statistic)


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def _hidden(encoder: Any, tokenizer: TextTokenizer, pieces: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    """Return the last hidden states of "[CLS] word [SEP]" for each word."""
    special = tokenizer.special_ids
    device = encoder.embeddings.word_weight.device
    rows = [torch.tensor([special.cls, *ids, special.sep]) for ids in pieces]
    lengths = [len(row) for row in rows]
    ids_T = torch.cat(rows).to(device)
    hidden_TD = encoder(
        ids_T,
        torch.zeros_like(ids_T),
        position_ids_T=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=torch.tensor([0, *lengths], device=device).cumsum(0).int(),
        max_seqlen=max(lengths),
    )
    return hidden_TD.split(lengths)
