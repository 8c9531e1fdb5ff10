"""What a user sees when a DeepSpeed release has renamed something that this project relies on."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lamb_bert import make_model
from lamb_optimizers import make_optimizer as optimizer_of
from lamb_runs import Case, ds_config, quiet_deepspeed
from ranks_harness import run_ranks
from torch import nn

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training import deepspeed_names as names

ROOT = Path(__file__).resolve().parents[1]
TRAINING = sorted((ROOT / "bert_ds/training").glob("*.py"))
VERBS = [ROOT / "bert_ds/pretrain.py", ROOT / "bert_ds/finetune.py"]
ENGINES = {
    "stage0": Case(0),
    "stage0_bf16": Case(0, "bf16"),
    "stage1": Case(1),
    "bf16_optimizer": Case(1, "bf16", top={"data_types": {"grad_accum_dtype": "fp32"}}),
    "stage2_offload": Case(2, "bf16", zero={"offload_optimizer": {"device": "cpu"}}),
    "stage3": Case(3, "bf16"),
}
READ = [
    *(("stage0", "engine", name) for name in names.ENGINE),
    *(("stage0", "config", name) for name in names.CONFIG),
    *(("stage0_bf16", "wrapper", name) for name in (*names.WRAPPER, *names.MASTERS)),
    *(("stage1", "one rank", name) for name in names.ONE_RANK),
    *(("bf16_optimizer", "wrapper", name) for name in names.WRAPPER),
    *(("bf16_optimizer", "parameter", name) for name in names.PARAMETER_FLAT),
    *(("stage2_offload", "wrapper", name) for name in (*names.WRAPPER, *names.OFFLOADED)),
    *(("stage2_offload", "parameter", name) for name in names.PARAMETER_FLAT),
    *(("stage3", "wrapper", name) for name in (*names.WRAPPER, *names.ZERO3)),
    *(("stage3", "parameter", name) for name in names.PARAMETER_ZERO3),
    *(("stage3", "part", name) for name in names.PART_ZERO3),
]
"""Engine, what has the name, the name."""
IMPORTED = [
    (path.stem, node.module, alias.name)
    for path in TRAINING
    for block in ast.walk(ast.parse(path.read_text()))
    if isinstance(block, ast.With) and "named_release" in ast.unparse(block.items[0])
    for node in block.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]
"""Module of ours, module of DeepSpeed, name."""


class Without:
    """An object one of whose names is gone, and another replaced."""

    def __init__(self, real: Any, name: str = "", **replaced: Any) -> None:
        self.__dict__.update(_real=real, _name=name, **replaced)

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._real, name)


@contextmanager
def without(holder: Any, name: str) -> Iterator[None]:
    """Delete an attribute and bring it back."""
    value = getattr(holder, name)
    delattr(holder, name)
    try:
        yield
    finally:
        setattr(holder, name, value)


def refuse(engine: Any, kind: str, name: str) -> str:
    """Return what `require_names` says of an engine that lacks one name."""
    parameter = engine.module.layer[0].dense.weight
    try:
        if kind == "parameter":
            with without(parameter, name):
                names.require_names(engine)
        elif kind == "part":
            with without(parameter.ds_tensor, name):
                names.require_names(engine)
        elif kind == "wrapper":
            names.require_names(Without(engine, optimizer=Without(engine.optimizer, name)))
        elif kind == "one rank":
            names.require_one_rank_names(Without(engine.optimizer, name))
        elif kind == "config":
            names.require_names(Without(engine, _config=Without(engine._config, name)))
        else:
            names.require_names(Without(engine, name))
    except ConfigError as error:
        return str(error)
    return "nothing"


def refuse_import(ours: str, module: str, name: str) -> str:
    """Return how the import of our module fails when DeepSpeed lacks a name."""
    sys.modules.pop(f"bert_ds.training.{ours}", None)
    try:
        with without(importlib.import_module(module), name):
            importlib.import_module(f"bert_ds.training.{ours}")
    except ImportError as error:
        return str(error)
    return "nothing"


def build_without(name: str) -> str:
    """Return how `make_engine` refuses a DeepSpeed whose engine lacks a method."""
    from deepspeed import DeepSpeedEngine

    from bert_ds.training.engine import make_engine

    model: nn.Module = make_model()
    try:
        with without(DeepSpeedEngine, name):
            make_engine(model, optimizer_of("lamb", model), ds_config(Case(1), 1))
    except ConfigError as error:
        return str(error)
    return "nothing"


def ask(rank: int, world_size: int) -> dict[Any, str]:
    """Worker: every engine as it is, then without each name; every import; `make_engine`."""
    from bert_ds.training.engine import make_engine

    quiet_deepspeed()
    found: dict[Any, str] = {"make_engine": build_without("was_step_applied")}
    for label, case in ENGINES.items():
        model = make_model()
        engine = make_engine(model, optimizer_of(case.optimizer, model), ds_config(case, world_size))
        found[label] = type(engine.optimizer).__name__
        found |= {(label, kind, name): refuse(engine, kind, name) for one, kind, name in READ if one == label}
    return found | {(ours, module, name): refuse_import(ours, module, name) for ours, module, name in IMPORTED}


@pytest.fixture(scope="module")
def answers() -> dict[Any, str]:
    return run_ranks(ask, 1, timeout_s=300)[0]


@pytest.mark.parametrize(("label", "kind", "name"), READ)
def test_an_engine_without_a_name_is_refused_by_that_name(label: str, kind: str, name: str, answers: Any) -> None:
    assert f"has no '{name}' in DeepSpeed {names.deepspeed_version()}, on which" in answers[label, kind, name]


@pytest.mark.parametrize(("ours", "module", "name"), IMPORTED)
def test_an_import_that_fails_says_which_release_it_is(ours: str, module: str, name: str, answers: Any) -> None:
    message = answers[ours, module, name]
    assert f"DeepSpeed {names.deepspeed_version()}: " in message and f"'{name}'" in message


def test_make_engine_looks_before_it_steps(answers: Any) -> None:
    assert "the engine has no 'was_step_applied'" in answers["make_engine"]


def test_every_kind_of_wrapper_is_among_the_engines(answers: Any) -> None:
    assert {label: answers[label] for label in ENGINES} == {
        "stage0": "Lamb",
        "stage0_bf16": "FP16_UnfusedOptimizer",
        "stage1": "DeepSpeedZeroOptimizer",
        "bf16_optimizer": "BF16_Optimizer",
        "stage2_offload": "DeepSpeedZeroOptimizer",
        "stage3": "DeepSpeedZeroOptimizer_Stage3",
    }


@pytest.mark.parametrize("path", [*TRAINING, *VERBS], ids=lambda path: path.stem)
def test_no_name_is_read_that_is_not_in_the_table(path: Path) -> None:
    code = strip_docstrings(path)
    read, wrapper = set(re.findall(r"\b_?engine\.(\w+)", code)), set(re.findall(r"\b_?engine\.optimizer\.(\w+)", code))
    marked = set(re.findall(r"\b(_z3_\w+|_dp_\w+|_hp_\w+|ds_(?:id|numel|tensor|shape|status|process_group))\b", code))
    assert read <= set(names.ENGINE)
    assert wrapper <= {*names.WRAPPER, *names.MASTERS, *names.OFFLOADED, *names.ZERO3}
    assert path.stem != "one_rank" or set(re.findall(r"\bzero\.(\w+)", code)) - {"stage_1_and_2"} == set(names.ONE_RANK)
    assert marked <= {*names.PARAMETER_FLAT, *names.PARAMETER_ZERO3}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_nothing_inside_deepspeed_is_imported_without_naming_the_release(path: Path) -> None:
    top = [node.module for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {module for module in top if module and module.startswith("deepspeed.")} <= {"deepspeed.accelerator"}


def strip_docstrings(path: Path) -> str:
    """Return the code of a file without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)
