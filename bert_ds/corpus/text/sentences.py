"""Splitting text into sentences: English and Chinese, by rules, without a model.

A line end always ends a sentence. Inside a line a Chinese stop ends one, and an English stop does when white space
follows, the next word does not start in lower case, and the word before is no abbreviation.
"""

from __future__ import annotations

import re

_CLOSERS = "\"'”’」』）》】〉〕)\\]»"
_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CHINESE_STOPS = "。！？；｡"
_STOP = re.compile(rf"[.!?…{_CHINESE_STOPS}]+[{_CLOSERS}]*(?:\[\d+\])*(\s*)")
_CHINESE_CHARACTER = re.compile(f"[{_CHINESE}]")
_LAST_WORD = re.compile(r"([^\s\"'“‘(\[—–-]+)\.$")
_ACRONYM = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
_LOOK, _LONGEST_TITLE = 24, 1000
"""Characters that are looked at around a stop, however long the line is."""
_OPENERS = "\"'“‘([「『（《【«¿¡"


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_NEVER_LAST = _words(
    "mr mrs ms mx dr prof rev hon messrs mme mlle gen col maj capt cmdr lt sgt cpl pvt adm brig supt insp sen rep gov "
    "pres amb st ste mt ft e.g i.e cf viz vs al ca approx resp incl esp fr mgr msgr bros univ ed eds trans repr"
)
_BEFORE_NUMBER = _words(
    "no nos nr vol vols p pp ch chap sec fig figs eq eqs art ref refs tab ver v jan feb mar apr jun jul aug sep sept "
    "oct nov dec c r b d fl op pt bk"
)
_SOMETIMES_LAST = _words("jr sr inc co corp ltd llc etc dept est ave blvd rd hwy ph.d m.d b.a m.a u.s u.k")
_STARTERS = _words(
    "the this that these those he she it they we you his her its their our my there here in on at by for from with "
    "after before when while although though however but and or so if as since during because then thus therefore "
    "moreover furthermore meanwhile another some many most all both each other one two what who why how where an "
    "according despite once until today later also not no"
)


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text in order, stripped and not empty; nothing but white space is lost."""
    sentences: list[str] = []
    for line in text.splitlines():
        sentences += _split_line(line.strip())
    return sentences


def _split_line(line: str) -> list[str]:
    sentences = []
    start = 0
    for stop in _STOP.finditer(line):
        end = stop.end()
        if end < len(line) and _ends_sentence(line, start, stop):
            sentences.append(line[start:end].rstrip())
            start = end
    if start < len(line):
        sentences.append(line[start:])
    return sentences


def _ends_sentence(line: str, start: int, stop: re.Match[str]) -> bool:
    first, following = line[stop.start()], line[stop.end()]
    if first in _CHINESE_STOPS:
        return _titles_are_closed(line, start, stop.end())
    if not stop.group(1):
        return first in "!?" and _CHINESE_CHARACTER.match(following) is not None
    if following in _OPENERS:
        following = line[stop.end() : stop.end() + _LOOK].lstrip(_OPENERS)[:1]
    if following.islower():
        return False
    if first != "." or line[stop.start() + 1] == ".":
        return True
    return not _is_abbreviation(line, start, stop, following)


def _titles_are_closed(line: str, start: int, end: int) -> bool:
    """A stop inside a Chinese book title belongs to the title."""
    start = max(start, end - _LONGEST_TITLE)
    return line.count("《", start, end) <= line.count("》", start, end)


def _is_abbreviation(line: str, start: int, stop: re.Match[str], following: str) -> bool:
    found = _LAST_WORD.search(line, max(start, stop.start() - 40), stop.start() + 1)
    if found is None:
        return False
    word = found.group(1)
    if found.start(1) == start and word.isdigit():
        return True
    lowered = word.lower()
    if lowered in _NEVER_LAST or (lowered in _BEFORE_NUMBER and following.isdigit()):
        return True
    if lowered in _SOMETIMES_LAST or _ACRONYM.fullmatch(word):
        return not _starts_like_a_sentence(line, stop.end())
    return False


def _starts_like_a_sentence(line: str, start: int) -> bool:
    words = line[start : start + 24].lstrip(_OPENERS).split(maxsplit=1)
    return bool(words) and words[0].rstrip(",;:").lower() in _STARTERS
