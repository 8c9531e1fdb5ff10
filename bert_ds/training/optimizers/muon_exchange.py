"""How the pieces of matrices that are spread over ranks meet on one rank, and how the results travel back.

A matrix has to be orthogonalised whole, and only once in the world. Each is dealt to one rank, its owner; per step one
`all_to_all_single` brings the pieces to the owners and one brings the results to where the weights lie. Where every
rank holds every tensor whole (ZeRO stage 0) nothing has to come, and one `all_gather` distributes the
results.

A rank's piece of a row is one stretch, and the stretches ascend with the rank in DeepSpeed's flat and ZeRO-3 layouts,
so lengths are all that has to be known of the others. They are exchanged once per layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from bert_ds.configuration.recipe.muon_polynomials import orthogonalising_flops
from bert_ds.training.optimizers.parameter_layout import Layout, LayoutError, collective_device

Shape = tuple[int, int]
_SLACK = 1.05
"""A rank has room for a matrix up to this share of the mean work."""


@dataclass(frozen=True)
class MatrixExchange:
    """Who orthogonalises which matrix of a layout; the same on all ranks."""

    shapes: Mapping[int, Shape]
    """Row -> [rows, columns] of the matrix."""
    owners: Mapping[int, int]
    """Row -> rank of `ranks` that orthogonalises it."""
    lengths: Sequence[Mapping[int, int]]
    """Per rank: row -> elements of it there."""
    ranks: ProcessGroup | None
    """None where this rank is alone."""
    replicated: bool
    """Every rank holds every matrix whole."""

    def apply(
        self, updates: Mapping[int, Tensor], orthogonalise: Callable[[Tensor], Tensor], *, dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """Return this rank's pieces of the orthogonalised matrices; a collective over `ranks`.

        Args:
            updates: row -> flat piece of it on this rank, fp32. Replicated rows alone may be left out, on all ranks
                alike: what has no gradient is not touched.
            orthogonalise: [M, N] -> [M, N], in `dtype`.
            dtype: of the messages, the products and the results.
        """
        if self.ranks is None:
            whole = {row: update.view(self.shapes[row]).to(dtype) for row, update in updates.items()}
            return {row: orthogonalise(matrix).reshape(-1) for row, matrix in whole.items()}
        way = self._apply_replicated if self.replicated else self._apply_sharded
        return way(updates, orthogonalise, dtype)

    def rows_of(self, rank: int) -> list[int]:
        """Rows that a rank orthogonalises, ascending."""
        return [row for row in sorted(self.shapes) if self.owners[row] == rank]

    def _apply_sharded(
        self, updates: Mapping[int, Tensor], orthogonalise: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """Pieces to the owners, results back: both messages ordered by (owner, row)."""
        assert self.ranks is not None
        rank, world = dist.get_rank(self.ranks), range(len(self.lengths))
        device = collective_device(self.ranks)
        travelling = [(row, self.lengths[rank][row]) for owner in world for row in self.rows_of(owner)]
        sent = [sum(self.lengths[rank][row] for row in self.rows_of(owner)) for owner in world]
        mine = self.rows_of(rank)
        received = [sum(lengths[row] for row in mine) for lengths in self.lengths]

        outgoing = torch.empty(sum(sent), dtype=dtype, device=device)
        for target, (row, length) in zip(outgoing.split([size for _, size in travelling]), travelling, strict=True):
            if length:
                target.copy_(updates[row])
        incoming = torch.empty(sum(received), dtype=dtype, device=device)
        dist.all_to_all_single(incoming, outgoing, received, sent, group=self.ranks)

        pieces = incoming.split([lengths[row] for lengths in self.lengths for row in mine])
        for number, row in enumerate(mine):
            parts = pieces[number :: len(mine)]
            result = orthogonalise(torch.cat(parts).view(self.shapes[row])).reshape(-1)
            for part, values in zip(parts, result.split([len(part) for part in parts]), strict=True):
                part.copy_(values)
        dist.all_to_all_single(outgoing, incoming, sent, received, group=self.ranks)
        results = zip(outgoing.split([size for _, size in travelling]), travelling, strict=True)
        return {row: result for result, (row, length) in results if length}

    def _apply_replicated(
        self, updates: Mapping[int, Tensor], orthogonalise: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> dict[int, Tensor]:
        """Each owner fills its block; blocks are padded to one length, as `all_gather` wants them."""
        assert self.ranks is not None
        rank, world = dist.get_rank(self.ranks), range(len(self.lengths))
        rows = [[row for row in self.rows_of(owner) if row in updates] for owner in world]
        sizes = [[self.lengths[rank][row] for row in of_owner] for of_owner in rows]
        longest = max(sum(of_owner) for of_owner in sizes)
        if not longest:
            return {}
        block = torch.zeros(longest, dtype=dtype, device=collective_device(self.ranks))
        for row, target in zip(rows[rank], _cut(block, sizes[rank]), strict=True):
            matrix = updates[row].view(self.shapes[row]).to(block)
            target.copy_(orthogonalise(matrix).reshape(-1))
        blocks = [torch.empty_like(block) for _ in world]
        dist.all_gather(blocks, block, group=self.ranks)
        found: dict[int, Tensor] = {}
        for owner, of_owner in enumerate(blocks):
            found.update(zip(rows[owner], _cut(of_owner, sizes[owner]), strict=True))
        return found


def make_exchange(layout: Layout, shapes: Mapping[str, Shape], *, replicas: ProcessGroup | None) -> MatrixExchange:
    """Return the exchange of a layout; a collective over the ranks that share it.

    Args:
        layout: from `find_layouts`.
        shapes: name of a row -> its shape, for the rows that are matrices.
        replicas: ranks that hold the same whole tensors and gradients, for layouts that are not sharded; None: this
            rank does all of the work itself.

    Raises:
        LayoutError: the pieces of a matrix on all ranks do not make the matrix.
    """
    by_row = {row: shapes[name] for row, name in enumerate(layout.names) if name in shapes}
    here = dict.fromkeys(by_row, 0)
    for _, table in layout.shards:
        for segment in table.segments:
            if segment.row in here:
                if here[segment.row]:
                    raise LayoutError(f"{layout.names[segment.row]} lies in two pieces on one rank")
                here[segment.row] = segment.length
    replicated = layout.process_group is None
    ranks = replicas if replicated else layout.process_group
    if ranks is not None and dist.get_world_size(ranks) == 1:
        ranks = None
    lengths = [here] if ranks is None else _gathered(here, ranks)
    for row, (height, width) in by_row.items():
        sizes = [of_rank[row] for of_rank in lengths]
        if any(size != height * width for size in (sizes if replicated else [sum(sizes)])):
            raise LayoutError(f"{layout.names[row]} is [{height}, {width}], the ranks hold {sizes} elements of it")
    return MatrixExchange(by_row, deal(by_row, lengths), lengths, ranks, replicated)


def deal(shapes: Mapping[int, Shape], lengths: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Return the owner of each matrix: the largest first, to the rank that holds most of it among those with room.

    Room is a load up to _SLACK times the mean; where no rank has any, the least loaded takes it. Ties go to the less
    loaded, then to the lower rank, so that all ranks deal alike without a message.
    """
    work = {row: orthogonalising_flops(*shape, steps=1) for row, shape in shapes.items()}
    room = _SLACK * sum(work.values()) / len(lengths)
    loads, owners = [0] * len(lengths), {}
    for row in sorted(work, key=lambda row: (-work[row], row)):
        with_room = [rank for rank, load in enumerate(loads) if load + work[row] <= room]
        if with_room:
            owner = min(with_room, key=lambda rank: (-lengths[rank][row], loads[rank], rank))
        else:
            owner = loads.index(min(loads))
        owners[row] = owner
        loads[owner] += work[row]
    return owners


def _gathered(here: Mapping[int, int], ranks: ProcessGroup) -> list[dict[int, int]]:
    """Return the lengths of all ranks; the rows are the same on each."""
    own = torch.tensor(list(here.values()), dtype=torch.int64, device=collective_device(ranks))
    all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(all_ranks, own, group=ranks)
    return [dict(zip(here, of_rank.tolist(), strict=True)) for of_rank in all_ranks]  # host sync: once per layout


def _cut(block: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return list(block[: sum(sizes)].split(list(sizes))) if sizes else []
