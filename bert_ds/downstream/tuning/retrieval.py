"""Queries that have to find passages of a corpus, by the vectors of a folder and by BM25 beside it, without training.

The passages are those of `data.corpus`, of which `relevant` names some by id, or those that stand in the rows as
`text_pair`, with the ones of `data.corpus`. Every passage is read once; the search is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_problems import describe
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.kinds.embedding_kind import folder_settings
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.text_kinds import text_features
from bert_ds.downstream.kinds.untrained_kinds import Scored
from bert_ds.downstream.rows.examples import Example, Say, id_of, text_of
from bert_ds.downstream.rows.features import FeatureContext
from bert_ds.downstream.rows.records import Record, pick, read_records
from bert_ds.downstream.rows.splits import first_by_hash
from bert_ds.downstream.rows.tables import predictions_text
from bert_ds.downstream.scores.ranking import bm25_ranks, cosine_ranks, first_passages, ranking_figures, require_bm25
from bert_ds.downstream.tuning.reranking import ranks_of, reranked
from bert_ds.downstream.tuning.scorers import TorchScorer, scores_by_length
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.encoder.pretrained import load_pretrained, start_from


class Collection(NamedTuple):
    """What is searched, and what has to be found."""

    ids: list[str]
    """Of the queries."""
    queries: list[str]
    wanted: list[list[int]]
    """Of each query the places of its passages, at least one."""
    passages: list[str]


def score_retrieval(folder: Path, tokenizer: TextTokenizer, task: TaskConfig, say: Say) -> Scored:
    """Return the figures of a folder, pre-trained or of sentence vectors, and as parts those of BM25 and of a reranker.

    Raises:
        ConfigError, CheckpointError: the folder cannot be read, or bm25s is not installed.
        DataError: a row is not as the task says.
    """
    require_bm25()
    found = read_collection(task)
    ids, queries, wanted, passages = found
    say(f"{len(queries):,} queries, {len(passages):,} passages")
    settings = folder_settings(folder)
    vectors = _encoder(folder, tokenizer, task, say)
    of_queries = vectors([settings.query_prompt + text for text in queries])
    of_passages = vectors([settings.passage_prompt + text for text in passages])
    ranks = cosine_ranks(of_queries, of_passages, wanted)
    lines = [(query, ",".join(map(str, places))) for query, places in zip(ids, ranks, strict=True)]
    parts = {"bm25": ranking_figures(bm25_ranks(queries, passages, wanted))}
    if task.retrieval is not None:
        orders = first_passages(of_queries, of_passages, task.retrieval.depth)
        reranker, batch_size = Path(task.retrieval.reranker), task.evaluation.batch_size
        orders = reranked(reranker, queries, passages, orders, batch_size=batch_size)
        parts["reranked"] = ranking_figures(ranks_of(orders, ranks, wanted))
    facts = {"rows": {"validation": len(queries), "corpus": len(passages)}}
    return Scored(ranking_figures(ranks), {"predictions.tsv": predictions_text(lines)}, parts, facts)


def read_collection(task: TaskConfig) -> Collection:
    """Read queries and passages; queries of one text are one where the rows name passages by their text.

    Raises:
        DataError: a text is empty, an id comes twice, or a query has no passage or one that is not there.
    """
    by_id = task.data.gives("relevant")
    passages, places = _corpus(task, by_id=by_id)
    queries: dict[str, tuple[str, str, list[int]]] = {}
    seen: dict[str, str] = {}
    for index, record in enumerate(one for file in task.data.validation for one in read_records(file)):
        text, query = text_of(record, "text", task), id_of(record, index, task)
        _refuse_twice(query, seen, record, "id")
        keys = _relevant(record, task) if by_id else [text_of(record, "text_pair", task)]
        for key in keys:
            if by_id and key not in places:
                raise DataError(f"{record.where}: relevant is {describe(key)}, which is no passage_id of data.corpus")
            if key not in places:
                places[key] = len(passages)
                passages.append(key)
        _, _, wanted = queries.setdefault(query if by_id else text, (query, text, []))
        wanted += [places[key] for key in dict.fromkeys(keys) if places[key] not in wanted]
    rows = list(queries.values())
    kept = first_by_hash([text for _, text, _ in rows], task.data.max_validation_rows)
    ids, texts, wanted_of = zip(*(rows[index] for index in kept), strict=True)
    return Collection(list(ids), list(texts), list(wanted_of), passages)


def _corpus(task: TaskConfig, *, by_id: bool) -> tuple[list[str], dict[str, int]]:
    """Return the passages of the corpus, and the place of each by its id or its text."""
    passages: list[str] = []
    places: dict[str, int] = {}
    seen: dict[str, str] = {}
    for record in (one for file in task.data.corpus for one in read_records(file)):
        text = text_of(record, "passage", task)
        key = str(pick(record, task.data.fields["passage_id"])).strip() if by_id else text
        if by_id:
            _refuse_twice(key, seen, record, "passage_id")
        if key not in places:
            places[key] = len(passages)
            passages.append(text)
    return passages, places


def _relevant(record: Record, task: TaskConfig) -> list[str]:
    value = pick(record, task.data.fields["relevant"])
    keys = [str(key).strip() for key in (value if isinstance(value, list) else [value])]
    if not keys or not all(keys) or value is None:
        raise DataError(f"{record.where}: relevant is {describe(value)}, wanted the id of at least one passage")
    return keys


def _refuse_twice(key: str, seen: dict[str, str], record: Record, role: str) -> None:
    if key in seen:
        raise DataError(f"{record.where}: {role} {describe(key)} is also at {seen[key]}")
    seen[key] = record.where


def _encoder(
    folder: Path, tokenizer: TextTokenizer, task: TaskConfig, say: Say
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return what makes vectors of texts, fp32 [n, D]."""
    pretrained, kind = load_pretrained(folder), KINDS["sentence_embedding"]
    config, kernels = pretrained.config, task.training.kernels
    model = make_task_model(kind, config, {}, kernels=kernels, settings=folder_settings(folder))
    start_from(model, pretrained.tensors)
    scorer = TorchScorer(model.eval(), {}, device="cuda" if torch.cuda.is_available() else "cpu")
    longest = min(task.max_seq_length, config.max_position_embeddings)
    context = FeatureContext(tokenizer, task.model_copy(update={"max_seq_length": longest}), {}, say)

    def vectors(texts: Sequence[str]) -> np.ndarray:
        examples = [Example("", "", (text,), None) for text in texts]
        features = text_features(examples, context, lambda example, context: np.zeros(1))
        found_ND = np.empty((len(texts), config.hidden_size), dtype=np.float32)
        for place, scores in scores_by_length(scorer, features, batch_size=task.evaluation.batch_size):
            found_ND[place] = scores["vectors"][0]
        return found_ND

    return vectors
