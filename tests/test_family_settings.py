"""Settings of transformers' classes that this project reads or refuses by name, and windows at every length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from family_cases import FORMS, SPECIAL_IDS, disturbed, of_size, ragged, settings_of

from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.encoder.hf_mapping import hf_config, model_config_from_hf, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

MODERN: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 80,
    "initializer_range": 0.03,
    "initializer_cutoff_factor": 3.0,
    "norm_eps": 1e-4,
    "norm_bias": True,
    "attention_bias": True,
    "attention_dropout": 0.1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 50.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
    },
    "local_attention": 12,
    "embedding_dropout": 0.1,
    "mlp_bias": True,
    "mlp_dropout": 0.1,
    "decoder_bias": False,
    "classifier_pooling": "mean",
    "classifier_dropout": 0.1,
    "classifier_bias": True,
    "classifier_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": False,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 67,
    "dim": 32,
    "hidden_dim": 44,
    "n_layers": 5,
    "n_heads": 4,
    "activation": "gelu_new",
    "max_position_embeddings": 80,
    "initializer_range": 0.03,
    **dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.3),
}
ELECTRA: dict[str, Any] = {
    "vocab_size": 67,
    "embedding_size": 12,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.3,
    "attention_probs_dropout_prob": 0.3,
    "classifier_dropout": 0.2,
    "max_position_embeddings": 80,
    "type_vocab_size": 3,
    "initializer_range": 0.03,
    "layer_norm_eps": 1e-4,
}
ALBERT = {
    **{name: value for name, value in ELECTRA.items() if name != "classifier_dropout"},
    **{"num_hidden_groups": 3, "hidden_act": "gelu", "classifier_dropout_prob": 0.3},
}
ROBERTA = {
    **{name: value for name, value in ELECTRA.items() if name not in ("embedding_size", "type_vocab_size")},
    "pad_token_id": 3,
}
OTHERS = {"albert": ALBERT, "modernbert": MODERN, "distilbert": DISTIL, "electra": ELECTRA, "roberta": ROBERTA}
"""Another value of every field that makes another model, by family."""
CLASSES = {name: transformers.CONFIG_MAPPING[name] for name in OTHERS}
REASONS = {
    **dict.fromkeys(
        ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"),
        "of the tokenizer, written by the export; no score depends on it",
    ),
    "type_vocab_size": "of RoBERTa, where it is 1 alone: as below",
    "sinusoidal_pos_embds": "how positions begin; they are in the file",
    "tie_word_embeddings": "tied but for ModernBERT's; others are refused: test_family_starts",
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), "others are refused: as above"),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "use_cache"), "of decoders"),
    "summary_last_dropout": "of tasks, which set it",
    "inner_group_num": "layers of a group that differ; others than 1 are refused: as above",
    "deterministic_flash_attn": "how transformers' own kernel adds up",
    "sparse_prediction": "of transformers' loss alone: scores are of every token without labels",
    "sparse_pred_ignore_index": "see sparse_prediction",
}
LENGTHS = tuple(range(1, 201))


@pytest.mark.parametrize("family", OTHERS)
def test_every_field_of_transformers_is_read_written_or_without_an_effect(family: str) -> None:
    inherited = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(CLASSES[family])} - inherited
    assert OTHERS[family].keys() <= own <= OTHERS[family].keys() | REASONS.keys()


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in OTHERS.items() for name in names])
def test_a_field_of_transformers_is_read_and_written(family: str, name: str) -> None:
    base, wanted = settings_of(FORMS[family]).to_dict(), OTHERS[family][name]
    if name == "num_hidden_layers":
        base["layer_types"] = None
    before = model_config_from_hf(base)
    found = model_config_from_hf({**base, name: wanted})
    assert found.spelled_out() != before.spelled_out()
    written = hf_config(found, sentence_pair="none", special_ids=SPECIAL_IDS)
    assert written[name] == wanted
    read = CLASSES[family].from_dict(written).to_dict()
    assert read[name] == wanted
    assert model_config_from_hf(read).spelled_out() == found.spelled_out()


def test_the_names_of_transformers_4_say_the_same() -> None:
    written = hf_config(FORMS["modernbert, untied"], sentence_pair="none", special_ids=SPECIAL_IDS)
    older = {name: value for name, value in written.items() if name not in ("layer_types", "rope_parameters")}
    assert (older["global_attn_every_n_layers"], older["global_rope_theta"], older["local_rope_theta"]) == (2, 500, 80)
    assert model_config_from_hf(older).spelled_out() == FORMS["modernbert, untied"].spelled_out()


def test_a_pattern_that_transformers_4_cannot_say_stops_it_and_means_the_same_to_5() -> None:
    config = FORMS["modernbert, all biases"]
    written = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    # 4 divides the number of each layer by it, and takes 3 where the name is missing.
    assert written["global_attn_every_n_layers"] is None
    assert model_config_from_hf(transformers.ModernBertConfig.from_dict(written).to_dict()) == config


@pytest.mark.parametrize("local_attention", [128, 37])
def test_every_length_up_to_both_sides_of_the_window_has_the_scores_of_transformers(local_attention: int) -> None:
    config = of_size(FORMS["modernbert"], local_attention=local_attention, max_position_embeddings=256)
    assert isinstance(config, ModernBertConfig) and config.window in (64, 18)
    ours = disturbed(PretrainingModel(config, kernels="torch", has_pair_head=False)).double().eval()
    theirs = transformers.ModernBertForMaskedLM(settings_of(config)).double().eval()
    theirs.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    theirs.tie_weights()
    for first in range(0, len(LENGTHS), 40):
        padded, packed = ragged(config, LENGTHS[first : first + 40])
        mask_NS = padded["attention_mask"].bool()
        with torch.no_grad():
            wanted = theirs(**padded).logits[mask_NS]
            found = ours.logits(**packed, masked_positions_P=torch.arange(len(wanted))).mlm_PV
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    narrower = of_size(config, local_attention=local_attention - 2)
    other = disturbed(PretrainingModel(narrower, kernels="torch", has_pair_head=False)).double().eval()
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        differs = other.logits(**packed, masked_positions_P=torch.arange(len(wanted))).mlm_PV - wanted
    assert differs.abs().max() > 1e-3 * wanted.abs().max()
