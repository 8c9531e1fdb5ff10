from __future__ import annotations

import re

import pytest
import torch
from encoder_cases import small_config, spread_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.hf_mapping import from_hf, hf_config, model_config_from_hf, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

CONFIG = small_config()


def _state_dict(config: BertConfig, *, has_pair_head: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    model = PretrainingModel(config, has_pair_head=has_pair_head)
    spread_weights(model, config, seed)
    return model.state_dict()


@st.composite
def configs(draw: st.DrawFn) -> BertConfig:
    heads = draw(st.integers(1, 4))
    return BertConfig(
        vocab_size=draw(st.integers(8, 70)),
        pad_vocab_size_to_multiple_of=draw(st.sampled_from([1, 8, 64])),
        hidden_size=heads * draw(st.integers(1, 5)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 9)),
        hidden_act=draw(st.sampled_from(["gelu", "gelu_new"])),
        hidden_dropout_prob=draw(st.floats(0.0, 0.9)),
        max_position_embeddings=draw(st.integers(1, 9)),
        type_vocab_size=draw(st.integers(1, 3)),
        layer_norm_eps=draw(st.floats(1e-12, 1e-3)),
    )


@settings(max_examples=30, deadline=None)
@given(configs(), st.booleans(), st.integers(0, 99))
def test_to_hf_then_from_hf_is_the_identity(config: BertConfig, has_pair_head: bool, seed: int) -> None:
    state_dict = _state_dict(config, has_pair_head=has_pair_head, seed=seed)
    back = from_hf(to_hf(state_dict, config), config, has_pair_head=has_pair_head)
    assert list(back) == list(state_dict)
    assert [name for name in back if not torch.equal(back[name], state_dict[name])] == []


@settings(max_examples=30, deadline=None)
@given(configs(), st.sampled_from(["nsp", "sop", "none"]))
def test_the_model_section_survives_config_json(config: BertConfig, sentence_pair: str) -> None:
    facts = hf_config(config, sentence_pair=sentence_pair, special_ids={"pad": 0})
    multiple = config.pad_vocab_size_to_multiple_of
    assert model_config_from_hf(facts, pad_vocab_size_to_multiple_of=multiple) == config


def test_the_names_are_those_of_transformers() -> None:
    names = set(to_hf(_state_dict(small_config(num_hidden_layers=1)), small_config(num_hidden_layers=1)))
    layer = "bert.encoder.layer.0"
    dense = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    dense += [f"{layer}.attention.output.dense", f"{layer}.intermediate.dense", f"{layer}.output.dense"]
    dense += ["bert.pooler.dense", "cls.predictions.transform.dense", "cls.seq_relationship"]
    norms = ["bert.embeddings", f"{layer}.attention.output", f"{layer}.output", "cls.predictions.transform"]
    wanted = {f"{name}.{kind}" for name in dense for kind in ("weight", "bias")}
    wanted |= {f"{name}.LayerNorm.{kind}" for name in norms for kind in ("weight", "bias")}
    wanted |= {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    assert names == wanted | {"cls.predictions.bias"}


def test_without_pair_head_there_is_no_pooler() -> None:
    names = to_hf(_state_dict(CONFIG, has_pair_head=False), CONFIG)
    assert not [name for name in names if "pooler" in name or "seq_relationship" in name]


def test_the_padding_rows_are_cut_off() -> None:
    tensors = to_hf(_state_dict(CONFIG), CONFIG)
    assert tensors["bert.embeddings.word_embeddings.weight"].shape == (101, 24)
    assert tensors["cls.predictions.bias"].shape == (101,)


def test_query_key_and_value_are_the_three_blocks_in_this_order() -> None:
    state_dict = _state_dict(CONFIG)
    tensors = to_hf(state_dict, CONFIG)
    qkv = state_dict["bert.layer.1.attention.qkv_weight"]
    for index, part in enumerate(("query", "key", "value")):
        found = tensors[f"bert.encoder.layer.1.attention.self.{part}.weight"]
        assert torch.equal(found, qkv[24 * index : 24 * (index + 1)])


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        lambda name: name.removeprefix("bert."),
        lambda name: name.replace("cls.predictions.bias", "cls.predictions.decoder.bias"),
    ],
    ids=["gamma and beta", "no bert prefix", "decoder.bias"],
)
def test_old_names_are_understood(rename) -> None:
    state_dict = _state_dict(CONFIG)
    tensors = to_hf(state_dict, CONFIG)
    old = {rename(name): tensor for name, tensor in tensors.items()}
    assert set(old) != set(tensors)
    back = from_hf(old, CONFIG, has_pair_head=True)
    assert all(torch.equal(back[name], state_dict[name]) for name in state_dict)


def test_a_tied_decoder_and_position_ids_are_harmless() -> None:
    state_dict = _state_dict(CONFIG)
    tensors = to_hf(state_dict, CONFIG)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(37)[None]
    assert set(from_hf(tensors, CONFIG, has_pair_head=True)) == set(state_dict)


def test_an_untied_decoder_is_refused() -> None:
    tensors = to_hf(_state_dict(CONFIG), CONFIG)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1.0
    with pytest.raises(CheckpointError, match=r"decoder.weight differs"):
        from_hf(tensors, CONFIG, has_pair_head=True)


def test_one_tensor_under_two_names_with_two_values_is_refused() -> None:
    tensors = to_hf(_state_dict(CONFIG), CONFIG)
    tensors["embeddings.LayerNorm.gamma"] = tensors["bert.embeddings.LayerNorm.weight"] + 1.0
    with pytest.raises(CheckpointError, match=r"embeddings.LayerNorm.gamma is a second"):
        from_hf(tensors, CONFIG, has_pair_head=True)


def test_every_missing_unknown_and_misshapen_tensor_is_listed() -> None:
    tensors = to_hf(_state_dict(CONFIG), CONFIG)
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    tensors["module.extra"] = torch.zeros(1)
    tensors["cls.predictions.bias"] = torch.zeros(128)
    with pytest.raises(CheckpointError) as error:
        from_hf(tensors, CONFIG, has_pair_head=True)
    assert str(error.value) == (
        "3 wrong tensors: missing bert.encoder.layer.1.output.dense.bias; unknown module.extra; "
        "cls.predictions.bias has shape [128], wanted [101]"
    )


def test_a_wrong_state_dict_of_ours_is_refused() -> None:
    state_dict = _state_dict(CONFIG)
    state_dict["bert.layer.0.attention.qkv_weight"] = torch.zeros(0)
    with pytest.raises(CheckpointError, match=r"qkv_weight has shape \[0\], wanted \[72, 24\]"):
        to_hf(state_dict, CONFIG)


def test_a_pair_head_in_the_file_is_dropped_when_the_run_has_none() -> None:
    back = from_hf(to_hf(_state_dict(CONFIG), CONFIG), CONFIG, has_pair_head=False)
    assert set(back) == set(_state_dict(CONFIG, has_pair_head=False))


def test_a_missing_pair_head_is_refused_when_the_run_has_one() -> None:
    tensors = to_hf(_state_dict(CONFIG, has_pair_head=False), CONFIG)
    with pytest.raises(CheckpointError, match=r"missing bert.pooler.dense.weight.*missing cls.seq_relationship.bias"):
        from_hf(tensors, CONFIG, has_pair_head=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "xlnet"}, 'model_type is \'xlnet\', wanted "albert" or "bert"'),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', wanted 'absolute'"),
        ({"is_decoder": True}, "is_decoder is True, wanted False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, wanted True"),
        ({"_attn_implementation_internal": "evil/repository"}, "_attn_implementation_internal is a private setting"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
    ],
)
def test_a_config_json_that_this_model_cannot_be_is_refused(changes: dict, message: str) -> None:
    facts = {**hf_config(CONFIG, sentence_pair="nsp", special_ids={"pad": 0}), "_name_or_path": "somewhere", **changes}
    with pytest.raises(ConfigError, match=re.escape(message)):
        model_config_from_hf(facts)
