"""Each setting of a family's model reaches its modules: another value makes another start or other losses.

That a recipe's model is the one that is trained, whole runs say (`test_recipe_settings`), of every family in one.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from family_cases import disturbed, ragged
from pydantic import TypeAdapter

from bert_ds.configuration.families.table import ModelSection
from bert_ds.encoder.pretraining_model import PretrainingModel

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 70,
    "pad_vocab_size_to_multiple_of": 48,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 32,
    "initializer_range": 0.03,
}
"""Another value of what every family has."""
BERT = {
    "hidden_act": "gelu_new",
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.3),
    "max_position_embeddings": 48,
    "type_vocab_size": 3,
    "layer_norm_eps": 1e-2,
}
PLACES = dict.fromkeys(("embedding_dropout_prob", "attention_output_dropout_prob", "feed_forward_dropout_prob"), 0.3)
MODERN = {
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_cutoff_factor": 1.0,
    "norm_eps": 1e-2,
    **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    **dict.fromkeys(("decoder_bias", "tie_word_embeddings"), False),
    "layer_types": ["sliding_attention", "full_attention"],
    "global_attn_every_n_layers": 1,
    "local_attention": 4,
    **dict.fromkeys(("global_rope_theta", "local_rope_theta"), 10.0),
    **dict.fromkeys(("attention_dropout", "attention_output_dropout", "embedding_dropout", "mlp_dropout"), 0.3),
    "classifier_activation": "gelu_pytorch_tanh",
}
OWN: dict[str, dict[str, Any]] = {"albert": {"embedding_size": 16}, "modernbert": {"local_attention": 8}}
"""What a family wants beside the small sizes."""
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {
        **BERT,
        **PLACES,
        "hidden_act": "gelu",
        "embedding_size": 8,
        "num_hidden_groups": 2,
        "shared_parts": "attention",
    },
    "distilbert": {
        **PLACES,
        "activation": "gelu_new",
        "dropout": 0.3,
        "attention_dropout": 0.3,
        "max_position_embeddings": 48,
    },
    "electra": {**BERT, **PLACES, "embedding_size": 8},
    "modernbert": MODERN,
    "roberta": {
        **{name: value for name, value in {**BERT, **PLACES}.items() if name != "type_vocab_size"},
        "pad_token_id": 2,
    },
}
CHANGES = {
    f"model:{family}.{name}": value
    for family, values in FAMILIES.items()
    for name, value in {**SIZES, **values}.items()
} | {f"model:bert.{name}": value for name, value in PLACES.items()}


def made_of(family: str, **changes: Any) -> tuple[dict[str, Any], list[float]]:
    """Weights at the start, and the losses of a step with dropout, of a model with these settings."""
    settings = {**SMALL, "type": family, **OWN.get(family, {}), **changes}
    config: Any = TypeAdapter(ModelSection).validate_json(json.dumps(settings))
    model = PretrainingModel(config, kernels="torch", has_pair_head=False, init_seed=5).train()
    weights = {name: (tuple(one.shape), one.double().sum().item()) for name, one in model.state_dict().items()}
    _, stream = ragged(config)
    targets = {"masked_positions": torch.arange(0, 64, 2), "masked_labels": torch.arange(5, 37)}
    with torch.no_grad():  # at the start attention is even and activations are straight
        losses, _ = disturbed(model)(**stream, targets=targets, dropout_seed=torch.tensor([5]))
    return weights, losses.tolist()


@cache
def unchanged(family: str) -> tuple[dict[str, Any], list[float]]:
    return made_of(family)


@pytest.mark.parametrize("path", CHANGES)
def test_another_value_of_a_model_s_setting_makes_another_model(path: str) -> None:
    family, _, name = path.removeprefix("model:").partition(".")
    assert made_of(family, **{name: CHANGES[path]}) != unchanged(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_settings_make_the_same_model(family: str) -> None:
    assert made_of(family) == unchanged(family)
