"""unpad, repad and describe: the only functions that a user calls."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from bert_kernels.hf import forwards
from bert_kernels.hf.class_swap import register, state_of, swap, swap_back
from bert_kernels.hf.families import (
    ANSWERS,
    DECODERS,
    ENCODER,
    FAMILIES,
    SUMMARY,
    TOKEN_LABELS,
    Needs,
    Part,
    parts_of,
)
from bert_kernels.hf.forwards import EncoderState, HeadState
from bert_kernels.hf.layers import fused_layer
from bert_kernels.hf.operators import ATTENTION_NAME, SITE, SITES_OF_A_LAYER, Kernels, register_attention

register_attention()
register("encoder", forwards.encoder)
register("pooled_encoder", forwards.pooled_encoder)
register("word_head", forwards.word_head)
register("token_head", forwards.token_head)
register("answer_head", forwards.answer_head)
register("layer", fused_layer)

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.", "deepspeed.")
Model = TypeVar("Model", bound=nn.Module)


def unpad(model: Model, *, kernels: Kernels = "auto", answers_at_real_tokens: bool = False) -> Model:
    """Let every BERT-class encoder of transformers inside `model` compute without padding; return `model`.

    Padding is taken out once, before the embeddings, and put back once, after the last layer, as zeros. Parameters,
    state_dict, class names, signatures and config.json stay. Call it before Trainer, DDP, FSDP, DeepSpeed or
    torch.compile take the model; README.md of this package lists what differs.

    Args:
        model: anything that holds a bert, roberta, electra, distilbert or modernbert model of transformers, with any
            head: a SentenceTransformer, a CrossEncoder, a peft model, your own module. Changed in place.
        kernels: "auto" fuses layers of BERT's shape by Triton operators on CUDA and leaves transformers' own layers,
            with attention by sequence, on a CPU; "triton" takes the Triton operators everywhere, "torch" their torch
            references, with the same dropout masks.
        answers_at_real_tokens: let the softmax in the loss of question answering run over the real tokens of a row, as
            it does in the plain model where each row comes without padding. The plain model's own loss of a padded
            batch compares with padding too, whose logits are not computed here: False refuses to train on it.

    Raises:
        ValueError: there is nothing to unpad, it is unpadded already, or it is one of what cannot be unpadded.
    """
    if kernels not in ("auto", "triton", "torch"):
        raise ValueError(f"kernels is {kernels!r}, wanted 'auto', 'triton' or 'torch'")
    parts = parts_of(model)
    _refuse(model, parts)
    needs = _needs(parts)
    # Two encoders may share a config: what it said is noted before the first change.
    before = {id(part.module.config): part.module.config._attn_implementation for part in parts if part.name == ENCODER}
    for part in parts:
        if part.name == ENCODER:
            _unpad_encoder(part, kernels, needs=needs, attention_before=before[id(part.module.config)])
        elif part.is_own:  # a person's own forward reads what it likes
            _unpad_head(part, answers_at_real_tokens=answers_at_real_tokens)
    return model


def repad(model: Model) -> Model:
    """Undo unpad(model), in place; return `model`.

    Raises:
        ValueError: nothing in it is unpadded, or something has wrapped it.
    """
    changed = [module for module in model.modules() if state_of(module) is not None]
    if not changed:
        raise ValueError(f"{type(model).__name__} is not unpadded")
    _refuse_wrapped(model)
    for module in changed:
        state = swap_back(module)
        if isinstance(state, EncoderState):
            config: Any = module.config
            config._attn_implementation_internal = state.attention_before
            for part in module.modules():
                part.__dict__.pop(SITE, None)
    return model


def describe(model: nn.Module) -> str:
    """Return what of the model is packed, fused or left alone, a line each."""
    paths = {module: path or "model" for path, module in model.named_modules()}
    lines = []
    for module, _, name, _ in parts_of(model):
        state, where = state_of(module), f"{paths[module]} ({type(module).__name__})"
        if isinstance(state, EncoderState):
            layers = sum(state_of(part) == "layer" for part in module.modules())
            lines.append(f"{where}: computes without padding; {_how(state.kernels, layers)}")
        elif isinstance(state, HeadState) and state.labels:
            lines.append(f"{where}: in training it sees labelled tokens alone and returns no logits")
        elif isinstance(state, HeadState) and state.answers_at_real_tokens:
            lines.append(f"{where}: its loss compares a place with the real tokens of its row")
        elif name == ENCODER:
            lines.append(f"{where}: as transformers made it")
    return "\n".join(lines) or f"{type(model).__name__} holds no encoder that unpad knows: {_known()}"


def _how(kernels: Kernels, layers: int) -> str:
    operators = "torch references" if kernels == "torch" else "Triton operators"
    where = " on CUDA, transformers' own layers and torch's attention on a CPU" if kernels == "auto" else ""
    what = f"{layers} layers fused by" if layers else "transformers' own layers, attention by"
    return f"{what} {operators}{where}"


def _known() -> str:
    return ", ".join(FAMILIES)


def _refuse(model: nn.Module, parts: list[Part]) -> None:
    _refuse_wrapped(model)
    if any(state_of(module) is not None for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is unpadded already")
    if not any(part.name == ENCODER for part in parts):
        raise ValueError(f"{type(model).__name__} holds no encoder of transformers that unpad knows: {_known()}")
    for part in parts:
        if part.name in DECODERS:
            raise ValueError(f"{type(part.module).__name__} is the head of a decoder: only encoders are unpadded")
        if part.name == SUMMARY and part.module.summary_type != "first":
            raise ValueError(f"summary_type is {part.module.summary_type!r}, which reads padding; wanted 'first'")
        if part.name == ENCODER:
            _refuse_encoder(part.module, part.is_own)


def _refuse_wrapped(model: nn.Module) -> None:
    for module in model.modules():
        if any(base.__module__.startswith(_WRAPPERS) for base in type(module).__mro__):
            raise ValueError(f"{type(module).__name__} has wrapped the model: unpad and repad the model before that")


def _refuse_encoder(encoder: Any, is_own: bool) -> None:
    name, config = type(encoder).__name__, encoder.config
    never_stored = "the probabilities of an unpadded encoder are never stored"
    ropes = (getattr(config, "rope_parameters", None) or {}).values()
    types = [rope.get("rope_type", "default") for rope in ropes if isinstance(rope, dict)]
    dynamic = [each for each in types if each not in ("default", "linear")]
    for is_wrong, sentence in (
        (not is_own or "forward" in encoder.__dict__, f"{name} has a forward of its own, not that of transformers"),
        (getattr(config, "is_decoder", False), f"{name} is a decoder (is_decoder): only encoders are unpadded"),
        (getattr(config, "add_cross_attention", False), f"{name} has cross-attention: only encoders are unpadded"),
        (_relative(config), f"position_embedding_type is {_relative(config)!r}, wanted 'absolute'"),
        (dynamic, f"rope_type is {dynamic}, which looks at the padded length; wanted 'default'"),
        (getattr(config, "chunk_size_feed_forward", 0), "chunk_size_feed_forward cuts by length; wanted 0"),
        (getattr(config, "output_attentions", False), f"config.output_attentions is true: {never_stored}"),
    ):
        if is_wrong:
            raise ValueError(sentence)


def _relative(config: Any) -> str | None:
    kind = getattr(config, "position_embedding_type", None)
    return None if kind in ("absolute", "rope") else kind


def _needs(parts: list[Part]) -> Needs | None:
    """Return what the heads of the model read of every row, the stricter where they differ."""
    found = set()
    for module, family, name, _ in parts:
        pools_over_mask = (
            name != ENCODER and getattr(getattr(module, "config", None), "classifier_pooling", "cls") != "cls"
        )
        found |= {needs for reader, needs in family.needs if reader == name and not pools_over_mask}
    return "first" if "first" in found else "any" if "any" in found else None


def _unpad_encoder(part: Part, kernels: Kernels, *, needs: Needs | None, attention_before: str) -> None:
    encoder, family = part.module, part.family
    own_positions = hasattr(encoder.embeddings, "create_position_ids_from_input_ids")
    window = getattr(encoder.config, "sliding_window", None)
    before = "sdpa" if attention_before == ATTENTION_NAME else attention_before  # of a model made of this config
    state = EncoderState(kernels, needs, before, own_positions, window)
    # Not through the property: that would also change the configs below this one.
    encoder.config._attn_implementation_internal = ATTENTION_NAME
    inner = [each for each in parts_of(encoder) if each.module is not encoder]
    for index, each in enumerate(each for each in inner if each.name == family.attention):
        setattr(each.module, SITE, SITES_OF_A_LAYER * index)
    for each in inner:
        if each.name == family.layer and each.is_own:
            swap(each.module, "layer", "layer")
    if family.pooled_from is not None and getattr(encoder, "pooler", None) is not None:
        swap(getattr(encoder, family.pooled_from), "pooled_encoder", "pooled_encoder")
    swap(encoder, "encoder", state)


def _unpad_head(part: Part, *, answers_at_real_tokens: bool) -> None:
    labels = dict(part.family.word_labels).get(part.name)
    if labels:
        swap(part.module, "word_head", HeadState(labels))
    elif part.name == TOKEN_LABELS:
        swap(part.module, "token_head", HeadState())
    elif part.name == ANSWERS:
        swap(part.module, "answer_head", HeadState(answers_at_real_tokens=answers_at_real_tokens))
