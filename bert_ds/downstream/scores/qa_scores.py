"""Scores of extractive question answering by the official rules of SQuAD 1.1, SQuAD 2.0 and CMRC 2018.

Written after the datasets' scripts: evaluate-v1.1.py and evaluate-v2.0.py (github.com/rajpurkar/SQuAD-explorer) and
cmrc2018_evaluate.py (github.com/ymcui/cmrc2018). All scores are per cent. Where the scripts pass over a question that
has no prediction, these functions raise.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

Rules = Literal["squad1", "squad2", "cmrc"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CMRC_HAN = re.compile(r"[\u4e00-\u9fa5]")
_LATIN_WORD_ENDS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r'(?:^|(?<=[\s(\[{<]))"'), " `` "),
    (re.compile(r"(?<!\.)\.(?=[\])}>\"' ]*$)"), " . "),
    (re.compile(r'"'), " '' "),
    (re.compile(r"\.\.+|[;@#$%&?!*()\[\]{}<>«»‘—–]"), r" \g<0> "),
    (re.compile(r",(?!\d)"), " , "),
    (re.compile(r"(?<=[^'\s])'(?=\s|$)"), " ' "),
    (re.compile(r"(?<=[^'\s])('[smd]|'ll|'re|'ve|n't)(?=\s|$)"), r" \1"),
)
"""The Penn Treebank rules (nltk's `word_tokenize`, which CMRC's script uses) as far as they matter to an answer."""


class Threshold(NamedTuple):
    """The score that is best for a no-answer threshold chosen on the same questions, and that threshold."""

    score: float
    threshold: float


def answer_scores(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    *,
    rules: Rules,
    no_answer_scores: Mapping[str, float] | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Return exact match and F1 over all questions.

    Args:
        gold: texts that count as right, by question; none for an impossible question, which only SQuAD 2.0 has.
        predictions: the answer found, by question. For SQuAD 2.0 that is the best non-empty one where
            `no_answer_scores` is given, and "" means no answer.
        rules: whose normalisation, and what an empty text is worth.
        no_answer_scores: SQuAD 2.0: how strongly each question looks impossible; above `threshold` it is taken for so.
        threshold: see above.

    Returns:
        "exact_match" and "f1"; for SQuAD 2.0 also those of the questions with and without an answer, and, with
        `no_answer_scores`, the best score over all thresholds with its threshold, as the official script has it.

    Raises:
        ValueError: a question has no prediction, or an impossible one is scored by rules that know none.
    """
    _refuse_gaps(gold, predictions, rules)
    exact = {key: _best(_EXACT[rules], texts, predictions[key]) for key, texts in gold.items()}
    f1 = {key: _best(_F1[rules], texts, predictions[key]) for key, texts in gold.items()}
    if rules != "squad2":
        return {"exact_match": _mean(exact.values()), "f1": _mean(f1.values())}
    found: dict[str, float] = {}
    decided = [exact, f1]
    if no_answer_scores is not None:
        for name, raw in (("exact_match", exact), ("f1", f1)):
            best = best_threshold(gold, predictions, raw, no_answer_scores=no_answer_scores)
            found |= {f"best_{name}": best.score, f"best_{name}_threshold": best.threshold}
        decided = [_with_threshold(raw, gold, no_answer_scores, threshold) for raw in decided]
    for name, scores in zip(("exact_match", "f1"), decided, strict=True):
        found[name] = _mean(scores.values())
        for group, has_answer in (("has_answer", True), ("no_answer", False)):
            part = [score for key, score in scores.items() if bool(gold[key]) == has_answer]
            if part:
                found[f"{group}_{name}"] = _mean(part)
    return found


def best_threshold(
    gold: Mapping[str, Sequence[str]],
    predictions: Mapping[str, str],
    scores: Mapping[str, float],
    *,
    no_answer_scores: Mapping[str, float],
) -> Threshold:
    """Return the best mean of `scores` that a no-answer threshold can reach, and the smallest threshold that does.

    Every question starts as unanswered; answering them in order of rising no-answer score changes the sum by each one's
    score, or by -1 where an impossible question gets an answer. `find_best_thresh` of evaluate-v2.0.py.
    """
    current = best = float(sum(not texts for texts in gold.values()))
    threshold = 0.0
    for key in sorted(gold, key=no_answer_scores.__getitem__):
        if gold[key]:
            current += scores[key]
        elif predictions[key]:
            current -= 1.0
        if current > best:
            best, threshold = current, no_answer_scores[key]
    return Threshold(100.0 * best / len(gold), threshold)


def squad_normalised(text: str) -> str:
    """Return lower case without ASCII punctuation and English articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def cmrc_units(text: str) -> list[str]:
    """Return what CMRC's F1 counts: every Chinese character alone, other text in words, its punctuation left out."""
    units: list[str] = []
    rest = ""
    for character in text.lower().strip():
        if character in _CMRC_PUNCTUATION:
            continue
        if _CMRC_HAN.match(character):
            units += [*_latin_words(rest), character]
            rest = ""
        else:
            rest += character
    return units + _latin_words(rest)


def _latin_words(text: str) -> list[str]:
    for pattern, replacement in _LATIN_WORD_ENDS:
        text = pattern.sub(replacement, text)
    return text.split()


def _squad_exact(gold: str, predicted: str) -> float:
    return float(squad_normalised(gold) == squad_normalised(predicted))


def _squad1_f1(gold: str, predicted: str) -> float:
    gold_words, words = squad_normalised(gold).split(), squad_normalised(predicted).split()
    return _f1((Counter(gold_words) & Counter(words)).total(), len(words), len(gold_words))


def _squad2_f1(gold: str, predicted: str) -> float:
    gold_words, words = squad_normalised(gold).split(), squad_normalised(predicted).split()
    if not gold_words or not words:
        return float(gold_words == words)
    return _squad1_f1(gold, predicted)


def _cmrc_exact(gold: str, predicted: str) -> float:
    gold_kept, kept = (
        "".join(character for character in text.lower().strip() if character not in _CMRC_PUNCTUATION)
        for text in (gold, predicted)
    )
    return float(gold_kept == kept)


def _cmrc_f1(gold: str, predicted: str) -> float:
    gold_units, units = cmrc_units(gold), cmrc_units(predicted)
    return _f1(_longest_common_run(gold_units, units), len(units), len(gold_units))


_EXACT: dict[Rules, Callable[[str, str], float]] = {
    "squad1": _squad_exact,
    "squad2": _squad_exact,
    "cmrc": _cmrc_exact,
}
_F1: dict[Rules, Callable[[str, str], float]] = {"squad1": _squad1_f1, "squad2": _squad2_f1, "cmrc": _cmrc_f1}


def _f1(num_common: int, num_predicted: int, num_gold: int) -> float:
    """Return the harmonic mean of common/predicted and common/gold."""
    return 2.0 * num_common / (num_predicted + num_gold) if num_common else 0.0


def _longest_common_run(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest run of units that both hold without a gap."""
    longest = 0
    above = [0] * (len(right) + 1)
    for unit in left:
        row = [0] * (len(right) + 1)
        for column, other in enumerate(right, start=1):
            if unit == other:
                row[column] = above[column - 1] + 1
        longest = max(longest, *row)
        above = row
    return longest


def _best(score: Callable[[str, str], float], gold: Sequence[str], predicted: str) -> float:
    """Return the score against the nearest gold text; an impossible question wants the empty text.

    Gold texts of which the normalisation leaves nothing count for nothing beside others, as in evaluate-v2.0.py.
    """
    if score in (_squad2_f1, _squad_exact):
        gold = [text for text in gold if squad_normalised(text)] or [""]
    return max(score(text, predicted) for text in gold)


def _with_threshold(
    scores: Mapping[str, float],
    gold: Mapping[str, Sequence[str]],
    no_answer_scores: Mapping[str, float],
    threshold: float,
) -> dict[str, float]:
    return {key: float(not gold[key]) if no_answer_scores[key] > threshold else score for key, score in scores.items()}


def _mean(scores: Iterable[float]) -> float:
    values = list(scores)
    return 100.0 * sum(values) / len(values)


def _refuse_gaps(gold: Mapping[str, Sequence[str]], predictions: Mapping[str, str], rules: Rules) -> None:
    missing = [key for key in gold if key not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} of {len(gold)} questions have no prediction, the first is {missing[0]!r}")
    impossible = [key for key, texts in gold.items() if not texts]
    if impossible and rules != "squad2":
        raise ValueError(
            f"question {impossible[0]!r} has no gold answer, which only the rules squad2 know; found {rules}"
        )
    if not gold:
        raise ValueError("there is no question to score")
