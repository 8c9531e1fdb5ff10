"""Tiny models of every family and head of transformers, ragged batches for them, and what must be equal."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, HIDDEN, LENGTH, ROWS = 67, 32, 12, 4
PAD = 0

_BERT = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=40,
    type_vocab_size=2,
    pad_token_id=PAD,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)
SETTINGS: dict[str, dict[str, Any]] = {
    "Bert": _BERT,
    "Roberta": _BERT,
    "Electra": {**_BERT, "embedding_size": 24, "summary_last_dropout": 0.0},
    "DistilBert": dict(
        vocab_size=VOCABULARY,
        dim=HIDDEN,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=40,
        pad_token_id=PAD,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        qa_dropout=0.0,
        num_labels=3,
    ),
    "ModernBert": dict(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
        local_attention=6,
        global_attn_every_n_layers=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
        num_labels=3,
    ),
}
"""Settings of a tiny config, by the prefix of the family's classes."""

HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
MORE_HEADS = {
    "Bert": ("ForPreTraining", "ForNextSentencePrediction", "ForMultipleChoice"),
    "Roberta": ("ForMultipleChoice",),
    "Electra": ("ForPreTraining", "ForMultipleChoice"),
    "DistilBert": ("ForMultipleChoice",),
    "ModernBert": ("ForMultipleChoice",),
}
CLASSES = [family + head for family in SETTINGS for head in (*HEADS, *MORE_HEADS[family])]
"""Every class of the five families that is not a decoder."""


def family_of(name: str) -> str:
    """Return the prefix of a class's family."""
    return next(
        family for family in ("DistilBert", "ModernBert", "Bert", "Roberta", "Electra") if name.startswith(family)
    )


def make_model(name: str, *, seed: int = 0, **settings: Any) -> Any:
    """Return a model of the class with disturbed weights, fp64, so that equal means 1e-9, in eval mode."""
    family = family_of(name)
    if name == "ElectraForPreTraining" or name.endswith(("ForQuestionAnswering", "ForNextSentencePrediction")):
        settings = {"num_labels": 2, **settings}
    config = getattr(transformers, f"{family}Config")(**{**SETTINGS[family], **settings})
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases at 1 and 0 would hide a mistake
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_mask(kind: str) -> Tensor | None:
    """Return a mask (4, 12) of one kind."""
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    lengths = (5, 12, 1, 5)
    if kind in ("ragged", "float", "bool", "int32"):
        for row, length in enumerate(lengths):
            mask[row, length:] = 0
    elif kind == "left":
        for row, length in enumerate(lengths):
            mask[row, : LENGTH - length] = 0
    elif kind == "equal":
        mask[:, 7:] = 0
    elif kind == "holes":
        mask[0, 3:9] = 0
        mask[1, 2], mask[1, 10:] = 0, 0
        mask[3, 1:11] = 0
    elif kind == "empty":
        mask[0, 4:], mask[2] = 0, 0
    elif kind == "nothing":
        mask[:] = 0
    return {
        "none": None,
        "float": mask.float(),
        "bool": mask.bool(),
        "int32": mask.int(),
    }.get(kind, mask)


MASKS = ("ragged", "left", "equal", "holes", "full", "empty", "nothing", "none", "float", "bool", "int32")


@dataclass
class Batch:
    """Inputs of a call, and where its real tokens are (4, 12)."""

    inputs: dict[str, Any]
    keep: Tensor


def make_batch(name: str, mask_kind: str = "ragged", *, labels: bool = True, seed: int = 1) -> Batch:
    """Return inputs for the class, random at padding too, with labels at real tokens only."""
    generator = torch.Generator().manual_seed(seed)
    mask = make_mask(mask_kind)
    keep = torch.ones(ROWS, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)
    inputs: dict[str, Any] = {"input_ids": torch.where(keep, ids, PAD)}
    if mask is not None:
        inputs["attention_mask"] = mask
    if labels:
        inputs |= _labels(name, keep, generator)
    if name.endswith("ForMultipleChoice"):
        inputs = {key: x.view(ROWS // 2, 2, LENGTH) if x.shape == keep.shape else x for key, x in inputs.items()}
    return Batch(inputs, keep)


def _labels(name: str, keep: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    some = keep & (torch.rand(keep.shape, generator=generator) < 0.5)
    if name == "ElectraForPreTraining":
        return {"labels": draw(2, ROWS, LENGTH)}
    if name.endswith(("ForMaskedLM", "ForPreTraining")):
        words = {"labels": torch.where(some, draw(VOCABULARY, ROWS, LENGTH), -100)}
        return words | ({"next_sentence_label": draw(2, ROWS)} if name.endswith("PreTraining") else {})
    if name.endswith("ForTokenClassification"):
        return {"labels": torch.where(keep, draw(3, ROWS, LENGTH), -100)}
    if name.endswith("ForQuestionAnswering"):
        places = {"start_positions": draw(LENGTH, ROWS), "end_positions": draw(LENGTH, ROWS)}
        return places if keep.all() else {}
    if name.endswith("ForMultipleChoice"):
        return {"labels": draw(2, ROWS // 2)}
    if name.endswith("ForNextSentencePrediction"):
        return {"labels": draw(2, ROWS)}
    return {} if name.endswith("Model") else {"labels": draw(3, ROWS)}


def pair(name: str, **settings: Any) -> tuple[Any, Any]:
    """Return a plain model and its unpadded copy."""
    from bert_kernels.hf import unpad

    kernels = settings.pop("kernels", "auto")
    plain = make_model(name, **settings)
    return plain, unpad(copy.deepcopy(plain), kernels=kernels)


def assert_same_outputs(ours: Any, plain: Any, keep: Tensor, *, atol: float = 1e-9) -> None:
    """Assert that every output is equal: at real tokens where it has a row for each, everywhere else as a whole."""
    assert type(ours) is type(plain)
    assert list(ours.keys()) == list(plain.keys())
    for name in plain:
        both = (ours[name], plain[name])
        pairs = zip(*both, strict=True) if isinstance(both[0], tuple) else [both]
        for mine, theirs in pairs:
            assert mine.shape == theirs.shape, f"{name}: {mine.shape}, {theirs.shape}"
            per_token = theirs.shape[:2] == keep.shape
            torch.testing.assert_close(
                mine[keep] if per_token else mine,
                theirs[keep] if per_token else theirs,
                atol=1e-6 if theirs.dtype == torch.float32 else atol,  # a loss that transformers computes in fp32
                rtol=1e-9,
                equal_nan=True,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def total(output: Any, keep: Tensor) -> Tensor:
    """Return the loss of an output, or a sum that weighs every real token of its first tensor differently."""
    if output.get("loss") is not None:
        return output["loss"]
    first = next(iter(output.values()))
    if first.shape[:2] == keep.shape:
        first = first[keep]
    parts = [first] + ([output["pooler_output"]] if output.get("pooler_output") is not None else [])
    return sum((part * torch.linspace(-1, 1, part.numel()).view(part.shape)).sum() for part in parts)


def assert_same_gradients(ours: nn.Module, plain: nn.Module, *, limit: float = 1e-9) -> None:
    """Assert that every parameter has the same gradient, relative to the largest of that parameter, or none in both."""
    mine = dict(ours.named_parameters())
    for name, parameter in plain.named_parameters():
        theirs, my = parameter.grad, mine[name].grad
        zero = torch.zeros_like(parameter)
        theirs, my = zero if theirs is None else theirs, zero if my is None else my
        off = float((my - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-3)
        assert off <= limit, f"{name}: off by {off:.1e} of its largest gradient"


def assert_same_weights(ours: nn.Module, plain: nn.Module) -> None:
    """Assert that every parameter is equal to fp32's rounding."""
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
