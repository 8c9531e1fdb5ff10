"""The forwards that an unpadded model has in place of transformers': encoder, what its pooler reads, and heads.

Everything that one call knows travels in that call's arguments, never on a module: threads may share a model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bert_kernels.hf.class_swap import state_of
from bert_kernels.hf.families import Needs
from bert_kernels.hf.operators import ATTENTION_NAME, Kernels, operators_for
from bert_kernels.hf.packing import PACKING, Packing, pack_bounds, pack_full, pack_rows

IGNORED = -100
LABELLED_ROWS = "bert_kernels_labelled_rows"
"""The keyword by which a head tells its encoder which places of the flattened batch it wants back."""

_UNDO = "; repad(model) gives the plain model back"
_REFUSED = {
    "encoder_hidden_states": "an unpadded encoder has no cross-attention",
    "encoder_attention_mask": "an unpadded encoder has no cross-attention",
    "past_key_values": "an unpadded encoder has no cache",
    "use_cache": "an unpadded encoder has no cache",
    "is_causal": "an unpadded encoder sees to both sides",
    "output_attentions": "the probabilities of an unpadded encoder are never stored",
}
_GIVEN_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class EncoderState:
    """What an unpadded encoder remembers."""

    kernels: Kernels
    needs: Needs | None
    attention_before: str
    own_positions: bool
    """Whether the embeddings count positions themselves, from the ids."""
    window: int | None
    """How far layers with a window see to each side; None without such layers."""


@dataclass
class HeadState:
    """What an unpadded head remembers: the labels that a training call must bring, and how far answers are compared."""

    labels: tuple[str, ...] = ()
    answers_at_real_tokens: bool = False


def encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of an encoder: padding out before the embeddings, back after the last layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        wanted = kwargs.pop(LABELLED_ROWS, None)
        call, packing = _packed_call(self, state, _arguments(original, self, args, kwargs))
        output = original(self, **call)
        return output if packing is None and wanted is None else _put_back(output, packing, wanted)

    return forward


def pooled_encoder(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of what a pooler reads: the padding comes back here, before it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        packing = kwargs.get(PACKING)
        if packing is not None and state_of(self) is not None:
            output.last_hidden_state = packing.unpack(output.last_hidden_state)
        return output

    return forward


def word_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a head over the vocabulary: in training it sees the labelled places alone."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        call = _arguments(original, self, args, kwargs)
        if any(call.get(name) is None for name in state.labels) or not _is_for_each_token(call["labels"], call):
            return original(self, **call)
        if not self.training or getattr(self, "sparse_prediction", False):  # the latter takes the places itself
            _refuse_labels_at_padding(call)
            return original(self, **call)
        labels = call["labels"].reshape(-1)
        rows = (labels != IGNORED).nonzero().squeeze(1)
        return _without_logits(original(self, **call | {"labels": labels[rows], LABELLED_ROWS: rows}))

    return forward


def token_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a head with a label for every token: none of them may stand at padding."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if state_of(self) is not None:
            _refuse_labels_at_padding(_arguments(original, self, args, kwargs))
        return original(self, *args, **kwargs)

    return forward


def answer_head(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a head for question answering, whose loss compares every place with every other."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        call = _arguments(original, self, args, kwargs)
        mask = call.get("attention_mask")
        places = [call.get("start_positions"), call.get("end_positions")]
        if any(each is None for each in places) or mask is None or bool(mask.bool().all()):
            return original(self, **call)
        if not state.answers_at_real_tokens:
            raise ValueError(
                "start_positions and end_positions with padding: the softmax of this loss runs over padding too, "
                "which an unpadded model does not compute; unpad(model, answers_at_real_tokens=True) takes it over "
                f"real tokens, and batches of one length need neither{_UNDO}"
            )
        if call.get("num_items_in_batch") is not None:
            raise ValueError(
                f"num_items_in_batch: the loss over real tokens is the mean of the answers of a call{_UNDO}"
            )
        output = original(self, **call | {"start_positions": None, "end_positions": None})
        loss = _loss_of_answers(output[:2] if isinstance(output, tuple) else list(output.values())[:2], places, mask)
        return (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)

    return forward


def _loss_of_answers(logits: Sequence[Tensor], places: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of the first and the last place of every answer over the real tokens of its row.

    As transformers has it, a place at or after the end of the batch counts for nothing.

    Args:
        logits: of start and end, [B, S] each.
        places: of start and end, int64 [B] or [B, 1].
        mask: [B, S].
    """
    keep_BS = mask.bool()
    length, losses = keep_BS.shape[1], []
    for logits_BS, places_B in zip(logits, places, strict=True):
        places_B = places_B.reshape(-1).clamp(0, length)
        inside = places_B < length
        if not bool(keep_BS[inside, places_B[inside]].all()):  # a host wait, as packing is
            raise ValueError(f"start_positions, end_positions: an answer begins or ends at padding{_UNDO}")
        real_BS = logits_BS.masked_fill(~keep_BS, torch.finfo(logits_BS.dtype).min)
        losses.append(nn.functional.cross_entropy(real_BS, places_B, ignore_index=length))
    return (losses[0] + losses[1]) / 2


def _is_for_each_token(labels: Tensor, call: dict[str, Any]) -> bool:
    """Return whether there is a label for every place; where not, transformers has an error of its own."""
    ids = call.get("input_ids")
    source = call.get("inputs_embeds") if ids is None else ids
    return source is not None and labels.numel() == source.shape[:2].numel()


def _refuse_labels_at_padding(call: dict[str, Any]) -> None:
    labels, mask = call.get("labels"), call.get("attention_mask")
    if labels is None or not isinstance(mask, Tensor) or labels.numel() != mask.numel():
        return
    # A host wait, on labels that came with the batch: nothing of the model is in flight yet.
    if bool(((labels.flatten() != IGNORED) & (mask.flatten() == 0)).any()):
        raise ValueError(_label_at_padding())


def _label_at_padding() -> str:
    return f"labels: a label other than {IGNORED} stands where attention_mask is 0, which is not computed{_UNDO}"


@functools.cache
def _signature(original: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(original)


@torch.compiler.disable
def _arguments(original: Callable[..., Any], self: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments by name."""
    bound = _signature(original).bind(self, *args, **kwargs).arguments
    bound.pop("self")
    return bound | bound.pop("kwargs", {})


@torch.compiler.disable
def _packed_call(module: Any, state: EncoderState, call: dict[str, Any]) -> tuple[dict[str, Any], Packing | None]:
    """Return the call with packed inputs, and their packing; without one where the batch can stay as it is."""
    _refuse(module, call)
    source = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if source is None or (call.get("input_ids") is not None and call.get("inputs_embeds") is not None):
        return call, None  # transformers' own error
    operators = operators_for(state.kernels, source.device)
    packing = _packing_of(call, source, state.needs, even_if_full=operators is not None)
    if (
        packing is not None
        and operators is not None
        and state.window is not None
        and packing.reaches_over_hole(state.window)
    ):
        raise ValueError(
            f"attention_mask has a hole, and the windows of the fused operators count tokens, not places{_UNDO}"
        )
    call["attention_mask"] = None
    if packing is None:
        return call, None
    packing.operators = operators
    if operators is not None and module.training:
        packing.key()
    if call.get("position_ids") is None:
        call["position_ids"] = _positions(module, state, call, packing)
    else:
        call["position_ids"] = packing.pack(call["position_ids"])
    for name in ("input_ids", "inputs_embeds", "token_type_ids"):
        if call.get(name) is not None:
            call[name] = packing.pack(call[name])
    call[PACKING] = packing
    return call, packing


def _refuse(module: Any, call: dict[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if call.get(name) is not None and call[name] is not False:
            raise ValueError(f"{name}: {why}{_UNDO}")
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(f"an unpadded model cannot be traced or exported: the layout of one batch would stay{_UNDO}")
    if getattr(module.config, "output_attentions", False):
        raise ValueError(f"config.output_attentions is true: {_REFUSED['output_attentions']}{_UNDO}")
    if module.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"the attention was set to {module.config._attn_implementation!r} after unpad(model): its tokens would see "
            f"those of other sequences{_UNDO}"
        )


def _packing_of(call: dict[str, Any], source: Tensor, needs: Needs | None, *, even_if_full: bool) -> Packing | None:
    batch, length = source.shape[:2]
    mask = call.get("attention_mask")
    bounds = {name: call.pop(name) for name in _GIVEN_BOUNDS if name in call}
    if bounds.get("cu_seq_lens_q") is not None:
        if batch != 1 or mask is not None:
            raise ValueError(f"cu_seq_lens_q: wanted one row without attention_mask, got {batch} rows{_UNDO}")
        return pack_bounds(bounds["cu_seq_lens_q"], length)
    if mask is None:
        if batch == 1:
            _refuse_restarts(call.get("position_ids"))
        return pack_full(batch, length, source.device) if even_if_full else None
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length):
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: wanted shape {[batch, length]}, a flag for every token, got {found}{_UNDO}")
    keep_BS = mask.to(device=source.device, dtype=torch.bool)
    _refuse_hidden(keep_BS, needs)
    return pack_rows(keep_BS, even_if_full=even_if_full)


def _refuse_hidden(keep_BS: Tensor, needs: Needs | None) -> None:
    """Refuse a mask that hides what a head reads. A host wait, as packing is."""
    if not bool(keep_BS.any()):
        raise ValueError(f"attention_mask hides every token of the batch{_UNDO}")
    if needs == "first" and not bool(keep_BS[:, 0].all()):
        what = "the first token of a row (left padding, or a row without tokens)"
        raise ValueError(f"attention_mask hides {what}, which this model's pooler or head reads{_UNDO}")
    if needs == "any" and not bool(keep_BS.any(1).all()):
        raise ValueError(f"attention_mask hides a whole row, of which this model's head reads a token{_UNDO}")


def _refuse_restarts(positions: Tensor | None) -> None:
    """Refuse sequences that only their positions tell apart; flash-attention takes them so, no other attention does."""
    if positions is not None and bool((positions.diff() < 0).any()):
        raise ValueError(
            "position_ids fall within a row: say where its sequences begin by cu_seq_lens_q and max_length_q, as "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
        )


def _positions(module: Any, state: EncoderState, call: dict[str, Any], packing: Packing) -> Tensor:
    """Return the positions (1, T) that the model would have given to a padded batch."""
    embeddings = module.embeddings
    if not state.own_positions:
        return packing.columns_T[None]
    if call.get("input_ids") is None:
        return packing.columns_T[None] + embeddings.padding_idx + 1
    return packing.pack(embeddings.create_position_ids_from_input_ids(call["input_ids"], embeddings.padding_idx))


@torch.compiler.disable
def _put_back(output: Any, packing: Packing | None, wanted: Tensor | None) -> Any:
    """Return the encoder's output with its padding; the last hidden states of the wanted places alone: (1, R, D)."""
    if isinstance(output, tuple):
        last, *others = output
        return (_last(last, packing, wanted), *(_unpacked(each, packing) for each in others))
    for name, value in list(output.items()):
        is_last = name == "last_hidden_state"
        output[name] = _last(value, packing, wanted) if is_last else _unpacked(value, packing)
    return output


def _last(hidden: Tensor, packing: Packing | None, wanted: Tensor | None) -> Tensor:
    if wanted is None:
        return _unpacked(hidden, packing)
    places = wanted
    if packing is not None:
        places_in_packed = packing.places(wanted)
        if bool((places_in_packed < 0).any()):
            raise ValueError(_label_at_padding())
        places = places_in_packed if packing.is_packed(hidden) else wanted
    return hidden.flatten(0, 1).index_select(0, places)[None]


def _unpacked(value: Any, packing: Packing | None) -> Any:
    if packing is None:
        return value
    if isinstance(value, tuple):
        return tuple(_unpacked(each, packing) for each in value)
    return packing.unpack(value) if packing.is_packed(value) else value


def _without_logits(output: Any) -> Any:
    if isinstance(output, tuple):
        return output[0], *output[2:]
    kept = {name: value for name, value in output.items() if name not in ("logits", "prediction_logits")}
    return type(output)(**kept)
