"""Reading the JSON files of a run: strict, bounded, and with every mistake of a file reported at once.

`json.loads` alone takes duplicate keys (the last one wins), NaN and endless nesting; a FIFO would block it and
/dev/zero would fill the memory. Here all of these are errors that name the file and the setting.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_ds.basics.input_gate import read_text
from bert_ds.configuration.reading.config_problems import MAX_PROBLEMS, Problem, describe
from bert_ds.configuration.reading.config_secrets import is_secret_name, is_secret_value, secret_text

MAX_BYTES = 200_000
MAX_DEPTH = 16
MAX_NAMES = 1_000


class ConfigError(ValueError):
    """A setting is missing, unknown or contradictory; the message names file, field, value found and value wanted."""


@dataclass
class ConfigFile:
    """A JSON file as read, before its content is judged."""

    name: str
    """As the user spelled it."""
    folder: str
    """Absolute; relative paths in the file start here."""
    data: dict[str, Any]
    """The value with problems cut out: the last of duplicate keys, null for what is not a number."""
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with the JSON itself."""
    overridden: dict[str, str] = field(default_factory=dict)
    """Dotted paths that something else has set, and what: an option of the command line or another file."""

    def source_of(self, path: str) -> str:
        """The file or the option that a setting comes from."""
        given = [who for name, who in self.overridden.items() if path == name or path.startswith(name + ".")]
        return given[-1] if given else self.name


def shipped_file(name: str) -> Path:
    """Return the path of a file of ds_configs, in a checkout or in an installed package.

    Args:
        name: as in "recipes/embedded_default.json".
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package.parent / "ds_configs", package / "_shipped/ds_configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name} is neither in {package.parent / 'ds_configs'} nor in the installed package")


def read_config_file(path: str | Path) -> ConfigFile:
    """Read a JSON object from a file.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not one JSON object. Mistakes inside the object are
            kept in `problems`.
    """
    name = str(path)
    text = read_text(name, max_bytes=MAX_BYTES, error=ConfigError)
    if text.startswith("\ufeff"):
        raise ConfigError(f"{name}: starts with a byte order mark; save it as UTF-8 without one")
    file = ConfigFile(name, os.path.dirname(os.path.abspath(name)), {})
    try:
        value = parse_json(text)
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply, at most {MAX_DEPTH} levels are read") from None
    except ValueError as error:
        raise ConfigError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: found {describe(value)}, wanted one JSON object")
    file.data = _plain(value, (), file.problems)
    return file


def apply_overrides(file: ConfigFile, overrides: Sequence[str]) -> None:
    """Set "section.name=value" in the data of a file; mistakes join the problems of the file.

    The value is JSON where it parses as such, else a plain string. A number in the path is a list index.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        parts = tuple(path.strip().split("."))
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            file.problems.append(Problem("", f"--set {describe(override)}: wanted section.name=value"))
            continue
        dotted = ".".join(parts)
        file.overridden[dotted] = "--set"
        try:
            value = _override_value(text)
        except (ValueError, RecursionError) as error:
            file.problems.append(Problem(dotted, f"not JSON: {error}"))
            continue
        found: list[Problem] = []
        plain = _plain({parts[-1]: value}, parts[:-1], found)
        file.problems = [one for one in file.problems if one.path != dotted] + found
        if parts[-1] in plain:
            set_value(file, dotted, plain[parts[-1]])


def set_value(file: ConfigFile, dotted: str, value: Any) -> None:
    """Set one setting in the data of a file, making missing sections on the way."""
    if not _put(file.data, tuple(dotted.split(".")), value):
        file.problems.append(Problem(dotted, "there is no such section or list item"))


def resolve_paths(file: ConfigFile, patterns: Sequence[str]) -> dict[str, Any]:
    """Return the data with the named settings made absolute.

    A path from the file starts at the file's folder, one from an override at the current folder.
    """
    data = json.loads(json.dumps(file.data))
    for pattern in patterns:
        for holder, key, dotted in _matches(data, tuple(pattern.split(".")), ()):
            value = holder[key]
            if not isinstance(value, str) or not value or "://" in value:
                continue
            base = file.folder if file.source_of(dotted) == file.name else os.getcwd()
            holder[key] = os.path.abspath(os.path.join(base, os.path.expanduser(value)))
    return data


def raise_problems(file: ConfigFile, problems: Sequence[Problem]) -> None:
    """Raise one ConfigError with a line per problem of the file, if there is any.

    `problems` are those of the content. A setting whose JSON is wrong was judged with null in its place, so that only
    its name can be wrong too.
    """
    broken = {problem.path for problem in file.problems if problem.path}
    every = [*file.problems, *(one for one in problems if one.path not in broken or one.is_about_the_name)]
    if not every:
        return
    lines = list(dict.fromkeys(problem.line(file.source_of(problem.path)) for problem in every))
    if len(lines) > MAX_PROBLEMS:
        lines = [*lines[:MAX_PROBLEMS], f"{file.name}: and {len(lines) - MAX_PROBLEMS} problems more"]
    raise ConfigError("\n".join(lines))


def parse_json(text: str) -> Any:
    """Parse JSON, marking duplicate keys and numbers that are none instead of taking them.

    Raises:
        ValueError: the text is not JSON.
        RecursionError: it is nested too deeply for the parser.
    """
    return json.loads(
        text,
        object_pairs_hook=_Object,
        parse_constant=_NotANumber,
        parse_float=_finite_float,
        parse_int=_bounded_int,
    )


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys came twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.duplicates = {key for key, _ in pairs if key in seen or seen.add(key)}  # type: ignore[func-returns-value]


class _NotANumber(str):
    """The spelling of a number that is not finite or too large to compute with."""


def _finite_float(text: str) -> float | _NotANumber:
    value = float(text)
    return value if math.isfinite(value) else _NotANumber(text)


def _bounded_int(text: str) -> int | _NotANumber:
    return int(text) if len(text) <= 20 and abs(int(text)) < 2**63 else _NotANumber(text)


def _plain(value: Any, path: tuple[str, ...], problems: list[Problem]) -> Any:
    """Return the value without markers, adding what they stand for to the problems."""
    where = ".".join(path)
    if len(path) > MAX_DEPTH:
        problems.append(Problem(where, f"nested too deeply, at most {MAX_DEPTH} levels are read"))
        return None
    if isinstance(value, _NotANumber):
        problems.append(Problem(where, f"found {value[:20]}, wanted a finite number below 2^63"))
        return None
    if isinstance(value, str) and is_secret_value(value):
        problems.append(Problem(where, secret_text(where)))
        return None
    if isinstance(value, str) and (not value.isprintable() or "\ufffd" in value):
        problems.append(Problem(where, f"found {describe(value)}, wanted printable text"))
        return None
    if isinstance(value, list):
        return [_plain(item, (*path, str(index)), problems) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return _plain_object(value, path, problems)
    return value


def _plain_object(value: dict[str, Any], path: tuple[str, ...], problems: list[Problem]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if len(value) > MAX_NAMES:
        problems.append(Problem(".".join(path), f"found {len(value)} names in one object, wanted at most {MAX_NAMES}"))
        return result
    for key, inner in value.items():
        where = (*path, key)
        if key in getattr(value, "duplicates", ()):
            problems.append(Problem(".".join(where), "is given twice"))
        if not key.isprintable():
            problems.append(Problem(".".join(path), f"found the name {describe(key)}, wanted printable text"))
        elif is_secret_name(key):
            problems.append(Problem(".".join(where), secret_text(".".join(where))))
        else:
            result[key] = _plain(inner, where, problems)
    return result


def _override_value(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        if text.lstrip()[:1] in ("{", "[", '"'):
            raise
        return text


def _put(data: Any, parts: tuple[str, ...], value: Any) -> bool:
    """Set the value at a path, making missing sections on the way; False where the path leads nowhere."""
    *outer, last = parts
    for part in outer:
        if isinstance(data, list):
            data = data[int(part)] if _is_index(part, data) else None
        elif isinstance(data, dict):
            if data.get(part) is None:
                data[part] = {}
            data = data[part]
        else:
            return False
    if isinstance(data, dict):
        data[last] = value
    elif isinstance(data, list) and _is_index(last, data):
        data[int(last)] = value
    else:
        return False
    return True


def _is_index(part: str, items: list[Any]) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 6 and int(part) < len(items)


def _matches(data: Any, parts: tuple[str, ...], path: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    head, *rest = parts
    keys: list[Any] = []
    if isinstance(data, list):
        keys = list(range(len(data))) if head == "*" else []
    elif isinstance(data, dict):
        keys = [head] if head in data else []
    for key in keys:
        here = (*path, str(key))
        if not rest:
            yield data, key, ".".join(here)
        else:
            yield from _matches(data[key], tuple(rest), here)
