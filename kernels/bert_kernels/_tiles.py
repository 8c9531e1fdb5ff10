"""The shipped tiles: for each kernel and width, architecture and size, the block sizes and launch options.

A table maps the architecture ("default" where a card has none of its own) to rows (largest size, tile) in order of
size; the last row serves all larger sizes. A change here changes speed and rounding only, never a dropout mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    """Registers per thread that the assembler may use; None: what it likes."""

    @property
    def options(self) -> dict[str, int]:
        """Return the launch options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


TileTable = Mapping[str, tuple[tuple[int, Tile], ...]]

_ANY = 1 << 62

# Key: kernel / head dim rounded up (or fp32). block_m: queries, block_n: keys (multiples of 64, for the mask).
# Size: max_seqlen. "short" is the backward whose program takes a whole sequence: block_m is its largest length, 0 for
# none. On sm_90 max_registers lets two programs of 8 warps share a multiprocessor where that costs no spill.
ATTENTION: Mapping[str, TileTable] = {
    "fwd/64": {
        "sm_90": ((_ANY, Tile(128, 64, 8, 3, 128)),),
        "sm_100": ((_ANY, Tile(128, 64, 8, 3)),),
        "default": ((_ANY, Tile(128, 64, 8, 2)),),
    },
    "fwd/128": {
        "sm_90": ((_ANY, Tile(128, 64, 8, 2)),),
        "sm_100": ((_ANY, Tile(128, 64, 8, 2)),),
        "default": ((_ANY, Tile(64, 64, 8, 2)),),
    },
    "fwd/fp32": {"default": ((_ANY, Tile(32, 64, 8, 1)),)},
    "short/64": {
        "sm_80": ((64, Tile(64, 64, 8, 1)), (_ANY, Tile(128, 64, 8, 1))),
        "sm_90": ((64, Tile(64, 64, 4, 1)), (_ANY, Tile(128, 64, 8, 2))),
        "sm_100": ((64, Tile(64, 64, 8, 1)), (_ANY, Tile(128, 64, 8, 1))),
        "default": ((_ANY, Tile(64, 64, 8, 1)),),
    },
    "short/128": {
        "sm_90": ((_ANY, Tile(64, 64, 8, 2)),),
        "sm_100": ((_ANY, Tile(128, 64, 8, 1)),),
        "default": ((_ANY, Tile(64, 64, 8, 1)),),
    },
    "short/fp32": {"default": ((_ANY, Tile(0, 64, 8, 1)),)},
    "dq/64": {
        "sm_90": ((_ANY, Tile(64, 64, 4, 2)),),
        "sm_100": ((_ANY, Tile(64, 64, 4, 2)),),
        "default": ((_ANY, Tile(64, 64, 4, 2)),),
    },
    "dq/128": {"sm_100": ((_ANY, Tile(64, 64, 8, 2)),), "default": ((_ANY, Tile(64, 64, 8, 2)),)},
    "dq/fp32": {"default": ((_ANY, Tile(32, 64, 8, 1)),)},
    "dkdv/64": {
        "sm_90": ((_ANY, Tile(64, 64, 4, 2)),),
        "sm_100": ((_ANY, Tile(64, 64, 8, 2)),),
        "default": ((_ANY, Tile(32, 64, 8, 2)),),
    },
    "dkdv/128": {
        "sm_90": ((_ANY, Tile(128, 64, 8, 1)),),
        "sm_100": ((_ANY, Tile(64, 64, 8, 2)),),
        "default": ((_ANY, Tile(64, 64, 8, 1)),),
    },
    "dkdv/fp32": {"default": ((_ANY, Tile(16, 64, 8, 1)),)},
}

# block_m: partial sums per step, block_n: columns.
COLUMN_SUMS = Tile(32, 32, 4, 2)

# Size: hidden size rounded up to a power of two. block_m: rows (even, for the mask); block_n: programs of the backward,
# each with a row of partial sums, a multiple of the card's multiprocessors. A warp holds 256 columns, so that a thread
# owns whole columns of all rows.
LAYER_NORM: TileTable = {
    "sm_80": (
        (256, Tile(4, 432, 1, 1)),
        (512, Tile(4, 432, 2, 1)),
        (1024, Tile(4, 432, 4, 1)),
        (2048, Tile(2, 216, 8, 1)),
        (_ANY, Tile(2, 216, 16, 1)),
    ),
    "sm_90": (
        (256, Tile(4, 528, 1, 1)),
        (512, Tile(4, 528, 2, 1)),
        (1024, Tile(4, 528, 4, 1)),
        (2048, Tile(2, 264, 8, 1)),
        (_ANY, Tile(2, 264, 16, 1)),
    ),
    "sm_100": (
        (256, Tile(4, 592, 1, 1)),
        (512, Tile(4, 592, 2, 1)),
        (1024, Tile(4, 592, 4, 1)),
        (2048, Tile(2, 296, 8, 1)),
        (_ANY, Tile(2, 296, 16, 1)),
    ),
    "default": (
        (256, Tile(4, 512, 1, 1)),
        (512, Tile(4, 512, 2, 1)),
        (1024, Tile(4, 512, 4, 1)),
        (2048, Tile(2, 256, 8, 1)),
        (_ANY, Tile(2, 256, 16, 1)),
    ),
}

# Size: intermediate size. block_m: rows, block_n: columns.
BIAS_GELU: TileTable = {"default": ((_ANY, Tile(16, 256, 4, 1)),)}
# Row programs of the backward, each with a row of partial sums of dbias.
BIAS_GELU_PROGRAMS = 64
# Key: kernel. Size: intermediate size. block_m: rows, block_n: columns.
GEGLU: Mapping[str, TileTable] = {
    "fwd": {"default": ((_ANY, Tile(8, 256, 4, 1)),)},
    "bwd": {"default": ((_ANY, Tile(4, 256, 4, 1)),)},
}

# Size: head dim. block_m: tokens.
ROTARY: TileTable = {"default": ((64, Tile(16, 0, 2, 1)), (_ANY, Tile(8, 0, 2, 1)))}

# Size: columns of the logits, of fp32 twice as many, as a row of them takes twice the registers. block_n: columns of a
# block; a row that fits one block is read once.
MLM_CROSS_ENTROPY: TileTable = {
    "default": (
        (2048, Tile(1, 2048, 4, 1)),
        (8192, Tile(1, 8192, 8, 1)),
        (32768, Tile(1, 32768, 32, 1)),
        (_ANY, Tile(1, 8192, 16, 1)),
    )
}

# Key: bytes of an element. block_m: sorted tokens of a chunk, block_n: columns.
SEGMENT_SUM: Mapping[int, Tile] = {2: Tile(64, 128, 8, 1), 4: Tile(32, 64, 4, 1)}

# block_n: elements of a chunk. LAMB_ROWS: partial sums per step.
LAMB = Tile(1, 4096, 8, 1)
LAMB_ROWS = Tile(1, 1024, 4, 1)
