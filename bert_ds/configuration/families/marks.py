"""The two ways in which vocabularies call their special pieces, and write a pair."""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """How a vocabulary calls the special pieces, and how it writes a pair."""

    pad: str
    unk: str
    cls: str
    sep: str
    mask: str
    seps_between: int
    """How many `sep` stand between two texts."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """The five names, in the order of these fields."""
        return self[:5]


BERT_MARKS = Marks("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", seps_between=1)
ROBERTA_MARKS = Marks("<pad>", "<unk>", "<s>", "</s>", "<mask>", seps_between=2)
MARKS = {"bert": BERT_MARKS, "roberta": ROBERTA_MARKS}
"""`[CLS] A [SEP] B [SEP]`, and `<s> A </s></s> B </s>`."""
