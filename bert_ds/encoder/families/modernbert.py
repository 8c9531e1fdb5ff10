"""ModernBERT's encoder (Warner et al. 2024, arXiv 2412.13663) on token streams from which the padding is removed.

Rotary positions with a base of their own in layers that see everything and in those with a window, GeGLU, LayerNorm in
front of each block but the first and at the end. No positions, no segments. Letters as in `families/bert.py`; where a
parameter is read, and what dropout is a function of, is said there too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.micro_batch import BranchDraws
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.encoder.blocks import (
    Dropout,
    PassedOver,
    activated,
    at_their_tokens,
    first_rows,
    kept_branches,
    mean_rows,
    refuse_partitioned,
    require_seed,
    through_layers,
    where_nothing_drops,
)
from bert_ds.encoder.families.family import LAYER_MATRICES, Family, Role, RoleName
from bert_ds.encoder.fused_ops import FusedOps
from bert_ds.encoder.modernbert_layers import (
    EMBEDDING_SITE,
    SITES_PER_LAYER,
    ModernBertEmbeddings,
    ModernBertLayer,
    add_norm,
)
from bert_ds.encoder.tensor_rows import TensorRow, linear_rows
from bert_ds.encoder.word_head import MaskedWordHead


class ModernBertEncoder(nn.Module):
    """Token stream -> hidden states.

    Args:
        config: shape, windows, dropout and LayerNorm settings.
        ops: the table of fused operations.
        has_front: whether the dense layer between the encoder and the head of a task exists.
        activation_checkpointing: keep only what is carried between layers and recompute the rest in the backward pass.
    """

    stochastic_depth = 0.0
    """How often the last layer's blocks add nothing to a sequence, see `kept_branches`."""

    def __init__(
        self, config: ModernBertConfig, ops: FusedOps, *, has_front: bool = True, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        places = (config.attention_dropout, config.written_dropout, config.embedding_dropout, config.mlp_dropout)
        self.dropout_is_used = max(places) > 0
        self.embeddings = ModernBertEmbeddings(config, ops)
        self.layer = nn.ModuleList(ModernBertLayer(config, ops, layer=i) for i in range(config.num_hidden_layers))
        self.final_norm = add_norm(config, ops, dropout=Dropout(0.0, 0))
        self.reads_first_tokens = config.classifier_pooling == "cls"
        self.front = ModernBertFront(config, ops) if has_front else None

    def forward(
        self,
        input_ids_T: Tensor,
        token_type_ids_T: Tensor,
        *,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout_seed: Tensor | None = None,
        read_R: Tensor | None = None,
        passed_over: frozenset[int] = frozenset(),
        branches: BranchDraws | None = None,
    ) -> Tensor:
        """Encode a packed micro-batch.

        Args:
            input_ids_T, position_ids_T: int64 [T]; positions count from 0 in each sequence.
            token_type_ids_T: has no meaning here.
            cu_seqlens: int32 [N + 1], cu_seqlens[n] is the first token of sequence n; a sequence may be empty.
            max_seqlen: tokens of the longest sequence.
            dropout_seed: int64 [1], on the device of the ids; needed in training mode when the config has dropout.
            read_R: int64 [R], the tokens whose hidden states are read, where it is not all, see `through_layers`.
            passed_over: layers that have no effect, counted from 0.
            branches: what decides of a stochastic depth, needed in training mode where there is one.

        Returns:
            hidden_TD in the dtype of the parameters; rows that are not read have no meaning.
        """
        require_seed(self, dropout_seed, drops=self.dropout_is_used)
        read_R = where_nothing_drops(self, read_R, drops=self.dropout_is_used)
        hidden_TD = self.embeddings(input_ids_T, dropout_seed)
        stream = (position_ids_T, cu_seqlens, max_seqlen, dropout_seed)
        past = None
        if passed_over:
            past = PassedOver(passed_over, (position_ids_T[:0], torch.zeros_like(cu_seqlens), 0, dropout_seed))
        recompute = self.activation_checkpointing and self.training
        kept = kept_branches(self, branches, cu_seqlens, num_tokens=len(hidden_TD))
        how: dict[str, Any] = {"recompute": recompute, "read_R": read_R, "passed_over": past, "kept": kept}
        x_RD, residual_RD = through_layers(self.layer, (None, hidden_TD), *stream, **how)
        hidden_RD = self.final_norm(x_RD, residual_RD, dropout_seed)[0]
        return at_their_tokens(hidden_RD, read_R, num_tokens=len(input_ids_T))

    def sequence_rows(self, hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return what a head of whole sequences reads, [N, D]: their first token, or their mean, through the front."""
        assert self.front is not None, "the encoder was made without its front"
        if self.reads_first_tokens:
            return self.front(first_rows(hidden_TD, cu_seqlens))
        return self.front(mean_rows(hidden_TD, cu_seqlens).to(hidden_TD.dtype))

    def token_rows(self, hidden_TD: Tensor) -> Tensor:
        """Return what a head of tokens reads, [T, D]: each token through the front."""
        assert self.front is not None, "the encoder was made without its front"
        return self.front(hidden_TD)


class ModernBertFront(nn.Module):
    """Dense, activation, LayerNorm between the encoder and the head of a task, row by row."""

    def __init__(self, config: ModernBertConfig, ops: FusedOps) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.ops, self.eps, self.act = ops, config.norm_eps, config.classifier_activation
        self.dense_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(hidden_size)) if config.classifier_bias else None
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size)) if config.norm_bias else None

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Return [R, D]."""
        active_RD = activated(self.ops, F.linear(rows_RD, self.dense_weight, self.dense_bias), None, self.act)
        return self.ops.layer_norm(active_RD, self.layer_norm_weight, self.layer_norm_bias, self.eps)


@torch.no_grad()
def initialise_weights(module: nn.Module, config: ModernBertConfig, *, seed: int) -> None:
    """Fill every parameter as transformers does: normal, cut off; biases 0, LayerNorm 1 and 0.

    Its deviation is initializer_range; over sqrt(2 layers) for matrices that write to the residual stream, for the
    dense layer in front of a head and for an untied decoder; 1 / sqrt(hidden_size) for a task's classifier.

    Args:
        module: a ModernBertEncoder or a model that holds one.
        config: gives the deviations and vocab_size; rows of the vocabulary beyond it are zero and stay so.
        seed: of a generator of its own; torch's global random state is neither read nor changed.

    Raises:
        ValueError: the parameters are partitioned already (`deepspeed.zero.Init`), so there is nothing here to fill.
    """
    refuse_partitioned(module)
    generator = torch.Generator().manual_seed(seed)
    narrow = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in module.named_parameters():
        if name.endswith("layer_norm_weight"):
            parameter.fill_(1.0)
            continue
        if name.endswith("bias"):
            parameter.zero_()
            continue
        deviation = config.initializer_range
        if name.endswith(("output_weight", "dense_weight", "transform_weight", "decoder_weight")):
            deviation = narrow
        elif name.startswith("head."):
            deviation = config.hidden_size**-0.5
        cut = config.initializer_cutoff_factor * deviation
        nn.init.trunc_normal_(parameter, 0.0, deviation, -cut, cut, generator=generator)
        if name.endswith(("word_weight", "decoder_weight")):
            parameter[config.vocab_size :] = 0.0


def _word_head(config: ModernBertConfig, ops: FusedOps) -> MaskedWordHead:
    has = {"transform": config.classifier_bias, "layer_norm": config.norm_bias, "decoder": config.decoder_bias}
    return MaskedWordHead(
        config,
        ops,
        eps=config.norm_eps,
        act=config.classifier_activation,
        biases=tuple(name for name, is_there in has.items() if is_there),
        is_tied=config.tie_word_embeddings,
    )


_WORDS = "model.embeddings.tok_embeddings.weight"
_DECODER = "decoder.weight"
_LAYER_TYPES = {False: "full_attention", True: "sliding_attention"}
_THETAS = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
_REFUSED = {
    "rope_scaling": "none",
    "sliding_window": "local_attention, twice as much",
    "head_dim": "hidden_size over num_attention_heads",
}
"""What transformers would compute with, though its ModernBERTs do not say it."""
_NOT_WRITTEN = (
    *("type", "pad_vocab_size_to_multiple_of", "attention_output_dropout"),
    *("layer_types", "global_attn_every_n_layers"),
)


def encoder_rows(config: ModernBertConfig, *, has_front: bool) -> Iterator[TensorRow]:
    """Yield every tensor of the encoder, in the model's order."""
    hidden, inner, norm_bias = config.hidden_size, config.intermediate_size, config.norm_bias
    words = (config.padded_vocab_size, hidden)
    yield TensorRow("bert.embeddings.word_weight", words, (_WORDS,), config.vocab_size)
    yield from linear_rows("bert.embeddings.layer_norm", "model.embeddings.norm", hidden, has_bias=norm_bias)
    for layer in range(config.num_hidden_layers):
        name, hf_name = f"bert.layer.{layer}", f"model.layers.{layer}"
        if layer:
            yield from linear_rows(
                f"{name}.attention_norm.layer_norm", f"{hf_name}.attn_norm", hidden, has_bias=norm_bias
            )
        for ours, theirs, shape, has_bias in (
            ("attention.qkv", "attn.Wqkv", (3 * hidden, hidden), config.attention_bias),
            ("attention.output", "attn.Wo", (hidden, hidden), config.attention_bias),
            ("feed_forward_norm.layer_norm", "mlp_norm", (hidden,), norm_bias),
            ("feed_forward.intermediate", "mlp.Wi", (2 * inner, hidden), config.mlp_bias),
            ("feed_forward.output", "mlp.Wo", (hidden, inner), config.mlp_bias),
        ):
            yield from linear_rows(f"{name}.{ours}", f"{hf_name}.{theirs}", *shape, has_bias=has_bias)
    yield from linear_rows("bert.final_norm.layer_norm", "model.final_norm", hidden, has_bias=norm_bias)
    if has_front:
        yield from _head_rows("bert.front.dense", "bert.front.layer_norm", config)


def word_head_rows(config: ModernBertConfig) -> Iterator[TensorRow]:
    """Yield the tensors of the masked-word head."""
    yield from _head_rows("predictions.transform", "predictions.layer_norm", config)
    rows = config.padded_vocab_size
    if not config.tie_word_embeddings:
        yield TensorRow("predictions.decoder_weight", (rows, config.hidden_size), (_DECODER,), config.vocab_size)
    if config.decoder_bias:
        yield TensorRow("predictions.bias", (rows,), ("decoder.bias",), config.vocab_size)


def _head_rows(dense: str, norm: str, config: ModernBertConfig) -> Iterator[TensorRow]:
    hidden = config.hidden_size
    yield from linear_rows(dense, "head.dense", hidden, hidden, has_bias=config.classifier_bias)
    yield from linear_rows(norm, "head.norm", hidden, has_bias=config.norm_bias)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without rotary buffers and without a decoder that is the word embedding.

    An encoder alone has no `model.` in front of its names.
    """
    result = {
        f"model.{name}" if name.startswith(("embeddings.", "layers.", "final_norm.")) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("inv_freq")
    }
    decoder = result.get(_DECODER)
    if decoder is not None and _WORDS in result and torch.equal(decoder, result[_WORDS]):
        del result[_DECODER]
    return result


def hf_settings(config: ModernBertConfig, special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of config.json, under the names of transformers 5 and under those of 4.

    Where 4 has no word for what the layers see, null stands in its place: it fails to open the folder, and without the
    name it would compute with every third layer in silence.
    """
    ids = {name: special_ids[name] for name in ("pad", "cls", "sep")}
    ids |= {"bos": ids["cls"], "eos": ids["sep"]}
    kinds = [_LAYER_TYPES[has_window] for has_window in config.has_window]
    return {
        "model_type": "modernbert",
        **{name: value for name, value in config.model_dump().items() if name not in _NOT_WRITTEN},
        "layer_types": kinds,
        "global_attn_every_n_layers": _every_n_layers(config),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": getattr(config, theta)} for kind, theta in _THETAS.items()
        },
        **{f"{name}_token_id": value for name, value in ids.items()},
        "sparse_prediction": False,
        "dtype": "float32",
    }


def _every_n_layers(config: ModernBertConfig) -> int | None:
    """Return n where the first layer and every n-th from it see everything, no other; transformers 4 knows no more."""
    found, number = config.has_window, config.num_hidden_layers
    return next((n for n in range(1, number + 1) if found == tuple(layer % n != 0 for layer in range(number))), None)


def from_hf_settings(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return our settings of a config.json of transformers 4 or 5, and what this encoder cannot be."""
    names = [name for name in ModernBertConfig.model_fields if name not in _NOT_WRITTEN]
    settings = {name: content[name] for name in names if name in content}
    if (kinds := content.get("layer_types")) is not None:
        settings["layer_types"] = tuple(kinds) if isinstance(kinds, list) else kinds
    elif "global_attn_every_n_layers" in content:
        settings["global_attn_every_n_layers"] = content["global_attn_every_n_layers"]
    problems = [f"{name} is set, wanted {wanted}" for name, wanted in _REFUSED.items() if content.get(name) is not None]
    ropes = content.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping) or not all(isinstance(rope or {}, Mapping) for rope in ropes.values()):
        return settings, [*problems, f"rope_parameters is {repr(ropes)[:60]}, wanted an object of objects"]
    problems += [f"rope_parameters.{name} is no type of layer" for name in ropes if name not in _THETAS]
    for kind, theta in _THETAS.items():
        rope = ropes.get(kind) or {}
        if (found := rope.get("rope_type", rope.get("type", "default"))) != "default":
            problems.append(f'rope_parameters.{kind}.rope_type is {repr(found)[:60]}, wanted "default"')
        elif others := set(rope) - {"rope_type", "type", "rope_theta"}:
            problems.append(f"rope_parameters.{kind} has {', '.join(sorted(map(str, others)))[:60]}, wanted rope_theta")
        if "rope_theta" in rope:
            settings[theta] = rope["rope_theta"]
    return {**settings, "type": "modernbert"}, problems


def _roles(config: ModernBertConfig) -> dict[RoleName, Role]:
    with_classifier: dict[RoleName, str] = {
        "sequence classification": "ModernBertForSequenceClassification",
        "token tags": "ModernBertForTokenClassification",
        "question answering": "ModernBertForQuestionAnswering",
        "multiple choice": "ModernBertForMultipleChoice",
    }
    return {
        "masked words": Role("ModernBertForMaskedLM"),
        "encoder": Role("ModernBertModel"),
        **{name: Role(architecture, "classifier", reads_front=True) for name, architecture in with_classifier.items()},
    }


def _equal_parts(config: ModernBertConfig) -> dict[str, tuple[str, ...]]:
    parts = {"*qkv_weight": ("query", "key", "value"), "*intermediate_weight": ("input", "gate")}
    if config.attention_bias:
        parts["*qkv_bias"] = ("query", "key", "value")
    if config.mlp_bias:
        parts["*intermediate_bias"] = ("input", "gate")
    return parts


def _no_decay(config: ModernBertConfig) -> tuple[str, ...]:
    has_any = config.norm_bias or config.attention_bias or config.mlp_bias or config.decoder_bias
    return ("*layer_norm_weight", *(("*bias",) if has_any or config.classifier_bias else ()))


MODERNBERT = Family(
    make_encoder=ModernBertEncoder,
    word_head=_word_head,
    pair_head=None,
    initialise=initialise_weights,
    no_decay_patterns=_no_decay,
    equal_parts=_equal_parts,
    matrix_patterns=LAYER_MATRICES,
    roles=_roles,
    encoder_rows=encoder_rows,
    word_head_rows=word_head_rows,
    pair_head_rows=lambda config: iter(()),
    hf_head_prefixes=("decoder.", "classifier."),  # a masked-word class' `head.` is what tasks begin with
    hf_settings=hf_settings,
    from_hf_settings=from_hf_settings,
    modern_names=modern_names,
    first_free_site=lambda config: EMBEDDING_SITE + 1 + SITES_PER_LAYER * config.num_hidden_layers,
)
