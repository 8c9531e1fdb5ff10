"""The layers of an encoder compiled, each with all that it calls in one graph.

Only layers are: what lies around them reads numbers that change with every batch. Their operators are those of
`bert_kernels`, which a graph calls as they are; the torch references look at lengths of sequences, which no graph can.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bert_ds.configuration.recipe.run_config import ConfigError

MOST_COMPILATIONS = 48
"""Of all layers of a model together; one more is an error. In training and in evaluation the first layer (which may
have nothing to add), those between and the last (which gives the tokens that are read alone) take up to four each: the
first shape as it is, then any dropout mask, any number of tokens, any number of sequences."""


def compile_layers(layers: Iterable[nn.Module], *, kernels: str) -> None:
    """Have every layer compiled when it is first called; names and weights of the model stay.

    A graph break is an error: it would slow the run down in silence.

    Args:
        layers: of the encoder, and of its generator.
        kernels: what the encoder computes with, "triton" or "torch".

    Raises:
        ConfigError: it computes with the torch references.
    """
    if kernels != "triton":
        raise ConfigError(
            "training.compile: found true, wanted false: without a GPU the torch references compute, which look at the "
            "lengths of sequences and cannot be compiled"
        )
    config = torch._dynamo.config
    # The number of a dropout mask is another in every layer: so it becomes an argument of one graph for all layers.
    config.allow_unspec_int_on_nn_module = True
    config.recompile_limit = max(config.recompile_limit, MOST_COMPILATIONS)
    for layer in layers:
        layer.compile(fullgraph=True)
