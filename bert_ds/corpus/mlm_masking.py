"""Masked language modelling targets: which positions are predicted and what the encoder sees there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class MaskedExample(NamedTuple):
    """One sequence as the encoder sees it, with its targets."""

    input_ids: np.ndarray
    """int32 [n], [CLS] first and [SEP] last, replaced at the masked positions."""
    token_type_ids: np.ndarray
    """int8 [n], 0 or 1."""
    pair_label: int
    """0, 1, or IGNORE_INDEX without a pair objective."""
    positions: np.ndarray
    """int32 [p], masked positions in ascending order."""
    labels: np.ndarray
    """int32 [p], the pieces that stood there."""
    key: tuple[int, int, int]
    """(source, epoch, example)."""
