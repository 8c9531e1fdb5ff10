"""What `training.precision` "auto" means in the files, in the plan and at the launch."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from config_cases import DEEPSPEED, RECIPE, changed, write_json
from ranks_harness import run_ranks

from bert_ds.configuration.deepspeed_file.ds_config import load_pair, resolve_ds_config
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.precision import Precision, decided, planned
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig, load_run_config
from bert_ds.configuration.run_plan import make_plan
from bert_ds.configuration.task.task_config import load_task
from bert_ds.training.checkpoints.checkpoint_folder import write_manifest
from bert_ds.training.launch import launch_precision
from bert_ds.training.launch.launch_precision import GemmRates, decide_precision, earlier_precision, faster_precision

ROOT = Path(__file__).resolve().parents[1]
AUTO = changed(RECIPE, "training.precision", "auto")
SHAPE = BertConfig(hidden_size=32, num_attention_heads=2, intermediate_size=64)


def pair_of(folder: Path, deepspeed: Any, recipe: Any = AUTO) -> RunConfig:
    return load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", deepspeed))[0]


def test_auto_is_the_default_of_recipes_and_tasks_and_of_the_shipped_ones_for_a_cpu_alone() -> None:
    recipes = {path.stem: load_run_config(path) for path in (ROOT / "ds_configs/recipes").glob("*.json")}
    small = {
        "embedded_default",
        "albert_small",
        "distilbert_small",
        "electra_tiny",
        "modernbert_small",
        "roberta_small",
    }
    assert {name for name, run in recipes.items() if run.training.precision != "bf16"} == small
    assert {recipes[name].training.precision for name in small} == {"auto"}
    tasks = [load_task(path.stem) for path in (ROOT / "ds_configs/tasks").glob("*.json")]
    assert {task.training.precision for task in tasks} == {"auto"}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "auto"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "auto"),
        ({"fp16": {"enabled": False}}, "auto"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": True}}, "fp16"),
        ({"data_types": {"param_dtype": "bfloat16"}}, "bf16"),
        ({"data_types": {"param_dtype": "float"}}, "fp32"),
    ],
)
def test_a_deepspeed_file_that_fixes_the_precision_decides(tmp_path: Path, settings: Any, wanted: str) -> None:
    settings = {"zero_optimization": {"stage": 2}, **settings}
    assert pair_of(tmp_path, settings).training.precision == wanted
    without_recipe, _ = load_pair(None, write_json(tmp_path, "ds.json", settings))
    assert without_recipe.training.precision == wanted
    if wanted == "fp32":
        with pytest.raises(ConfigError, match=r'training\.precision is "bf16" in '):
            explicit, ds = load_pair(write_json(tmp_path, "bf16.json", RECIPE), tmp_path / "ds.json")
            make_plan(explicit, ds, 1)


def test_both_low_precisions_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp16.enabled: found true, but bf16.enabled is true"):
        pair_of(tmp_path, {**DEEPSPEED, "fp16": {"enabled": True}})


def test_stage_0_does_not_fix_the_accumulation_of_a_precision_that_is_open(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}}
    run, ds = load_pair(write_json(tmp_path, "run.json", AUTO), write_json(tmp_path, "ds.json", settings))
    with pytest.raises(ConfigError, match='grad_accum_dtype: found "bf16", wanted "auto"'):
        make_plan(run, ds, 1)


def test_an_open_precision_is_planned_as_fp32_and_never_reaches_deepspeed(tmp_path: Path) -> None:
    run, ds = load_pair(write_json(tmp_path, "run.json", AUTO), write_json(tmp_path, "ds.json", {}))
    fp32, _ = load_pair(tmp_path / "run.json", tmp_path / "ds.json", overrides=["training.precision=fp32"])
    open_plan, fp32_plan = make_plan(run, ds, 1), make_plan(fp32, ds, 1)
    assert plan_table(open_plan)[1:] == plan_table(fp32_plan)[1:]
    assert plan_table(open_plan)[0][1] == "tiny: lamb, precision decided at the launch (planned for fp32), ZeRO stage 0"
    with pytest.raises(AssertionError, match="the launch has to decide it"):
        resolve_ds_config(run, ds, 1)
    assert (planned("auto"), planned("bf16"), decided("bf16")) == ("fp32", "bf16", "bf16")


def test_nothing_reads_the_setting_without_saying_whether_it_plans_or_trains() -> None:
    """The files that may: what defines it, what agrees the files, what decides."""
    allowed = {"precision.py", "ds_agreement.py", "ds_config.py"}
    readers = {"planned", "decided", "precision_text", "decide_precision"}
    found = []
    for path in (ROOT / "bert_ds").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        asked = {
            id(word)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in readers
            for word in call.args
        }
        for node in ast.walk(tree):
            is_read = isinstance(node, ast.Attribute) and node.attr == "precision" and id(node) not in asked
            if is_read and ast.unparse(node.value).endswith("training") and path.name not in allowed:
                found.append(f"{path.name}:{node.lineno}")
    assert [place for place in found if not place.startswith("export_hf.py")] == []


@pytest.mark.parametrize(
    ("fp32", "bf16", "wanted"),
    [(55e9, 817e9, "bf16"), (72e9, 42e9, "fp32"), (10.0, 12.9, "fp32"), (10.0, 13.0, "bf16")],
)
def test_bf16_has_to_be_1_3_times_as_fast(fp32: float, bf16: float, wanted: str) -> None:
    assert faster_precision(GemmRates(fp32, bf16)) == wanted


class FakeGpu:
    """Stands for an accelerator of another kind."""

    def __init__(self, has_bf16: bool) -> None:
        self.is_bf16_supported = lambda: has_bf16

    def device_name(self) -> str:
        return "cuda"


def never(model: BertConfig) -> GemmRates:
    raise AssertionError("something was timed")


def decide(rank: int, world_size: int, old: Path, new: Path) -> dict[str, Any]:
    """Worker: what comes out of every way to a decision."""

    def bf16_on_rank_0(model: BertConfig) -> GemmRates:
        assert rank == 0, "a rank other than 0 timed something"
        return GemmRates(10e9, 20e9)

    measured = decide_precision("auto", SHAPE, measure=bf16_on_rank_0)
    found: dict[str, Any] = {
        "measured": measured,
        "explicit": decide_precision("fp16", SHAPE, measure=never),
        "kept": decide_precision("auto", SHAPE, earlier=[new, old], measure=never),
        "nothing to keep": decide_precision("auto", SHAPE, earlier=[new], measure=bf16_on_rank_0).precision,
    }
    real = launch_precision.get_accelerator
    try:
        for has_bf16 in (True, False):
            launch_precision.get_accelerator = lambda has_bf16=has_bf16: FakeGpu(has_bf16)
            found[f"cuda {has_bf16}"] = decide_precision("auto", SHAPE, measure=never).precision
    finally:
        launch_precision.get_accelerator = real
    return found


def test_rank_0_alone_decides_and_tells_the_others(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_json(old, "task_config.json", {"training": {"precision": "fp32"}})
    ranks = run_ranks(decide, 2, old, tmp_path / "new")
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert found["measured"].precision == "bf16"
    assert "[512, 32] x [32, 64] runs at 10.0 GFLOP/s in fp32 and 20.0 in bf16" in found["measured"].reason
    assert found["explicit"] == ("fp16", "")
    assert found["kept"] == ("fp32", f"training.precision auto: fp32, as in {old / 'task_config.json'}")
    assert (found["nothing to keep"], found["cuda True"], found["cuda False"]) == ("bf16", "bf16", "fp32")


@pytest.mark.parametrize("saved", ["fp32", "bf16", "fp16"])
def test_a_checkpoint_is_believed_before_the_description_beside_it(tmp_path: Path, saved: Precision) -> None:
    write_json(tmp_path, "run_config.json", {"training": {"precision": "fp32" if saved == "bf16" else "bf16"}})
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    for step, precision in ((1, "float64"), (2, names[saved]), (3, "damaged")):
        folder = tmp_path / f"checkpoints/global_step{step}"
        folder.mkdir(parents=True)
        write_manifest(folder, {"format": 1, "step": step, "files": {}, "precision": precision})
    (tmp_path / "checkpoints/global_step3/manifest.json").write_text("{")
    assert earlier_precision(tmp_path) == (saved, tmp_path / "checkpoints/global_step2")


@pytest.mark.parametrize("text", ["", "[]", '{"training": 3}', '{"training": {"precision": "auto"}}', "[" * 100_000])
def test_a_description_that_says_nothing_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "run_config.json").write_text(text)
    assert earlier_precision(tmp_path) is None
    write_json(tmp_path, "task_config.json", {"training": {"precision": "bf16"}})
    assert earlier_precision(tmp_path) == ("bf16", tmp_path / "task_config.json")
    assert json.loads((tmp_path / "task_config.json").read_text())["training"]["precision"] == "bf16"


def test_of_each_precision_the_best_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, now, times = (3.0, 6.0, 1.0, 2.0, 2.0, 4.0), 0.0, [0.0]  # fp32 and bf16 in turns
    for seconds in taken:
        times += [now, now := now + seconds]
    read = iter([*times, now])
    monkeypatch.setattr(launch_precision.time, "perf_counter", lambda: next(read))
    flops = 2 * 512 * 32 * 64
    assert launch_precision.gemm_rates(SHAPE) == GemmRates(flops / 1.0, flops / 2.0)


def test_both_rates_are_measured_on_this_machine() -> None:
    rates = launch_precision.gemm_rates(SHAPE)
    assert all(1e6 < rate < 1e15 for rate in rates)
