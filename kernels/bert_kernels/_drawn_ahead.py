"""Small dropout masks of several sites drawn in one go: by itself such a mask costs less than the calls that draw it.

A micro-batch has a seed of its own and asks for the same sites in the same order as the one before. So at the first
site of a place (rows and columns) all are drawn that were asked for at its counterpart under the seed before. What is
drawn is a function of seed, site and place: a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

import numpy as np


class DrawnAhead(threading.local):
    """The draws of one seed; each thread has its own."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._asked: list[list[int]] = []
        """Sites, by place in the order of their first mention."""
        self._expected: list[list[int]] = []
        self._numbers: dict[Hashable, int] = {}
        self._drawn: dict[tuple[int, int], np.ndarray] = {}

    def take(self, seed: int, site: int, place: Hashable, draw: Callable[[Sequence[int]], np.ndarray]) -> np.ndarray:
        """Return draw([site])[0].

        Args:
            seed, site: of the mask.
            place: all else that it is a function of.
            draw: sites -> masks of this seed and place.
        """
        if seed != self._seed:
            self._seed, self._expected, self._asked, self._numbers, self._drawn = seed, self._asked, [], {}, {}
        number = self._numbers.setdefault(place, len(self._numbers))
        if number == len(self._asked):
            self._asked.append([])
        asked = self._asked[number]
        if site not in asked:
            asked.append(site)
        if (number, site) in self._drawn:
            return self._drawn.pop((number, site))
        expected = self._expected[number] if number < len(self._expected) else []
        sites = [site, *(other for other in expected if other not in asked and (number, other) not in self._drawn)]
        first, *others = draw(sites)
        self._drawn |= {(number, other): one for other, one in zip(sites[1:], others, strict=True)}
        return first
