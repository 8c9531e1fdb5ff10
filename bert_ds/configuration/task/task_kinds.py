"""The kinds of tasks: what their rows consist of and what is measured. Standard library only.

`downstream/kinds/table.py` has the functions of each kind.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

KindName = Literal[
    "classification",
    "multi_label",
    "regression",
    "token_classification",
    "intent_slot",
    "multiple_choice",
    "question_answering",
    "sentence_embedding",
    "prompted_classification",
    "minimal_pairs",
    "word_similarity",
    "masked_words",
    "retrieval",
]


class KindFacts(NamedTuple):
    """What a task file may say about a kind."""

    fields: tuple[str, ...]
    """What every row has."""
    optional_fields: tuple[str, ...]
    """What a row may have."""
    metrics: tuple[str, ...]
    """Figures that the best step can be chosen by; the first is the default."""
    own_formats: tuple[str, ...] = ()
    """Formats that bring the fields by themselves."""
    is_text: bool = False
    """Whether its files are running text without rows, and so all of the format "text"."""
    has_class_weights: bool = False
    can_be_taught: bool = False
    """Whether a teacher's scores can be learned from."""
    is_trained: bool = True
    """Whether finetune.py can train it; otherwise score.py scores a pre-trained folder on it as it is."""
    needs_train: bool = True
    """Whether data.train may not be empty."""
    section: str = ""
    """Section of the task file that is for this kind alone."""
    needs_section: bool = False
    """Whether that has no defaults."""
    probed_target: str = ""
    """Name of the targets that probe.py asks every layer for; "" where it cannot."""

    @property
    def roles(self) -> tuple[str, ...]:
        """All fields."""
        return (*self.fields, *self.optional_fields)


_MACRO = ("macro_f1", "macro_precision", "macro_recall")
_CLASSES = ("accuracy", *_MACRO, "micro_f1", "matthews")
ENTITY_METRICS = ("f1", "strict_f1", "conlleval_f1")
"""Of tags that mark entities; f1 is strict_f1."""
WORD_METRICS = (*_MACRO, "micro_f1")
"""Of tags that stand for themselves."""
CORRELATIONS = ("spearman", "pearson")
"""Of pairs with a score."""
RANKING_METRICS = ("ndcg_10", "mrr", "recall_1", "recall_10", "recall_100")
"""Of texts that have to find others."""

KIND_FACTS: dict[str, KindFacts] = {
    "classification": KindFacts(
        ("text", "label"),
        ("text_pair", "id"),
        _CLASSES,
        has_class_weights=True,
        can_be_taught=True,
        probed_target="label",
    ),
    "multi_label": KindFacts(("text", "labels"), ("text_pair", "id"), ("micro_f1", *_MACRO, "exact")),
    "regression": KindFacts(("text", "score"), ("text_pair", "id"), ("pearson", "spearman"), can_be_taught=True),
    "token_classification": KindFacts(
        ("words", "tags"),
        ("id",),
        (*ENTITY_METRICS, "accuracy", *WORD_METRICS),
        has_class_weights=True,
        can_be_taught=True,
        probed_target="tag",
    ),
    "intent_slot": KindFacts(("words", "tags", "intent"), ("id",), ("exact", "intent_accuracy", *ENTITY_METRICS)),
    "multiple_choice": KindFacts(("text", "choices", "label"), ("text_pair", "id"), ("accuracy",)),
    "question_answering": KindFacts((), (), ("f1", "exact_match"), ("squad",), section="question_answering"),
    "sentence_embedding": KindFacts(
        ("text", "text_pair"),
        ("score", "negatives", "id"),
        (*CORRELATIONS, *RANKING_METRICS),
        section="sentence_embedding",
    ),
    "prompted_classification": KindFacts(
        ("text", "label"), ("text_pair", "id"), _CLASSES, is_trained=False, section="prompt", needs_section=True
    ),
    "minimal_pairs": KindFacts(("good", "bad", "paradigm"), (), ("accuracy",), is_trained=False, needs_train=False),
    "word_similarity": KindFacts(
        ("left", "right", "score", "set"), (), ("encoder", "embedding"), is_trained=False, needs_train=False
    ),
    "masked_words": KindFacts(
        (), (), ("loss_mlm_masked", "nats_per_character"), is_text=True, is_trained=False, needs_train=False
    ),
    "retrieval": KindFacts(
        ("text",),
        ("text_pair", "relevant", "id", "passage", "passage_id"),
        RANKING_METRICS,
        is_trained=False,
        needs_train=False,
        section="retrieval",
    ),
}
