"""What no source file may do: run text as code or as a shell command, unpickle freely, reach for the network.

The files are parsed, not searched, so a name in a comment or a string is no finding.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bert_ds", "kernels", "slurm", "ds_configs", "docs", ".ci")
PYTHON = [*sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")), ROOT / "setup.py"]
SHELL = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and (path.suffix == ".sh" or re.match(rb"#!.*\b(ba)?sh\b", path.read_bytes()[:100]))
)

FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "__import__": "imports by a name that may come from outside",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
    "pickle.load": "unpickles freely",
    "pickle.loads": "unpickles freely",
    "dill.load": "unpickles freely",
    "joblib.load": "unpickles freely",
    "pandas.read_pickle": "unpickles freely",
    "yaml.load": "builds any object",
    "yaml.unsafe_load": "builds any object",
    "torch.jit.load": "loads code",
    "torch.hub.load": "downloads code",
    "tempfile.mktemp": "names a file that somebody else can make first",
    "dist.broadcast_object_list": "unpickles what a rank sends",
    "dist.all_gather_object": "unpickles what a rank sends",
    "dist.gather_object": "unpickles what a rank sends",
    "dist.scatter_object_list": "unpickles what a rank sends",
    "marshal.loads": "loads code",
    "shelve.open": "unpickles freely",
}
FORBIDDEN_IMPORTS = {"dill", "cloudpickle", "marshal", "shelve", "telnetlib", "ftplib"}
PICKLE_NAMES = {"UnpicklingError", "PickleError"}
"""What may be imported from pickle: the errors that weights_only raises."""


def findings(source: str) -> list[str]:
    """Return "line N: name: why" for everything in a Python source that is forbidden."""
    tree = ast.parse(source)
    found = [(node.lineno, text) for node in ast.walk(tree) for text in _of(node)]
    return [f"line {line}: {text}" for line, text in sorted(found)]


def _of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] in FORBIDDEN_IMPORTS | {"pickle"}:
                yield f"import {alias.name}"
    if isinstance(node, ast.ImportFrom) and node.module:
        names = {alias.name for alias in node.names}
        if node.module.split(".")[0] in FORBIDDEN_IMPORTS or (node.module == "pickle" and names - PICKLE_NAMES):
            yield f"from {node.module} import {', '.join(sorted(names))}"
    if isinstance(node, ast.Call):
        yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    name, given = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
    if name in FORBIDDEN_CALLS:
        yield f"{name}: {FORBIDDEN_CALLS[name]}"
    if "shell" in given and not _is(given["shell"], False):
        yield f"{name} with shell: runs a shell"
    if name.endswith("torch.load") and not _is(given.get("weights_only"), True):
        yield f"{name} without weights_only=True: unpickles freely"
    if name in ("np.load", "numpy.load", "np.fromfile") and not _is(given.get("allow_pickle"), False):
        yield f"{name} without allow_pickle=False"
    if "trust_remote_code" in given and not _is(given["trust_remote_code"], False):
        yield f"{name} with trust_remote_code: runs code from a model folder"
    if name.endswith("from_pretrained") and not _is(given.get("local_files_only"), True):
        yield f"{name} without local_files_only=True: may reach for the network"


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_runs_text_or_unpickles_freely(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import pickle",
        "from pickle import loads",
        "os.system(f'rm {name}')",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True)",
        "AutoModel.from_pretrained(folder)",
        "yaml.load(text)",
        "dist.all_gather_object(found, value)",
    ],
)
def test_each_rule_finds_what_it_forbids(source: str) -> None:
    assert len(findings(source)) == 1


UNQUOTED = re.compile(r"""(?<![\w"'{=\\])\$(\w+|\{\w+[^}"]*\})(?=[\s;|&)]|$)""")
ARITHMETIC = re.compile(r"\(\(.*?\)\)|\[\[.*?\]\]|\$\(\(.*?\)\)")
PLAIN_STRINGS = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*\"""")
HEREDOC = re.compile(r"<<-?'(\w+)'\n.*?\n\1\n", re.DOTALL)


def unquoted_values(script: str) -> list[str]:
    """Return the lines of a shell script that let the shell split or expand a variable."""
    lines = []
    for line in HEREDOC.sub("\n", script).splitlines():
        code = PLAIN_STRINGS.sub('""', ARITHMETIC.sub("", line.split(" #")[0]))
        # An assignment and `case WORD in` do not split.
        code = re.sub(r"(^|\s)(local |export |readonly )?\w+=\S*|\bcase \S+ in", "", code)
        if not code.lstrip().startswith("#") and UNQUOTED.search(code):
            lines.append(line.strip())
    return lines


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_shell_script_leaves_a_value_unquoted_or_runs_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert unquoted_values(text) == []
    assert re.findall(r"^\s*(eval |source /tmp|.*bash -c [\"']?\$|pkill|killall|rm -rf \$)", text, re.MULTILINE) == []
    assert "set -euo pipefail" in text


@pytest.mark.parametrize("line", ["srun $command", "echo ${name} > file", "rm $path", "cd $(dirname $0)"])
def test_an_unquoted_value_is_found(line: str) -> None:
    assert unquoted_values(line) == [line]
