"""The table of kinds: everything that differs between tasks and needs torch, as plain functions.

A new kind is a row here, a row in `task_kinds.py` (what its files hold and what is measured), and a file of functions.
"""

from __future__ import annotations

from bert_ds.downstream.kinds import choice_kind, embedding_kind, qa_kind, tag_kinds, text_kinds, untrained_kinds
from bert_ds.downstream.kinds.kind import Kind

KINDS: dict[str, Kind] = {
    "classification": text_kinds.CLASSIFICATION,
    "multi_label": text_kinds.MULTI_LABEL,
    "regression": text_kinds.REGRESSION,
    "token_classification": tag_kinds.TOKEN_CLASSIFICATION,
    "intent_slot": tag_kinds.INTENT_SLOT,
    "multiple_choice": choice_kind.MULTIPLE_CHOICE,
    "question_answering": qa_kind.QUESTION_ANSWERING,
    "sentence_embedding": embedding_kind.SENTENCE_EMBEDDING,
}
"""Kinds that are trained."""

UNTRAINED: dict[str, untrained_kinds.ScoreKind] = {
    "prompted_classification": untrained_kinds.score_prompts,
    "minimal_pairs": untrained_kinds.score_minimal_pairs,
    "word_similarity": untrained_kinds.score_word_similarity,
}
"""Kinds that a pre-trained folder is scored on as it is; `masked_words` opens folders of other families too, itself."""
