"""Every setting of the JSON files as Markdown tables: a section for each object of a schema, a row for each setting."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bert_ds.configuration.deepspeed_file.ds_support import ALLOWED, SWITCHED_OFF
from bert_ds.configuration.task.task_kinds import KIND_FACTS

Node = Mapping[str, Any]
SIMPLE = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
DS_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
DS_KINDS = {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "any": "anything"}


def schema_page(schema: Path, *, title: str, opening: str) -> str:
    """Return the page of a recipe's or a task's settings."""
    content = json.loads(schema.read_text(encoding="utf-8"))
    sections = [f"# {title}\n\n{opening}", _table(content)]
    heads = headings(content)
    for name, head in heads.items():
        node = content["$defs"][name]
        sections.append(f"## {head}\n\n{node.get('description', '')}\n\n{_table(node)}")
    page = "\n\n".join(sections) + "\n"
    for name, head in heads.items():
        page = page.replace(f"[{{{name}}}]", f"[{head}](#{re.sub(r'[^a-z_ ]', '', head).replace(' ', '-')})")
    return page


def headings(content: Node) -> dict[str, str]:
    """Return the heading of each object by its name in the code: where a file has it, and which `type` it is."""
    places: dict[str, str] = {}

    def walk(node: Node, before: str) -> None:
        for setting, value in node["properties"].items():
            for name in re.findall(r"#/\$defs/(\w+)", json.dumps(value)):
                if name not in places:
                    places[name] = before + setting
                    walk(content["$defs"][name], f"{before}{setting}.")

    walk(content, "")
    kinds = {name: content["$defs"][name]["properties"].get("type", {}).get("const") for name in places}
    return {name: place + (f", type {kinds[name]}" if kinds[name] else "") for name, place in places.items()}


def _table(node: Node) -> str:
    rows = ["| setting | value | default | what |", "|---|---|---|---|"]
    for name, setting in node["properties"].items():
        default = "wanted" if name in node.get("required", ()) else _default(setting)
        cells = (f"`{name}`", value_text(setting), default, _whole(setting.get("description", "")))
        rows.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(rows)


def value_text(node: Node) -> str:
    """Say in words what a setting may be."""
    if "$ref" in node:
        return f"section {_link(node['$ref'])}"
    for several in ("anyOf", "oneOf"):
        if several in node:
            return " or ".join(value_text(one) for one in node[several])
    if "const" in node or "enum" in node:
        return " or ".join(f"`{json.dumps(value)}`" for value in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind == "array":
        return _array(node)
    if kind == "object":
        return f"names, each with {value_text(node['additionalProperties'])}"
    if kind == "null":
        return "null"
    bounds = [f"{word} {node[key]:,}" for key, word in BOUNDS.items() if key in node]
    return ", ".join([SIMPLE[kind], *bounds]) if kind in SIMPLE else "anything"


def _array(node: Node) -> str:
    if "prefixItems" in node:
        return "list of " + " and ".join(value_text(one) for one in node["prefixItems"])
    most = f", at most {node['maxItems']} of them" if "maxItems" in node else ""
    return f"list of {value_text(node['items'])}{most}"


def _link(ref: str) -> str:
    return f"[{{{ref.rpartition('/')[2]}}}]"


def _default(node: Node) -> str:
    if "default" not in node:
        return ""
    return "its own" if isinstance(node["default"], dict) and node["default"] else f"`{json.dumps(node['default'])}`"


def _whole(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def kinds_table() -> str:
    """Return the kinds of tasks: what a row has, and what is measured."""
    rows = ["| kind | a row has | and may have | metrics, the first is the default | run by |", "|---|---|---|---|---|"]
    for name, facts in KIND_FACTS.items():
        lists = (facts.fields, facts.optional_fields, facts.metrics)
        cells = [", ".join(f"`{word}`" for word in words) for words in lists]
        rows.append(f"| `{name}` | {' | '.join(cells)} | `{'finetune' if facts.is_trained else 'score'}` |")
    return "\n".join(rows)


def deepspeed_page(keys: Path, *, title: str, opening: str) -> str:
    """Return the page of what a DeepSpeed file may say, block by block."""
    content = json.loads(keys.read_text(encoding="utf-8"))
    rows = ["| setting | value | default | here |", "|---|---|---|---|"]
    for path, node in _leaves(content["keys"]):
        rows.append(f"| `{path}` | {_ds_value(node)} | {_default(node)} | {_ds_here(path)} |".replace("\n", " "))
    return f"# {title}\n\n{opening}\n\nDeepSpeed {content['deepspeed']}.\n\n" + "\n".join(rows) + "\n"


def _leaves(keys: Mapping[str, Node], before: str = "") -> Iterator[tuple[str, Node]]:
    for name, node in keys.items():
        if inner := node.get("keys"):
            yield from _leaves(inner, f"{before}{name}.")
        else:
            yield before + name, node


def _ds_value(node: Node) -> str:
    kind = node["kind"]
    if kind == "same_as":
        return f"another name of `{node['name']}`"
    if kind == "deprecated":
        return f"refused: {node['instead']}"
    if choices := node.get("choices"):
        return " or ".join(f"`{json.dumps(choice)}`" for choice in choices)
    bounds = [f"{word} {node[key]:,}" for key, word in DS_BOUNDS.items() if key in node]
    null = " or null" if node.get("null") else ""
    return ", ".join([DS_KINDS.get(kind, kind), *bounds]) + null


def _ds_here(path: str) -> str:
    block = path.split(".")[0]
    if block in SWITCHED_OFF:
        return f"only switched off: {SWITCHED_OFF[block]}"
    if path in ALLOWED:
        values, reason = ALLOWED[path]
        wanted = " or ".join(f"`{json.dumps(value)}`" for value in values)
        return f"{f'only {wanted}' if wanted else 'not at all'}: {reason}"
    return ""
