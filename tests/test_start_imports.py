"""What a training imports before its first step, seen in an interpreter of its own."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_verbs import run_verb
from test_pretrain import make_workshop, pretrain_command

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.training.engine import _compiled_at_first_call

HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "networkx"),
    *("transformers", "sklearn", "scipy", "pandas", "matplotlib", "rich", "setuptools", "distutils", "tensorboard"),
}
"""Seconds of imports, and a compiler's probing, that no training needs to begin."""

CODE = """
import atexit, runpy, sys, torch
import bert_ds.finetune
from bert_ds.training.optimizers.elementwise_optimizers import AdamW
optimizer = AdamW([("weight", torch.nn.Parameter(torch.ones(2)))], lr=1e-3)
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad()
atexit.register(lambda: print("imported", *sys.modules))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_training_imports_no_compiler_and_nothing_for_its_end(tmp_path: Path) -> None:
    command = pretrain_command(make_workshop(tmp_path), tmp_path / "run", "--set", "training.total_steps=2")
    done = run_verb("-c", CODE, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2" in done.stdout
    imported = set(done.stdout.splitlines()[-1].split())
    assert {"bert_ds.training.loop.train_loop", "deepspeed.runtime.zero.muon.original_muon"} <= imported
    assert not HEAVY & imported


def test_deepspeed_s_muon_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or (lambda x: function(x) + 0.5))
    late = _compiled_at_first_call(len)
    assert compiled == []
    assert [late("abc"), late("abcd")] == [3.5, 4.5]
    assert compiled == [len]


def test_garbage_is_looked_for_again_once_a_verb_runs_and_not_in_what_it_has_imported() -> None:
    try:
        answer_early(lambda: None)
        while_importing = gc.isenabled()
        with pytest.raises(SystemExit):
            run_main(lambda: 0)
        assert (while_importing, gc.isenabled()) == (False, True)
        assert gc.get_freeze_count() > 100_000
    finally:
        gc.enable()
        gc.unfreeze()
