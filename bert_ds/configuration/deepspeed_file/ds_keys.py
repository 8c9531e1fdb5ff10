"""The settings that DeepSpeed knows, and the check of a DeepSpeed file against them.

DeepSpeed itself ignores unknown names at its top level and in every block that is not a pydantic model, drops "auto"
silently, and turns true into 1. Here a name must be in `ds_keys.json`, which `ds_configs/generate.py` makes from the
pinned DeepSpeed, and a value must have the type and the bounds given there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from bert_ds.configuration.reading.config_problems import MAX_PROBLEMS, Problem, did_you_mean, found_wanted, one_of

Node = dict[str, Any]

AUTO = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "fp16.enabled",
        "optimizer.type",
        "scheduler.type",
        "communication_data_type",
        "data_types.grad_accum_dtype",
        "data_types.param_dtype",
        "data_types.keep_in_fp32_modules",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.allgather_bucket_size",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.stage3_param_persistence_threshold",
    }
)
"""Settings that may be "auto": what the recipe decides, and sizes that follow from its model."""

LARGEST = 1e12
"""No factor or scale of a run is larger; fp32 could not carry it."""

_WANTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "list": "a list",
    "object": "an object",
}
_BOUNDS = (
    ("gt", ">", lambda value, bound: value > bound),
    ("ge", ">=", lambda value, bound: value >= bound),
    ("lt", "<", lambda value, bound: value < bound),
    ("le", "<=", lambda value, bound: value <= bound),
)


@cache
def known_settings() -> Node:
    """Return the table: `deepspeed` (version), `removed` (name -> reason) and `keys`."""
    return json.loads(Path(__file__).with_name("ds_keys.json").read_text(encoding="utf-8"))


def check_settings(data: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """Check names and types of a DeepSpeed file and add what is wrong to `problems`.

    Returns:
        The settings without those that are wrong; second names are replaced by the first (bfloat16 -> bf16), 5e8 by
        500000000.
    """
    return _check_block(data, {"keys": known_settings()["keys"]}, "", problems)


def leaves(block: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted name and value of every setting of nested blocks."""
    for name, value in block.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def default_of(path: str) -> Any:
    """Return DeepSpeed's default of a setting, None where it has none."""
    node: Node = {"keys": known_settings()["keys"]}
    for part in path.split("."):
        node = node.get("keys", {}).get(part, {})
    return node.get("default")


def setting_names() -> list[str]:
    """Return the dotted name of every setting and block, second names included."""
    return list(_all_names(known_settings()["keys"], ""))


def _check_block(block: dict[str, Any], node: Node, prefix: str, problems: list[Problem]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in block.items():
        path = prefix + name
        known = node["keys"].get(name)
        if known is None:
            problems.append(_unknown(name, path, node, wants_hint=len(problems) < MAX_PROBLEMS))
            continue
        if known["kind"] == "deprecated":
            problems.append(Problem(path, f"is an old name that DeepSpeed drops; use {known['instead']}", True))
            continue
        first_name = known["name"] if known["kind"] == "same_as" else name
        if first_name in result or (first_name != name and first_name in block):
            problems.append(Problem(path, f"says the same as {prefix}{first_name}: keep one of the two", True))
            continue
        path, before = prefix + first_name, len(problems)
        checked = _check_value(value, node["keys"][first_name], path, problems)
        if len(problems) == before or isinstance(checked, dict):
            result[first_name] = checked
    return result


def _unknown(name: str, path: str, node: Node, *, wants_hint: bool) -> Problem:
    removed = known_settings()["removed"]
    if path in removed:
        return Problem(path, removed[path], True)
    near = did_you_mean(name, [*node["keys"]]) if wants_hint else ""
    elsewhere = [one for one in setting_names() if one.split(".")[-1] == name] if wants_hint and not near else []
    if elsewhere:
        near = f'; did you mean "{elsewhere[0]}"?'
    version = known_settings()["deepspeed"]
    return Problem(path, f"unknown to DeepSpeed {version}, which would ignore it{near}", True)


def _all_names(keys: dict[str, Node], prefix: str) -> Iterator[str]:
    for name, node in keys.items():
        yield prefix + name
        yield from _all_names(node.get("keys", {}), f"{prefix}{name}.")


def _check_value(value: Any, node: Node, path: str, problems: list[Problem]) -> Any:
    kind = node["kind"]
    if kind == "any" or (value is None and node.get("null")) or (value == "auto" and path in AUTO):
        return value
    if kind == "object" and isinstance(value, dict):
        return _check_block(value, node, path + ".", problems) if "keys" in node else value
    if kind == "int" and node.get("exponent") and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _has_kind(value, kind) or (kind == "int" and abs(value) >= 2**63):
        problems.append(Problem(path, found_wanted(value, _WANTED[kind]) + _about_auto(value)))
        return None
    if value == "auto" and path not in AUTO and "auto" not in node.get("choices", ()):
        problems.append(Problem(path, f'found "auto", wanted another word: DeepSpeed drops it{_about_auto(value)}'))
        return None
    if kind == "list":
        wrong = [item for item in value if node.get("items") == "str" and not isinstance(item, str)]
        if wrong:
            problems.append(Problem(path, found_wanted(wrong[0], "strings in the list")))
        return value
    return _check_range(value, node, path, problems)


def _has_kind(value: Any, kind: str) -> bool:
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, {"bool": bool, "str": str, "list": list, "object": dict}[kind])


def _about_auto(value: Any) -> str:
    return '; "auto" is for what the recipe decides' if value == "auto" else ""


def _check_range(value: Any, node: Node, path: str, problems: list[Problem]) -> Any:
    choices = node.get("choices")
    if choices is not None:
        # DeepSpeed compares these words without their case.
        same = [one for one in choices if str(one).casefold() == str(value).casefold()]
        if not same:
            problems.append(
                Problem(path, found_wanted(value, one_of(choices)) + did_you_mean(value, map(str, choices)))
            )
            return None
        return same[0]
    if isinstance(value, float) and abs(value) > LARGEST:
        problems.append(Problem(path, found_wanted(value, f"at most {LARGEST:g}")))
        return None
    for name, sign, holds in _BOUNDS:
        if name in node and not holds(value, node[name]):
            problems.append(Problem(path, found_wanted(value, f"{sign} {node[name]}")))
    return value
