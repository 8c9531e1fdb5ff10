"""Which tokenizer a family takes, and what is said of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_cases import RECIPE, changed, write_json
from corpus_fixtures import tiny_tokenizer, tiny_unigram
from family_cases import WIRED, of_size
from test_family_starts import refused

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer_for
from bert_ds.encoder.hf_mapping import hf_config
from bert_ds.encoder.pretrained import check_tokenizer


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"model.type": "roberta"},
            "pieces [PAD] [UNK] [CLS] [SEP] [MASK], RoBERTa wants <pad> <unk> <s> </s> <mask>: ",
        ),
        (
            {"corpus.tokenizer_kind": "bpe", "corpus.lowercase": False},
            "pieces <pad> <unk> <s> </s> <mask>, BERT wants [PAD] [UNK] [CLS] [SEP] [MASK]: wanted one that train_word",
        ),
        ({"corpus.tokenizer_kind": "unigram"}, 'lowercase is true, but "unigram" keeps capitals: wanted false'),
        (
            {"model.type": "roberta", "model.pad_token_id": 4096},
            "pad_token_id 4096 is no piece of a vocabulary of 4096",
        ),
        ({"model.type": "roberta", "model.type_vocab_size": 2}, "model.type_vocab_size: found 2, wanted <= 1"),
    ],
)
def test_a_tokenizer_that_is_not_the_family_s_is_refused(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    recipe = changed(RECIPE, "sequences.sentence_pair", "none")
    for path, value in changes.items():
        recipe = changed(recipe, path, value)
    assert wanted in refused(recipe, tmp_path)


def test_a_folder_s_tokenizer_has_the_special_pieces_and_the_padding_of_its_model(tmp_path: Path) -> None:
    words, subwords = tiny_tokenizer(), tiny_unigram()
    roberta = of_size(WIRED["roberta"], vocab_size=words.vocab_size)
    for tokenizer, name in ((words, "words"), (subwords, "subwords")):
        tokenizer.save(tmp_path / name)
    assert load_tokenizer_for(roberta, tmp_path / "subwords").fingerprint == subwords.fingerprint
    for model, name, wanted in (
        (roberta, "words", "RoBERTa wants <pad> <unk> <s> </s> <mask>: wanted one that train_tokenizer makes"),
        (WIRED["bert"], "subwords", r"BERT wants \[PAD\]"),
        (of_size(roberta, pad_token_id=0), "subwords", "<pad> has the id 1, model.pad_token_id is 0"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            load_tokenizer_for(model, tmp_path / name)
    facts = hf_config(roberta, sentence_pair="none", special_ids={"pad": 1, "cls": 0, "sep": 2})
    write_json(tmp_path, "config.json", facts)
    check_tokenizer(tmp_path, **subwords.identity)
    with pytest.raises(DataError, match=r"special pieces \[PAD\] .*, RoBERTa wants <pad>"):
        check_tokenizer(tmp_path, **words.identity)
