"""What the tuner tunes: each tile table, the kernels that read it, the cases to try it on and its legal tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import (
    Case,
    attention_case,
    bias_gelu_case,
    geglu_case,
    layer_norm_case,
    mlm_cross_entropy_case,
    rotary_case,
)

from bert_kernels import _tiles
from bert_kernels._tiles import Tile

ANY_SIZE = 1 << 62
# Streaming multiprocessors of A100, H100/H200 and B200: a persistent backward takes a multiple of them as programs.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}


@dataclass(frozen=True)
class Subject:
    """One tile table of `_tiles`."""

    path: tuple[str, ...]
    """Name in `_tiles`, and the key where that is a mapping of tables."""
    kernels: tuple[str, ...]
    """Kernels whose time counts."""
    buckets: tuple[tuple[int, Case], ...]
    """Largest size of each row of the table, and the call that stands for it."""
    tiles: Callable[[str, int], Iterator[Tile]]
    """Legal tiles for an architecture and a bucket's largest size."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return " ".join(self.path)

    @property
    def table(self) -> dict[str, Any]:
        """The table itself, which the tuner changes to try a tile."""
        table: Any = getattr(_tiles, self.path[0])
        return table if len(self.path) == 1 else table[self.path[1]]


def subjects() -> list[Subject]:
    """Return everything that can be tuned."""
    attention = [subject for width in ("64", "128", "fp32") for subject in _attention_subjects(width)]
    widths = ((512, 512), (1024, 1024), (2048, 2048), (ANY_SIZE, 4096))
    layer_norm = tuple((largest, layer_norm_case(width, 0.1)) for largest, width in widths)
    # Sizes of the table, and one of BERT's that falls into its row.
    mlm = ((2048, 2048), (8192, 8192), (32768, 30528), (ANY_SIZE, 119552))
    return [
        *attention,
        Subject(("LAYER_NORM",), ("layer_norm_fwd", "layer_norm_bwd"), layer_norm, _layer_norm_tiles),
        Subject(("ROTARY",), ("rotary",), ((64, rotary_case(64)), (ANY_SIZE, rotary_case(128))), _rotary_tiles),
        Subject(("BIAS_GELU",), ("bias_gelu_fwd", "bias_gelu_bwd"), ((ANY_SIZE, bias_gelu_case(4096, "none")),), _rows),
        Subject(("GEGLU", "fwd"), ("geglu_fwd",), ((ANY_SIZE, geglu_case(2624, "none")),), _rows),
        Subject(("GEGLU", "bwd"), ("geglu_bwd",), ((ANY_SIZE, geglu_case(2624, "none", has_bias=True)),), _rows),
        Subject(
            ("MLM_CROSS_ENTROPY",),
            ("mlm_cross_entropy",),
            tuple((largest, mlm_cross_entropy_case(width)) for largest, width in mlm),
            _loss_tiles,
        ),
    ]


def _attention_subjects(width: str) -> Iterator[Subject]:
    dtype, head_dim = (torch.float32, 64) if width == "fp32" else (torch.bfloat16, int(width))
    long = ((ANY_SIZE, attention_case(head_dim, 512, 0.1, dtype)),)
    both = ((128, attention_case(head_dim, 128, 0.1, dtype)), *long)
    yield Subject(("ATTENTION", f"fwd/{width}"), ("attention_fwd",), both, _attention_tiles)
    yield Subject(("ATTENTION", f"dq/{width}"), ("attention_bwd_dq",), long, _attention_tiles)
    yield Subject(("ATTENTION", f"dkdv/{width}"), ("attention_bwd_dkdv",), long, _attention_tiles)
    if width != "fp32":
        cases = ((size, attention_case(head_dim, size, 0.1, dtype)) for size in (64, 128))
        yield Subject(("ATTENTION", f"short/{width}"), ("attention_bwd_short",), tuple(cases), _short_tiles)


def _attention_tiles(architecture: str, size: int) -> Iterator[Tile]:
    for block_m, block_n, num_warps, num_stages in itertools.product((16, 32, 64, 128), (64, 128), (4, 8), (1, 2, 3)):
        yield Tile(block_m, block_n, num_warps, num_stages)
        if num_warps == 8 and architecture == "sm_90":
            # Two programs of 8 warps then share a multiprocessor.
            yield Tile(block_m, block_n, num_warps, num_stages, 128)


def _short_tiles(architecture: str, size: int) -> Iterator[Tile]:
    for block_n, num_warps, num_stages in itertools.product((64, 128), (4, 8), (1, 2)):
        if block_n <= size:
            yield Tile(size, block_n, num_warps, num_stages)


def _layer_norm_tiles(architecture: str, size: int) -> Iterator[Tile]:
    # A warp holds 256 columns, so that a thread owns whole columns of all rows and the mask stays in its registers.
    num_warps = {512: 2, 1024: 4, 2048: 8}.get(size, 16)
    for block_m, share in itertools.product((2, 4, 8), (1, 2, 4)):
        yield Tile(block_m, share * MULTIPROCESSORS[architecture], num_warps, 1)


def _rotary_tiles(architecture: str, size: int) -> Iterator[Tile]:
    for block_m, num_warps in itertools.product((4, 8, 16, 32, 64), (1, 2, 4, 8)):
        yield Tile(block_m, 0, num_warps, 1)


def _rows(architecture: str, size: int) -> Iterator[Tile]:
    for block_m, block_n, num_warps in itertools.product((4, 8, 16, 32), (128, 256, 512), (4, 8)):
        yield Tile(block_m, block_n, num_warps, 1)


def _loss_tiles(architecture: str, size: int) -> Iterator[Tile]:
    blocks = (size,) if size <= 32768 else (4096, 8192, 16384)
    for block_n, num_warps in itertools.product(blocks, (4, 8, 16, 32)):
        yield Tile(1, block_n, num_warps, 1)
