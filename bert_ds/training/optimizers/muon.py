"""Muon for the matrices of the encoder's layers and AdamW for everything else, exact under DeepSpeed ZeRO 0, 1, 2, 3.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; scale and decay of Liu et al. 2025, arXiv
2502.16982. For a matrix W of M rows and N columns with gradient G and momentum B (b, decay, lr):

    B = b B + (1 - b) G
    U = b B + (1 - b) G  (Nesterov), or B
    W = (1 - lr decay) W - lr 0.2 sqrt(max(M, N)) orthogonalise(U)

Which tensors are matrices is said by the model, by name: a shard of ZeRO is flat, and embeddings and classifiers have
two dimensions too. Query, key and value, stored as one tensor, are three matrices (`declare_parts`).

Everything on the shard is made of operations that round once per element, never of torch's fused AdamW, whose last
elements depend on where a tensor is cut: so the weights have the bits of one rank that holds whole tensors and is given
the same gradients. State is that of AdamW, `exp_avg` (the momentum) and `exp_avg_sq` (zero for matrices), since
DeepSpeed's universal checkpoints hold exactly these two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bert_ds.configuration.recipe.muon_polynomials import JORDAN, Polynomial, step_polynomials
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.optimizers.elementwise_optimizers import descend
from bert_ds.training.optimizers.lamb import LambFlags, adam_scalars, adam_settings
from bert_ds.training.optimizers.muon_exchange import MatrixExchange, Shape, make_exchange
from bert_ds.training.optimizers.newton_schulz import orthogonalise, orthogonalising_dtype, update_scale
from bert_ds.training.optimizers.sharded_optimizer import (
    GroupStep,
    NamedParameters,
    RecipeContext,
    ShardedOptimizer,
    ShardStep,
)
from bert_kernels.flat_shard import Piece
from bert_kernels.lamb import update_moments


class Muon(ShardedOptimizer):
    """Muon and AdamW over one group of named parameters.

    Args:
        named_parameters: `model.named_parameters()`, under `deepspeed.zero.Init` too.
        matrices: `fnmatch` patterns over names; these get Muon, each with its two dimensions.
        lr: learning rate of the matrices.
        adamw_lr: learning rate of the rest at the same time; None for `lr`. A schedule sets one rate, and the ratio of
            the two stays.
        momentum: b.
        nesterov: look one step ahead.
        ns_coefficients, ns_steps: see `step_polynomials` and `orthogonalise`.
        betas, eps: of AdamW.
        weight_decay, weight_decay_of: see `ShardedOptimizer`.

    Raises:
        ValueError: no trainable parameter matches, one that does has not two dimensions, or a setting is out of range.
    """

    ns_dtype: torch.dtype | None = None
    """Precision of the products and messages; None chooses by the device of the weights. A run in bf16 takes bf16."""

    def __init__(
        self,
        named_parameters: NamedParameters,
        *,
        matrices: Sequence[str],
        lr: float,
        adamw_lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Polynomial | Sequence[Polynomial] = JORDAN,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        weight_decay_of: Callable[[nn.Parameter], float] | None = None,
    ) -> None:
        if not lr > 0 or not 0 <= momentum < 1 or ns_steps < 1:
            raise ValueError(f"lr {lr}, momentum {momentum}, ns_steps {ns_steps}: wanted > 0, in [0, 1), at least 1")
        entries = list(named_parameters)
        self._matrix_shapes = _matrix_shapes(entries, matrices)
        self._nesterov, self._momentum = nesterov, momentum
        self._polynomials = step_polynomials(ns_coefficients, ns_steps)
        self._adamw_scale = 1.0 if adamw_lr is None else adamw_lr / lr
        self._exchanges: dict[int, MatrixExchange] = {}
        settings = adam_settings(lr, betas, eps)
        super().__init__(entries, settings, weight_decay=weight_decay, weight_decay_of=weight_decay_of)

    @classmethod
    def of_recipe(cls, named_parameters: NamedParameters, context: RecipeContext) -> Muon:
        """Return the optimizer that a recipe describes.

        Raises:
            ConfigError: no matrix is trained.
        """
        entries = list(named_parameters)
        names = [name for name, parameter in entries if parameter.requires_grad]
        if not any(fnmatchcase(name, pattern) for name in names for pattern in context.matrices):
            raise ConfigError(
                f'optimizer.type "muon" wants a matrix of the layers to train: none of the {len(names)} trainable '
                'parameters is one (are the layers frozen?); wanted "adamw"'
            )
        muon = cls(entries, matrices=context.matrices, weight_decay_of=context.weight_decay_of, **context.settings)
        if context.precision == "bf16":
            muon.ns_dtype = torch.bfloat16
        return muon

    @property
    def matrix_shapes(self) -> dict[str, Shape]:
        """Name of each matrix -> its rows and columns; the equal parts of a tensor are matrices of fewer rows."""
        found = {}
        for entry in self._owned:
            if entry.name in self._matrix_shapes:
                rows, columns = self._matrix_shapes[entry.name]
                names = [f"{entry.name}.{part}" for part in entry.parts] or [entry.name]
                found.update(dict.fromkeys(names, (rows // len(names), columns)))
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, and look the layout up again at the next step."""
        self._exchanges.clear()
        super().load_state_dict(state_dict)

    def _update(self, groups: Sequence[GroupStep]) -> None:
        for group in groups:
            self._update_group(group, self._exchange(group))

    def _exchange(self, group: GroupStep) -> MatrixExchange:
        """Return the exchange of a layout; layouts live as long as the optimizer knows them, so an id names one."""
        key = id(group.layout)
        if key not in self._exchanges:
            self._exchanges[key] = make_exchange(group.layout, self.matrix_shapes, replicas=self.replicas)
        return self._exchanges[key]

    def _update_group(self, group: GroupStep, exchange: MatrixExchange) -> None:
        pieces: dict[int, tuple[float, Piece]] = {}
        for shard in group.shards:
            self._adamw(shard, group, but=exchange.shapes.keys())
            for segment in shard.flat.table.segments:
                if segment.row in exchange.shapes:
                    pieces[segment.row] = segment.decay, shard.flat.cut(segment)
        updates = {row: self._advance(piece) for row, (_, piece) in pieces.items()}
        dtype = self.ns_dtype or orthogonalising_dtype(group.layout.shards[0][0].device)
        directions = exchange.apply(updates, self._orthogonalise, dtype=dtype)
        for row, (decay, piece) in pieces.items():
            lr = group.lr_of(row)
            if decay:
                piece.param.mul_(1 - lr * decay)
            direction = directions[row].to(piece.param)
            piece.param.sub_(direction.mul_(lr * update_scale(*exchange.shapes[row])))

    def _advance(self, piece: Piece) -> Tensor:
        """Update the momentum and return what is to be orthogonalised."""
        piece.exp_avg.lerp_(piece.grad, 1 - self._momentum)
        return piece.grad.lerp(piece.exp_avg, self._momentum) if self._nesterov else piece.exp_avg

    def _orthogonalise(self, update_MN: Tensor) -> Tensor:
        return orthogonalise(update_MN, polynomials=self._polynomials)

    def _adamw(self, shard: ShardStep, group: GroupStep, *, but: Iterable[int]) -> None:
        """One step of AdamW over what is no matrix."""
        table = shard.flat.table
        rest = replace(table, segments=tuple(segment for segment in table.segments if segment.row not in but))
        shard = shard._replace(flat=shard.flat._replace(table=rest))
        rates = [group.lr_of(row) * self._adamw_scale for row in range(len(group.layout.names))]
        scalars = adam_scalars(group.settings, shard.step, LambFlags())
        for _, piece in shard.flat.pieces():
            update_moments(piece, piece.grad, scalars)
        descend(shard, group, rates)


def _matrix_shapes(entries: Sequence[tuple[str, nn.Parameter]], patterns: Sequence[str]) -> dict[str, Shape]:
    """Return name -> shape of the trainable parameters that match; under zero.Init a parameter itself looks flat."""
    found: dict[str, Shape] = {}
    for name, param in entries:
        if not param.requires_grad or not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if len(shape) != 2:
            raise ValueError(f"{name} has the shape {list(shape)}, Muon wants a matrix")
        found[name] = shape
    if not found:
        raise ValueError(f"no trainable parameter is a matrix (named {', '.join(patterns)}): Muon has nothing to do")
    return found
