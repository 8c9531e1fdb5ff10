"""From a validation error to one line per problem: where, what was found, what is wanted, the nearest known name."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

ELSEWHERE = {
    "max_grad_norm": "clipping is training.gradient_clipping: no optimizer sees the global norm, DeepSpeed does",
    "learning_rate": "it is optimizer.lr",
    "batch_size": "the global batch is training.train_batch_size",
    "train_micro_batch_size_per_gpu": "it belongs to the DeepSpeed file",
    "gradient_accumulation_steps": "it follows from training.train_batch_size and the DeepSpeed file's micro-batch",
}
"""Names that people type from memory, and where the setting is."""

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "missing": "a value",
    "string_too_short": "a string that is not empty",
}
UNION_TAG = "union tag: "
"""Begins the tag of a form of a setting that has several, which pydantic puts into the path of a problem."""
_LONGEST_SHOWN = 60
MAX_PROBLEMS = 50
"""Lines of a message; looking for the nearest name of every unknown one in a hostile file would take minutes."""


class Problem(NamedTuple):
    """One mistake in a file."""

    path: str
    """Dotted name of the setting; empty for the file as a whole."""
    text: str
    """What was found and what is wanted."""

    is_about_the_name: bool = False
    """There is no such setting, whatever its value."""

    def line(self, source: str) -> str:
        """The problem as one line, `source` being the file or the option that said it."""
        return f"{source}: {printable(self.path)}: {self.text}" if self.path else f"{source}: {self.text}"


def describe(value: Any) -> str:
    """Return a short form of a JSON value; what objects and lists hold is not shown, as it may be private.

    A pair of numbers is: betas for example.
    """
    if isinstance(value, dict):
        return "an object"
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(part) in (int, float) for part in value)
    if isinstance(value, list) and not is_pair:
        return "a list" if value else "an empty list"
    text = json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "...")


def printable(text: str) -> str:
    """Return text that any terminal and log file can take."""
    short = text if len(text) <= 4 * _LONGEST_SHOWN else text[: 4 * _LONGEST_SHOWN] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in short)


def found_wanted(value: Any, wanted: str) -> str:
    """Return the text of the commonest problem."""
    return f"found {describe(value)}, wanted {wanted}"


def one_of(choices: Iterable[Any]) -> str:
    """Return a list of choices as text."""
    shown = [describe(choice) for choice in choices]
    return shown[0] if len(shown) == 1 else "one of " + ", ".join(shown)


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Return '; did you mean "x"?' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    return f"; did you mean {describe(near[0])}?" if near else ""


def section_problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Return one problem per mistake that pydantic found."""
    problems: list[Problem] = []
    items = error.errors(include_url=False)
    for item in items:
        loc = item["loc"]
        if item["type"] == "too_short" and any(one["loc"][: len(loc)] == loc != one["loc"] for one in items):
            continue  # items that are wrong themselves were left out of the count
        path, section = _locate(item["loc"], model)
        is_unknown = item["type"] == "extra_forbidden" and len(problems) < MAX_PROBLEMS
        hint = _hint(path, section, model) if is_unknown else ""
        problems.append(_problem(item, path, hint))
    return problems


def _locate(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], Any]:
    """Return the dotted path without union tags, and the model or models of the section that holds the last part."""
    path: list[str] = []
    here: Any = model
    for index, part in enumerate(loc):
        if str(part).startswith(UNION_TAG):
            continue
        choices = _models_in(here)
        if len(choices) > 1 and isinstance(part, str) and part not in path[-1:] and _tagged(choices, part):
            here = _tagged(choices, part)
            continue
        path.append(str(part))
        if index == len(loc) - 1:
            break
        field = choices[0].model_fields.get(_field_name(choices[0], part)) if choices else None
        here = field.annotation if field is not None and isinstance(part, str) else here
    return path, here


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models_in(part)]


def _tagged(choices: list[type[BaseModel]], tag: str) -> type[BaseModel] | None:
    for choice in choices:
        if "type" in choice.model_fields and choice.model_fields["type"].default == tag:
            return choice
    return None


def _field_name(model: type[BaseModel], key: int | str) -> str:
    for name, field in model.model_fields.items():
        if key in (name, field.alias):
            return name
    return str(key)


def _problem(item: Any, path: list[str], hint: str) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(".".join(path), "unknown setting" + hint, True)
    if kind == "value_error":
        return Problem(".".join(path), str(context["error"]))
    if kind == "missing":
        return Problem(".".join(path), f"is missing, wanted {_WANTED[kind]}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_problem(kind, context, path, item["input"])
    text = found_wanted(item["input"], _wanted(kind, context, item["msg"]))
    if kind == "literal_error":
        text += did_you_mean(item["input"], re.findall(r"'([^']*)'", context["expected"]))
    return Problem(".".join(path), text)


def _tag_problem(kind: str, context: dict[str, Any], path: list[str], value: Any) -> Problem:
    where = ".".join([*path, "type"])
    if kind == "union_tag_not_found":
        near = difflib.get_close_matches("type", [name.strip().lower() for name in value], n=1)
        misspelt = [name for name in value if name.strip().lower() in near]
        hint = f", which is misspelt {describe(misspelt[0])} here" if misspelt else ""
        return Problem(where, f"is missing, wanted the kind of this section{hint}")
    tags = re.findall(r"'([^']*)'", context["expected_tags"])
    found = value.get("type") if isinstance(value, dict) else context["tag"]
    return Problem(where, found_wanted(found, one_of(tags)) + did_you_mean(found, tags))


def _wanted(kind: str, context: dict[str, Any], message: str) -> str:
    if kind in _WANTED:
        return _WANTED[kind]
    if kind == "too_short":
        return f"at least {context['min_length']} item{'s' * (context['min_length'] > 1)}"
    if kind == "literal_error":
        return one_of(re.findall(r"'([^']*)'", context["expected"])) if "'" in context["expected"] else message
    if kind == "string_pattern_mismatch":
        return f"a match of {context['pattern']}"
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if name in context:
            return f"{sign} {context[name]}"
    return re.sub(r"^(Input|Value|String|Tuple|List) should (be )?", "", message)


def _hint(path: list[str], section: Any, model: type[BaseModel]) -> str:
    key = path[-1]
    if key in ELSEWHERE:
        return f"; {ELSEWHERE[key]}"
    here = [field.alias or name for one in _models_in(section) for name, field in one.model_fields.items()]
    near = did_you_mean(key, here)
    if near:
        return near
    if owners := _owners(path, model):
        return f"; it belongs to type {one_of(owners)}"
    everywhere = dict(_all_settings(model, ""))
    close = difflib.get_close_matches(key[:100], list(everywhere), n=1, cutoff=0.8)
    if not close:
        return f"; known here: {', '.join(here)}"
    found = everywhere[close[0]]
    return f"; did you mean {describe(found)}{'' if '.' in found else ' at the top of the file'}?"


def _owners(path: list[str], model: type[BaseModel]) -> list[str]:
    """Return the types of a section that have such a setting."""
    forms = [model]
    for part in path[:-1]:
        if not part.isdigit():
            fields = [form.model_fields.get(_field_name(form, part)) for form in forms]
            forms = [inner for field in fields if field is not None for inner in _models_in(field.annotation)]
    owners = [form for form in forms if {_field_name(form, path[-1]), "type"} <= set(form.model_fields)]
    return [str(form.model_fields["type"].default) for form in owners]


def _all_settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield name, prefix + name
        for inner in _models_in(field.annotation):
            yield from _all_settings(inner, f"{prefix}{name}.")
