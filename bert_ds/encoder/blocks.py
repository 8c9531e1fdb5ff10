"""What the layers of several families consist of. Letters as in `families/bert.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bert_ds.basics.micro_batch import BranchDraws
from bert_ds.encoder.fused_ops import FusedOps, uniform_draws


class Dropout(NamedTuple):
    """A place that drops: how much, and the integer that tells its masks from those of other places."""

    probability: float
    site: int


APPROXIMATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
"""Torch's name for the GELU of a setting."""
_OTHERS = {"relu": F.relu, "silu": F.silu}


Kept = tuple[Tensor, Tensor]
"""What a layer's attention and feed-forward block are multiplied with at each token, fp32 [T, 1] both."""


def kept_branches(encoder: Any, drawn: BranchDraws | None, cu_seqlens: Tensor, *, num_tokens: int) -> list[Kept] | None:
    """Return what each layer's blocks are kept with: stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    In layer l of L, counted from 1, a block adds nothing to a sequence with probability `stochastic_depth` * l / L, as
    published (equation 4), and to the others so much more that an evaluation has nothing to scale.

    Args:
        encoder: with `layer` and `stochastic_depth`.
        drawn: what decides; each block draws for each sequence.
        cu_seqlens: int32 [N + 1]; sequences behind those of `drawn` are fillings, and keep all.
        num_tokens: T.

    Returns:
        For each layer; None where nothing is dropped.

    Raises:
        ValueError: the encoder is in training mode and drops, and nothing decides.
    """
    if not encoder.training or not encoder.stochastic_depth:
        return None
    if drawn is None:
        raise ValueError("branches is None, but the model is in training mode and has a stochastic depth")
    sources_N, epochs_N, examples_N = drawn.example_ids_N3.unbind(1)
    counters = (examples_N & 0xFFFFFFFF, (sources_N << 20 | epochs_N) & 0xFFFFFFFF)
    num_layers, blocks = len(encoder.layer), []
    for number in range(2 * num_layers):
        probability = encoder.stochastic_depth * (number // 2 + 1) / num_layers
        drawn_N = uniform_draws(drawn.seed, counters, site=number)
        kept_N = (drawn_N >= probability).float() / (1 - probability)
        kept_N = F.pad(kept_N, (0, len(cu_seqlens) - 1 - len(kept_N)), value=1.0)
        blocks.append(kept_N.repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)[:, None])
    return list(zip(blocks[::2], blocks[1::2], strict=True))


def scaled(x_TD: Tensor, kept_T1: Tensor | None, read_R: Tensor | None = None) -> Tensor:
    """Return the rows times what they are kept with, see `kept_branches`; of the tokens that are read where x is."""
    return x_TD if kept_T1 is None else x_TD * read_rows(kept_T1, read_R).to(x_TD.dtype)


def activated(ops: FusedOps, x_TF: Tensor, bias_F: Tensor | None, act: str) -> Tensor:
    """Return act(x + bias); GELU and bias are one operation, the others are torch's.

    Args:
        act: of the settings, by Hugging Face's names.
    """
    if act in _OTHERS:
        return _OTHERS[act](x_TF if bias_F is None else x_TF + bias_F)
    if bias_F is None:
        return F.gelu(x_TF, approximate=APPROXIMATIONS[act])
    return ops.bias_gelu(x_TF, bias_F, approximate=APPROXIMATIONS[act])


class PassedOver(NamedTuple):
    """Layers that a step is taken without (LayerDrop, Fan et al. 2020, arXiv 1909.11556)."""

    layers: frozenset[int]
    """Counted from 0."""
    no_tokens: tuple[Any, ...]
    """What a layer gets beside the hidden states where there are no tokens."""


class AddNorm(nn.Module):
    """What a block of a pre-norm network begins with: the last block's output is dropped and added, then normalised."""

    def __init__(self, hidden_size: int, *, eps: float, dropout: Dropout, ops: FusedOps, has_bias: bool = True) -> None:
        super().__init__()
        self.ops, self.eps, self.dropout = ops, eps, dropout
        self.layer_norm_weight = nn.Parameter(torch.empty(hidden_size))
        self.layer_norm_bias = nn.Parameter(torch.empty(hidden_size)) if has_bias else None

    def forward(self, x_TD: Tensor | None, residual_TD: Tensor, dropout_seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return LayerNorm(sum) and the sum residual_TD + dropout(x_TD); nothing is added where x_TD is None."""
        if x_TD is None:
            normed_TD = self.ops.layer_norm(residual_TD, self.layer_norm_weight, self.layer_norm_bias, self.eps)
            return normed_TD, residual_TD
        return self.ops.dropout_add_then_norm(
            x_TD,
            residual_TD,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.eps,
            dropout_p=self.dropout.probability if self.training else 0.0,
            dropout_seed=dropout_seed,
            site=self.dropout.site,
        )


class DroppingFront(nn.Module):
    """Dropout where there is a seed, dense, activation, row by row: in front of a classifier of sequences."""

    def __init__(self, hidden_size: int, ops: FusedOps, *, dropout: Dropout, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.ops, self.dropout, self.act = ops, dropout, act
        self.dense_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.dense_bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, rows_RD: Tensor, dropout_seed: Tensor | None = None) -> Tensor:
        """Return [R, D]."""
        dropped_RD = self.ops.dropout(
            rows_RD,
            dropout_p=self.dropout.probability if self.training and dropout_seed is not None else 0.0,
            dropout_seed=dropout_seed,
            site=self.dropout.site,
        )
        return self.act(F.linear(dropped_RD, self.dense_weight, self.dense_bias))


def through_layers(
    layers: Sequence[nn.Module] | nn.ModuleList,
    carried: Any,
    *others: Any,
    recompute: bool,
    read_R: Tensor | None = None,
    passed_over: PassedOver | None = None,
    kept: Sequence[Kept] | None = None,
) -> Any:
    """Return what comes out of the last layer.

    Behind the last attention every token goes its own way: of those that nobody reads nothing more is computed. With
    30% of the words to predict that is an eighth of the work in the layers of a network of four.

    Args:
        layers: each turns what is carried into the like of it.
        carried: a tensor, or a tuple of tensors, that the first layer gets.
        others: the further arguments of every layer.
        recompute: keep only what is carried between layers and compute the rest again in the backward pass.
        read_R: int64 [R], the tokens that are read; the last layer then gives their rows, in this order. None for all.
        passed_over: layers of no effect.
        kept: what each layer gets as `kept`, see `kept_branches`; None for nothing.
    """
    for number, layer in enumerate(layers):
        arguments = carried if isinstance(carried, tuple) else (carried,)
        if passed_over is not None and number in passed_over.layers:
            rows = read_R if number == len(layers) - 1 else None
            carried = _carried_past(layer, arguments, passed_over.no_tokens, read_R=rows)
            continue
        if number == len(layers) - 1 and read_R is not None:
            others = (*others, read_R)
        named: dict[str, Any] = {} if kept is None else {"kept": kept[number]}
        if recompute:
            carried = checkpoint(layer, *arguments, *others, use_reentrant=False, preserve_rng_state=False, **named)
        else:
            carried = layer(*arguments, *others, **named)
    return carried


def _carried_past(layer: nn.Module, arguments: tuple[Any, ...], no_tokens: tuple[Any, ...], *, read_R: Any) -> Any:
    """Return what a layer was to get, as it is; the layer computes no tokens.

    So its weights have zeros for gradients, as a weight of no effect has, at every ZeRO stage. With none at all
    DeepSpeed 0.19.8 would step at stage 3 with the gradient of an earlier step (`stage3.partition_grads` writes over
    it where there is one, and nothing else does), and would record the order of its modules anew in every step.
    """
    none = [None if x_TD is None else x_TD.new_empty(0, x_TD.shape[1]).requires_grad_() for x_TD in arguments]
    found = layer(*none, *no_tokens)
    *first, last_TD = arguments
    last_TD = torch.cat([last_TD, *(found if isinstance(found, tuple) else (found,))])
    past = tuple(None if x_TD is None else read_rows(x_TD, read_R) for x_TD in (*first, last_TD))
    return past if len(past) > 1 else past[0]


def where_nothing_drops(module: nn.Module, read_R: Tensor | None, *, drops: bool) -> Tensor | None:
    """Return the tokens that are read; None, all, where dropout is on: its masks go by a token's row in the stream."""
    return None if module.training and drops else read_R


def read_rows(x_TD: Tensor, read_R: Tensor | None) -> Tensor:
    """Return the rows of the tokens that are read, all where it is None."""
    return x_TD if read_R is None else x_TD.index_select(0, read_R)


def at_their_tokens(hidden_RD: Tensor, read_R: Tensor | None, *, num_tokens: int) -> Tensor:
    """Return [T, D] with the rows of the tokens that are read in their places; the others are some other token's.

    Of a token that is named more than once the first row counts.
    """
    if read_R is None:
        return hidden_RD
    place_T = torch.zeros(num_tokens, dtype=torch.int64, device=hidden_RD.device)
    places_R = torch.arange(len(read_R), device=hidden_RD.device)
    place_T.scatter_reduce_(0, read_R, places_R, "amin", include_self=False)
    return hidden_RD.index_select(0, place_T)


def first_tokens(cu_seqlens: Tensor, *, num_tokens: int) -> Tensor:
    """Return the first token of every sequence, int64 [N]; that of an empty one is another's."""
    return cu_seqlens[:-1].long().clamp(max=num_tokens - 1)


def first_rows(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the first token of every sequence, [N, D]; the row of an empty one is another's and has no meaning."""
    return hidden_TD.index_select(0, first_tokens(cu_seqlens, num_tokens=hidden_TD.shape[0]))


def mean_rows(hidden_TD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, fp32 [N, D]."""
    lengths_N = cu_seqlens.diff()
    sequence_T = torch.repeat_interleave(
        torch.arange(len(lengths_N), device=hidden_TD.device), lengths_N, output_size=len(hidden_TD)
    )
    sums_ND = hidden_TD.new_zeros(len(lengths_N), hidden_TD.shape[1], dtype=torch.float32)
    return sums_ND.index_add(0, sequence_T, hidden_TD.float()) / lengths_N[:, None]


@contextmanager
def kept_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect what each of some modules makes of the tokens while this is entered.

    A layer that adds its last block only where the next one begins gives what is added, and what it is added to.
    """
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output if isinstance(output, Tensor) else output[0] + output[1])

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def require_seed(module: nn.Module, dropout_seed: Tensor | None, *, drops: bool) -> None:
    """Raise ValueError where a network in training mode that drops has no seed."""
    if module.training and drops and dropout_seed is None:
        raise ValueError("dropout_seed is None, but the model is in training mode and its config has dropout")


def refuse_partitioned(module: nn.Module) -> None:
    """Raise ValueError where the parameters are partitioned already (`deepspeed.zero.Init`): nothing can be filled."""
    if any(hasattr(parameter, "ds_id") for parameter in module.parameters()):
        raise ValueError("the model is built under deepspeed.zero.Init; wanted a whole model, partitioned afterwards")
