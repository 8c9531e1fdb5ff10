from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from export_cases import CONFIG, PIECES, export, spread_state_dict, write_tokenizer

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.untrained import word_similarity
from bert_ds.downstream.untrained.masked_scores import pseudo_log_likelihoods
from bert_ds.downstream.untrained.minimal_pairs import MinimalPair, judge_pairs, pair_accuracies
from bert_ds.downstream.untrained.prompts import Prompt, PromptWriter, Shot, check_prompt, prompt_scores
from bert_ds.downstream.untrained.word_similarity import WordPair, similarity_correlation, word_vectors
from bert_ds.encoder.pretraining_model import PretrainingModel

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
PROMPT = Prompt("{text}, the {label}.", {"yes": ["a"], "no": ["bcd", "e"]})


@pytest.fixture(scope="module")
def model() -> PretrainingModel:
    model = PretrainingModel(CONFIG, kernels="torch")
    model.load_state_dict(spread_state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedModel:
    """The same weights as transformers loads them."""
    folder = tmp_path_factory.mktemp("hf")
    export(folder, write_tokenizer(tmp_path_factory.mktemp("tokenizer")), spread_state_dict())
    return transformers.BertForMaskedLM.from_pretrained(folder).eval()


def masked_log_probability(theirs: transformers.PreTrainedModel, ids: list[int], place: int) -> float:
    """log p of ids[place] where it alone is masked, by transformers."""
    masked = torch.tensor([ids])
    masked[0, place] = TOKENIZER.special_ids.mask
    with torch.no_grad():
        return theirs(masked).logits[0, place].log_softmax(-1)[ids[place]].item()


def ids_of(text: str) -> list[int]:
    return [2, *TOKENIZER.backend.encode(text, add_special_tokens=False).ids, 3]


def test_pseudo_log_likelihoods_are_sums_over_pieces_masked_one_at_a_time(
    model: PretrainingModel, theirs: transformers.PreTrainedModel
) -> None:
    texts = ["the reading.", "中", "cab, the 文"]
    wanted = [
        sum(masked_log_probability(theirs, ids, place) for place in range(1, len(ids) - 1))
        for ids in map(ids_of, texts)
    ]
    assert pseudo_log_likelihoods(model, TOKENIZER, texts) == pytest.approx(wanted, abs=1e-4)


def test_a_text_without_pieces_or_longer_than_the_model_is_refused(model: PretrainingModel) -> None:
    with pytest.raises(DataError, match="has 0 pieces, wanted 1 to 35"):
        pseudo_log_likelihoods(model, TOKENIZER, ["\u200d"])
    with pytest.raises(DataError, match="has 36 pieces, wanted 1 to 35"):
        pseudo_log_likelihoods(model, TOKENIZER, ["the", "a " * 36])


def test_the_likelier_sentence_of_a_pair_is_the_good_one(model: PretrainingModel) -> None:
    one, other = "the cab.", "the bac."
    scores = dict(zip((one, other), pseudo_log_likelihoods(model, TOKENIZER, [one, other]), strict=True))
    likely, unlikely = sorted(scores, key=scores.__getitem__, reverse=True)
    pairs = [
        MinimalPair(likely, unlikely, "x"),
        MinimalPair(unlikely, likely, "x"),
        MinimalPair(likely, unlikely, "x"),
        MinimalPair(likely, unlikely, "x"),
        MinimalPair(likely, unlikely, "y"),
        MinimalPair(one, one, "z"),
    ]
    judged = judge_pairs(model, TOKENIZER, pairs)
    assert pair_accuracies(judged) == {
        **{"accuracy": (0.75 + 1.0 + 0.0) / 3, "accuracy_x": 0.75, "accuracy_y": 1.0, "accuracy_z": 0.0}
    }


def test_a_label_scores_the_mean_over_its_words_and_a_word_the_mean_over_its_pieces(
    model: PretrainingModel, theirs: transformers.PreTrainedModel
) -> None:
    writer = PromptWriter(TOKENIZER, PROMPT, 37)
    found = prompt_scores(model, writer, [["中文"]], calibrate=False)

    def word_score(word: str, num_pieces: int) -> float:
        ids, start = ids_of(f"中文, the {word}."), len(ids_of("中文, the")) - 1
        return float(np.mean([masked_log_probability(theirs, ids, start + index) for index in range(num_pieces)]))

    wanted = {"yes": word_score("a", 1), "no": (word_score("bcd", 3) + word_score("e", 1)) / 2}
    assert found.scores[0] == pytest.approx(wanted, abs=1e-4)
    for shots in ((), [Shot(["b"], "yes")]):
        plain, empty = (
            prompt_scores(model, writer, [[text]], shots=shots, calibrate=False).scores[0] for text in ("中文", " ")
        )
        calibrated = prompt_scores(model, writer, [["中文"]], shots=shots).scores[0]
        assert calibrated == pytest.approx({label: plain[label] - empty[label] for label in wanted}, abs=1e-4)


def test_demonstrations_stand_before_the_prompt_as_far_as_there_is_room() -> None:
    shots = [Shot(["b"], "yes"), Shot(["c"], "no"), Shot(["d"], "yes")]
    context = PromptWriter(TOKENIZER, PROMPT, 21).context(["x"], shots)
    assert TOKENIZER.decode(context.before.tolist()) == "[CLS] c, the bcd. b, the a. x, the"
    assert TOKENIZER.decode(context.after.tolist()) == ". [SEP]"
    assert context.num_shots == 2
    assert PromptWriter(TOKENIZER, PROMPT, 13).context(["x"], shots).num_shots == 0


def test_a_long_text_is_cut_and_the_prompt_is_not() -> None:
    context = PromptWriter(TOKENIZER, PROMPT, 12).context(["x y z a b c d e f"], [])
    assert TOKENIZER.decode(context.before.tolist()) == "[CLS] x y z a, the"
    pair = Prompt("{text} the {text_pair} {label}", {"yes": ["a"]})
    context = PromptWriter(TOKENIZER, pair, 9).context(["x y z a b c", "d e f"], [])
    assert TOKENIZER.decode(context.before.tolist()) == "[CLS] x y the d e f"
    with pytest.raises(ConfigError, match="needs 8 tokens without any text, wanted at most max_seq_length 7"):
        PromptWriter(TOKENIZER, PROMPT, 7)


@pytest.mark.parametrize(
    ("prompt", "num_texts", "message"),
    [
        (Prompt("{text} the", {"x": ["a"]}), 1, r"has the gaps \['text'\], wanted each of \['text', 'label'\] once"),
        (Prompt("{text} {label}", {"x": ["a"]}), 2, r"wanted each of \['text', 'text_pair', 'label'\] once"),
        (Prompt("{text} {label}", {"x": ["a", "北"]}), 1, r"label_words.x: '北' is not in the vocabulary"),
        (Prompt("{text} {label}", {"x": [" "]}), 1, "label_words.x: ' ' is not in the vocabulary"),
    ],
)
def test_a_prompt_without_its_gaps_or_with_unknown_words_is_refused(
    prompt: Prompt, num_texts: int, message: str
) -> None:
    check_prompt(PROMPT, TOKENIZER, num_texts=1)
    with pytest.raises(ConfigError, match=message):
        check_prompt(prompt, TOKENIZER, num_texts=num_texts)


def test_words_of_several_batches_have_the_vectors_of_one(
    model: PretrainingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["cab", "the", "a", "bcd", "e"]
    whole = word_vectors(model.bert, TOKENIZER, words)
    monkeypatch.setattr(word_similarity, "_WORDS_PER_BATCH", 2)
    for found, wanted in zip(word_vectors(model.bert, TOKENIZER, words), whole, strict=True):
        for word in words:
            np.testing.assert_allclose(found[word], wanted[word], atol=1e-5, err_msg=word)


def test_word_vectors_are_means_over_pieces_and_correlate_by_rank(
    model: PretrainingModel, theirs: transformers.PreTrainedModel
) -> None:
    vectors = word_vectors(model.bert, TOKENIZER, ["cab", "the"])
    ids = torch.tensor([ids_of("cab")])
    with torch.no_grad():
        hidden = theirs.bert(ids).last_hidden_state[0, 1:-1].mean(0)
        rows = theirs.bert.embeddings.word_embeddings(ids)[0, 1:-1].mean(0)
    assert np.abs(vectors.encoder["cab"] - hidden.numpy()).max() < 1e-5
    assert np.abs(vectors.embedding["cab"] - rows.numpy()).max() < 1e-6
    angles = {name: np.array([math.cos(x), math.sin(x)]) for name, x in (("a", 0), ("b", 0.1), ("c", 0.5), ("d", 3))}
    pairs = [WordPair("a", "b", 9.0), WordPair("a", "c", 7.5), WordPair("a", "d", 1.0)]
    assert similarity_correlation(angles, pairs) == pytest.approx(1.0)
    with pytest.raises(DataError, match=r"the word '\\u200d' has no piece"):
        word_vectors(model.bert, TOKENIZER, ["\u200d"])
