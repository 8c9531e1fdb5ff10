"""Systematic damage to a JSON configuration: every kind of mistake, at every setting of a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

Path = tuple[str | int, ...]
"""Keys and list indexes from the top of a configuration to a setting."""


class Damage(NamedTuple):
    """One mistake that can be made in a configuration."""

    kind: str
    path: str
    """Dotted name of the damaged setting."""
    is_wrong: bool
    """No reading of it can be right: it has to be refused."""
    make: partial[None]
    """Makes the mistake in a configuration."""

    @property
    def place(self) -> Path:
        """What of the configuration is replaced, renamed or added."""
        return self.make.keywords["path"]


def broken(config: dict[str, Any], *damages: Damage) -> str:
    """Return the text of a file with these mistakes in it."""
    changed = copy.deepcopy(config)
    for damage in damages:
        damage.make(changed)
    return json.dumps(changed)


class _Twice(str):
    """A key that a dictionary takes a second time, so that json.dumps writes it twice."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def every_damage(config: dict[str, Any]) -> Iterator[Damage]:
    """Yield each kind of mistake at each section, setting and list item of a configuration."""
    for path, value in _places(config, ()):
        dotted = ".".join(map(str, path))
        for kind, is_wrong, replacement in _values(value):
            yield Damage(kind, dotted, is_wrong, partial(put, path=path, value=replacement))
        if isinstance(path[-1], str):
            yield Damage("deleted", dotted, False, partial(_rename, path=path, name=None))
            yield Damage("given twice", dotted, True, partial(_give_twice, path=path))
            yield from _names(path, dotted)
        if isinstance(value, dict):
            yield from _additions(path, dotted)
    yield from _additions((), "")


def _places(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _values(value: Any) -> Iterator[tuple[str, bool, Any]]:
    """Yield kind, whether it has to be refused, and what stands in the place of a value."""
    yield "null", False, None
    yield "not a number", True, float("nan")
    yield "infinity", True, float("-inf")
    yield "huge whole number", True, 10**30
    yield "huge number", False, 1e300
    is_known, is_number = value not in (None, "auto"), isinstance(value, int | float) and not isinstance(value, bool)
    yield "object in its place", is_known and not isinstance(value, dict), {"value": value}
    yield "list in its place", is_known and not isinstance(value, list), [value]
    yield "empty object", is_known and not isinstance(value, dict), {}
    yield "empty list", is_known and not isinstance(value, list), []
    yield "true in its place", is_known and not isinstance(value, bool), True
    yield "false in its place", is_known and not isinstance(value, bool), False
    yield "string in its place", is_known and not isinstance(value, str), json.dumps(value)
    yield "word in its place", is_known and not isinstance(value, str), "nonsense-word"
    yield "empty string", is_known and not isinstance(value, str), ""
    yield "auto in its place", False, "auto"
    yield "unprintable text", True, "a\nb\u200b"
    yield "zero", is_known and not is_number, 0
    yield "one", is_known and not is_number, 1
    if is_number:
        yield "negated", False, -value
        yield "fraction", False, value + 0.5
        yield "ten times", False, value * 10
        yield "one more", False, value + 1
        yield "as a float", False, float(value)
    if isinstance(value, str):
        yield "upper case", False, value.upper()
        yield "with a space", False, value + " "
        yield "long", False, value * 2000
        yield "out of its folder", False, "../../../../etc/" + value
    if isinstance(value, list):
        yield "one item more", False, [*value, value[-1] if value else 1]
        yield "one item less", False, value[:-1]


def _names(path: Path, dotted: str) -> Iterator[Damage]:
    """Yield the damage to a setting's name; a misspelt name is named in the message as it was typed."""
    name = str(path[-1])
    prefix = dotted[: len(dotted) - len(name)]
    spellings = {
        "letter missing": name[:-1] or "x",
        "letters swapped": name[1] + name[0] + name[2:] if name[1:2] and name[0] != name[1] else name + "x",
        "upper-case name": name.upper(),
        "hyphens": name.replace("_", "-") if "_" in name else name + "-",
        "name with a space": name + " ",
        "plural": name + "s",
        "look-alike letter": name.replace("a", "\u0430").replace("e", "\u0435") + "\u0455",
    }
    for kind, spelled in spellings.items():
        yield Damage(kind, prefix + spelled, True, partial(_rename, path=path, name=spelled))


def _additions(path: Path, dotted: str) -> Iterator[Damage]:
    prefix = f"{dotted}." if dotted else ""
    for kind, name, value in (
        ("unknown setting", "surprise", 1),
        ("unknown section", "surprise", {"enabled": True}),
        ("internal name", "_attn_implementation_internal", "evil/repo"),
        ("class path", "_target_", "os.system"),
        ("secret", "api_key", "hunter2"),
        ("secret token", "hf_token", "hunter2"),
        ("secret in camel case", "authToken", "hunter2"),
    ):
        yield Damage(kind, prefix + name, True, partial(put, path=(*path, name), value=value))


def _at(config: Any, path: Path) -> Any:
    for part in path:
        config = config[part]
    return config


def put(config: dict[str, Any], *, path: Path, value: Any) -> None:
    _at(config, path[:-1])[path[-1]] = value


def _rename(config: dict[str, Any], *, path: Path, name: str | None) -> None:
    holder = _at(config, path[:-1])
    value = holder.pop(path[-1])
    if name is not None:
        holder[name] = value


def _give_twice(config: dict[str, Any], *, path: Path) -> None:
    holder = _at(config, path[:-1])
    holder[_Twice(path[-1])] = holder[path[-1]]
