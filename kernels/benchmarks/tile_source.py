"""Change a table of `_tiles.py` in its source text, so that comments and other tables stay as they are."""

from __future__ import annotations

import ast

from bert_kernels._tiles import Tile

Rows = tuple[tuple[int, Tile], ...]
_ANY = 1 << 62


def rows_text(rows: Rows) -> str:
    """Return a table's rows as `_tiles.py` writes them."""
    texts = [f"({'_ANY' if largest == _ANY else largest}, {_tile_text(tile)})" for largest, tile in rows]
    return f"({texts[0]},)" if len(texts) == 1 else f"({', '.join(texts)})"


def _tile_text(tile: Tile) -> str:
    numbers = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages]
    return f"Tile({', '.join(map(str, numbers + ([] if tile.max_registers is None else [tile.max_registers])))})"


def with_rows(source: str, path: tuple[str, ...], architecture: str, rows: Rows) -> str:
    """Return the source with the rows of an architecture in the table at `path` replaced, or added before the default.

    Raises:
        ValueError: there is no such table.
    """
    table = _table(ast.parse(source), path)
    keys = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    if architecture in keys:
        old = table.values[keys.index(architecture)]
        return _replaced(source, old, rows_text(rows))
    default = table.keys[keys.index("default")]
    assert default is not None
    return _inserted(source, default, f'"{architecture}": {rows_text(rows)},')


def _table(module: ast.Module, path: tuple[str, ...]) -> ast.Dict:
    for statement in module.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            node: ast.AST | None = statement.value if statement.target.id == path[0] else None
            for key in path[1:]:
                node = _value(node, key)
            if isinstance(node, ast.Dict):
                return node
    raise ValueError(f"_tiles.py has no table {' '.join(path)}")


def _value(node: ast.AST | None, key: str) -> ast.AST | None:
    if not isinstance(node, ast.Dict):
        return None
    pairs = zip(node.keys, node.values, strict=True)
    return next((value for name, value in pairs if isinstance(name, ast.Constant) and name.value == key), None)


def _replaced(source: str, node: ast.expr, text: str) -> str:
    assert node.end_lineno is not None and node.end_col_offset is not None
    lines = source.splitlines(keepends=True)
    before = "".join(lines[: node.lineno - 1]) + lines[node.lineno - 1][: node.col_offset]
    return before + text + lines[node.end_lineno - 1][node.end_col_offset :] + "".join(lines[node.end_lineno :])


def _inserted(source: str, before: ast.expr, text: str) -> str:
    lines = source.splitlines(keepends=True)
    line = lines[before.lineno - 1]
    # Between the brace of a table on one line and its default, or on a line of its own.
    own_line = not line[: before.col_offset].strip()
    lines[before.lineno - 1] = (
        line[: before.col_offset]
        + text
        + ("\n" if own_line else " ")
        + (line if own_line else line[before.col_offset :])
    )
    return "".join(lines)
