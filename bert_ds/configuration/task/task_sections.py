"""The sections of a task file: those of every task, then those of one kind. Standard library and pydantic only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.reading.config_section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from bert_ds.configuration.recipe.precision import PrecisionSetting
from bert_ds.configuration.task.task_data_config import TaskDataConfig
from bert_ds.configuration.task.task_kinds import CORRELATIONS


class FreezeConfig(Section):
    """Weights that stay as they were pre-trained."""

    embeddings: bool = False
    """The embeddings and their LayerNorm."""
    layers: NonNegativeInt = 0
    """The first layers of the encoder."""
    encoder: bool = False
    """The embeddings, all layers and the LayerNorm behind them: only what heads read through and head are trained."""


class TaskTrainingConfig(Section):
    """Length, global batch and precision."""

    epochs: PositiveFloat | None = None
    """Times that the training rows are seen; null is 3, unless total_steps is given."""
    total_steps: PositiveInt | None = None
    """Optimizer steps, instead of epochs."""
    train_batch_size: Annotated[int, Field(ge=1, le=2**24)] = 32
    """Sequences per optimizer step over all ranks."""
    precision: PrecisionSetting = "auto"
    """Dtype of weights and activations; optimizer state is always fp32. auto: bf16 on CUDA and where it is faster."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """auto: the Triton kernels on CUDA, torch elsewhere."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of the log and rows of metrics.jsonl."""


class TaskEvaluationConfig(Section):
    """When the validation rows are measured, and when that ends the run."""

    every_epochs: PositiveFloat | None = 1.0
    """Epochs between evaluations; null evaluates at the end only."""
    batch_size: PositiveInt = 64
    """Sequences per forward pass and rank."""
    patience: PositiveInt | None = None
    """Stop after this many evaluations in a row without a better metric; null never stops early."""


class TaskDistillationConfig(Section):
    """A larger model that is fine-tuned on the task teaches it (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: Annotated[str, Field(min_length=1)]
    """Folder of the teacher, with the same labels and the same tokenizer; the hf/ of a fine-tuning run."""
    temperature: Annotated[float, Field(gt=0.0, le=100.0)] = 2.0
    """Scores of both are divided by this before they become probabilities."""
    label_weight: NonNegativeFloat = 1.0
    """Weight of the labels themselves."""
    soft_weight: PositiveFloat = 1.0
    """Weight of what the teacher says."""


class QuestionAnsweringConfig(Section):
    """How contexts are cut, answers are chosen, and whose rules score them."""

    rules: Literal["squad1", "squad2", "cmrc"] = "squad1"
    """Normalisation and scores of the official script; squad2 alone has impossible questions."""
    stride: PositiveInt = 128
    """Pieces of the context from the beginning of a window to that of the next."""
    max_answer_pieces: PositiveInt = 30
    """Longest answer in pieces."""
    num_best: PositiveInt = 20
    """Answers that are kept per question, for nbest_predictions.json."""
    null_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """squad2: a question has no answer where the score of [CLS] is better than the best answer's by more than this."""


class EmbeddingConfig(Section):
    """What brings sentence vectors together: scored pairs, or pairs and triples of texts that belong together.

    Rows with a score are measured by correlations. Without one, text_pair is what text has to find among all of its
    side, and `negatives` (a column, or several, of texts or lists of texts, as many in every row) are there to be told
    from it. A text that is its own pair learns from two dropout masks (SimCSE).
    """

    loss: Literal["cosine", "cosent", "contrastive"] = "cosine"
    """cosine: squared error of the cosine against the score; cosent: pairs in the order of their scores; contrastive:
    of all texts of the step, on all ranks, find the partner (cross-entropy over scaled cosines)."""
    scale: PositiveFloat = 20.0
    """cosent and contrastive: cosines are multiplied by this."""
    max_score: PositiveFloat = 5.0
    """The score that stands for a cosine of 1; 0 stands for 0."""
    positive_score: PositiveFloat = 4.0
    """contrastive: a pair with at least this score has to be found; the others are there to be told from it."""
    matryoshka: tuple[PositiveInt, ...] = ()
    """Sizes that a vector may be cut to later: the loss is the mean of the losses at these and the whole size."""
    pooling: Literal["mean", "cls", "last_layers"] = "mean"
    """What of a text's tokens is its vector: the mean of all, the first one, or the mean of all in several layers."""
    pooled_layers: PositiveInt = 2
    """last_layers: how many, the last one among them."""
    query_prompt: Annotated[str, Field(max_length=1000)] = ""
    """Stands before each text, with a space of its own at the end; in the export sentence-transformers' "query"."""
    passage_prompt: Annotated[str, Field(max_length=1000)] = ""
    """Stands before each text_pair and each of the negatives; in the export "document"."""


class RetrievalConfig(Section):
    """What is done with the passages that vectors have found first."""

    reranker: Annotated[str, Field(min_length=1)]
    """Folder of a cross-encoder, which reads a query (text) and a passage (text_pair) together: a regression, or a
    classification whose last label says that both belong together."""
    depth: PositiveInt = 100
    """How many passages of each query it reads; those behind them keep their places."""


class PromptConfig(Section):
    """A prompt with a gap, and the words whose likeliness there decides."""

    template: Annotated[str, Field(min_length=1, max_length=2000)]
    """As in "{text} It was {label}."; {text_pair} where the task has one."""
    label_words: Annotated[dict[str, Annotated[tuple[str, ...], Field(min_length=1)]], Field(min_length=2)]
    """Label -> words that stand for it; a word may have several pieces."""
    num_shots: NonNegativeInt = 0
    """Training rows of each label that stand before the prompt as demonstrations, as far as there is room."""
    calibrate: bool = True
    """Subtract what a label word scores in the prompt of an empty text."""


def embedding_problems(settings: EmbeddingConfig, data: TaskDataConfig, metric: str | None) -> list[Problem]:
    """Return what does not go together in a task of sentence vectors."""
    problems = []
    if not data.gives("score") and settings.loss != "contrastive":
        text = f'is missing, wanted the column of the score: sentence_embedding.loss is "{settings.loss}"'
        problems.append(Problem("data.fields.score", text))
    if data.gives("negatives") and (data.gives("score") or settings.loss != "contrastive"):
        text = 'is for the sentence_embedding.loss "contrastive" over rows without a score'
        problems.append(Problem("data.fields.negatives", text))
    if metric is not None and (metric in CORRELATIONS) != data.gives("score"):
        wanted = "rows with a score" if metric in CORRELATIONS else "rows without a score"
        problems.append(Problem("metric", f'"{metric}" is of {wanted} (data.fields.score)'))
    return problems
