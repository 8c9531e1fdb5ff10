"""Sentence structure: whether the second segment is next, was before, or is of another document (arXiv 1908.04577).

Wang et al. (StructBERT, 2019) join next sentences and the order of sentences into one question of three answers.
transformers' heads for pairs have two classes, so an export has the first two: in order or swapped, as if the document
were known to be one. Letters as in `encoder/families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bert_ds.encoder.objectives.sentence_pair import SentencePair


class SentenceStructure(SentencePair):
    """Reads targets["pair_labels"], int64 [N]: 0 is next, 1 was before, 2 is of another document."""

    num_classes = 3


def two_classes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights with a head that tells the order alone, the scores of which stay as they are."""
    names = ("seq_relationship.weight", "seq_relationship.bias")
    return {name: tensor[:2].clone() if name in names else tensor for name, tensor in state_dict.items()}
