"""Small encoders of every family, in the forms that a family has: what the tests of families are parametrised over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bert_ds.configuration.families.albert import AlbertConfig
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.distilbert import DistilBertConfig
from bert_ds.configuration.families.electra import ElectraConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.configuration.families.roberta import RobertaConfig
from bert_ds.encoder.hf_mapping import hf_config

SPECIAL_IDS = {"pad": 0, "cls": 2, "sep": 3}
_BERT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTIL: dict[str, Any] = {
    **{name: value for name, value in _BERT.items() if not name.endswith("_prob")},
    **dict.fromkeys(("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"), 0.0),
}
_MODERN: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "local_attention": 8,
}
_ALBERT: dict[str, Any] = {**_BERT, "embedding_size": 16, "classifier_dropout": 0.0}
_SHARED: dict[str, Any] = {**_ALBERT, "embedding_size": 24}
_FULL, _SLIDING = "full_attention", "sliding_attention"
FORMS: dict[str, EncoderConfig] = {
    "albert": AlbertConfig(**_ALBERT),
    "albert, groups, erf gelu": AlbertConfig(
        **{**_SHARED, "num_hidden_layers": 4}, num_hidden_groups=2, hidden_act="gelu"
    ),
    "albert, attention shared": AlbertConfig(**_SHARED, shared_parts="attention"),
    "albert, feed-forward shared in groups": AlbertConfig(
        **{**_SHARED, "num_hidden_layers": 4}, shared_parts="feed_forward", num_hidden_groups=2
    ),
    "bert": BertConfig(**_BERT),
    "bert, pre-norm": BertConfig(**_BERT, norm_position="pre", hidden_act="gelu_new"),
    "bert, sinusoids": BertConfig(**_BERT, positions="sinusoid"),
    "bert, silu": BertConfig(**_BERT, hidden_act="silu"),
    "distilbert": DistilBertConfig(**_DISTIL),
    "distilbert, tanh gelu": DistilBertConfig(**_DISTIL, activation="gelu_new"),
    "distilbert, relu": DistilBertConfig(**_DISTIL, activation="relu"),
    "electra": ElectraConfig(**_BERT, embedding_size=16),
    "electra, one width, tanh gelu": ElectraConfig(**_BERT, embedding_size=24, hidden_act="gelu_new"),
    "roberta": RobertaConfig(**_BERT),
    "roberta, other padding, tanh gelu": RobertaConfig(**_BERT, pad_token_id=4, hidden_act="gelu_new"),
    "modernbert": ModernBertConfig(**_MODERN),
    "modernbert, all biases": ModernBertConfig(
        **{**_MODERN, "local_attention": 7},
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        classifier_bias=True,
        layer_types=(_SLIDING, _FULL, _FULL, _SLIDING),
        classifier_pooling="mean",
        hidden_activation="gelu_pytorch_tanh",
        classifier_activation="gelu_pytorch_tanh",
    ),
    "modernbert, untied": ModernBertConfig(
        **_MODERN,
        tie_word_embeddings=False,
        decoder_bias=False,
        global_attn_every_n_layers=2,
        global_rope_theta=500.0,
        local_rope_theta=80.0,
        norm_eps=1e-3,
    ),
}
"""One form of each family is enough for what does not depend on its settings: see FAMILIES."""
FAMILIES = {name: config for name, config in FORMS.items() if "," not in name}
WIRED = {name: FORMS[name] for name in (*FAMILIES, "bert, pre-norm")}
"""What a user may do with an encoder is tested for each of these: one of each class of transformers."""
EVERY_FAMILY = pytest.mark.parametrize("config", WIRED.values(), ids=WIRED.keys())
OWN_LAYERS = ("bert", "modernbert")
"""Families whose layers are their own: what is slow and only repeats for the others is in make campaign-families."""


def disturbed(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Return the model with weights of which none is 0 or 1, padding rows of the vocabulary left alone."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if len(parameter) == config.padded_vocab_size:
                noise[config.vocab_size :] = 0.0
            parameter += (0.3 if parameter.dim() == 1 else 0.15) * noise
    return model


def of_size(config: EncoderConfig, **changes: Any) -> EncoderConfig:
    """Return the settings with other values, checked."""
    return type(config)(**{**config.model_dump(), **changes})


def settings_of(config: EncoderConfig) -> Any:
    """Return transformers' settings; its eager windows give NaN in fp64, its MegatronBert knows no other attention."""
    import transformers

    content = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    content.pop("dtype")
    return transformers.CONFIG_MAPPING[content["model_type"]].from_dict(
        {**content, "attn_implementation": "eager" if "megatron" in content["model_type"] else "sdpa"}
    )


def ragged(
    config: EncoderConfig, lengths: tuple[int, ...] = (23, 1, 40, 7)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return sequences of these lengths as transformers wants them, [N, S], and as our encoders do, [T]."""
    longest, generator = max(lengths), torch.Generator().manual_seed(1)
    mask_NS = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids_NS = torch.randint(5, config.vocab_size, mask_NS.shape, generator=generator) * mask_NS
    types_NS = torch.randint(max(1, config.num_segments), mask_NS.shape, generator=generator) * mask_NS
    padded = {"input_ids": ids_NS, "attention_mask": mask_NS.long()}
    if config.num_segments:
        padded["token_type_ids"] = types_NS
    packed = {
        "input_ids_T": ids_NS[mask_NS],
        "token_type_ids_T": types_NS[mask_NS],
        "position_ids_T": torch.arange(longest).expand_as(ids_NS)[mask_NS],
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": longest,
    }
    return padded, packed
