"""Settings under which a sharded optimizer or its universal checkpoint would be wrong are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lamb_bert import make_model
from lamb_runs import Case, build, quiet_deepspeed, train
from ranks_harness import run_ranks

from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.zero_limits import universal_checkpoint_blockers, unsupported_settings

BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
FP16_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}, "gradient_clipping": 0.0}
ENGINES: dict[str, tuple[Case, str, str]] = {
    "good": (Case(2, "bf16"), "", ""),
    "round_robin": (Case(1, zero={"round_robin_gradients": True}), "", "round_robin_gradients"),
    "bf16_masters": (Case(2, "bf16", top=BF16_MASTERS), "fp32 master weights", ""),
    "autocast": (Case(2, top=FP16_AUTOCAST, zero={"compute_grad_norm": False}), "fp16 torch_autocast", ""),
    "lion": (Case(2, optimizer="lion"), "", "exp_avg_sq"),
    "groups_stage3": (Case(3, optimizer="plain"), "", "settings of the first"),
    "groups_stage2": (Case(2, optimizer="plain"), "", "owns nothing of a group"),
}
"""Name -> case, what is unsupported, what blocks a universal checkpoint."""


def ask(rank: int, world_size: int) -> dict[str, tuple[list[str], list[str]]]:
    """Worker: build every engine, step the one whose state matters, and ask."""
    quiet_deepspeed()
    found = {}
    for name, (case, _, _) in ENGINES.items():
        engine, _, _ = build(case, world_size)
        if name in ("lion", "good"):
            train(engine, 0, 1)
        found[name] = (unsupported_settings(engine), universal_checkpoint_blockers(engine))
    return found


@pytest.fixture(scope="module")
def answers() -> Any:
    return run_ranks(ask, 1)[0]


@pytest.mark.parametrize("name", ENGINES)
def test_unsupported_settings_are_named_and_nothing_else(name: str, answers: Any) -> None:
    wanted = ENGINES[name][1]
    assert len(answers[name][0]) == bool(wanted)
    assert wanted in "".join(answers[name][0])


@pytest.mark.parametrize("name", ENGINES)
def test_what_blocks_a_universal_checkpoint_is_named_and_nothing_else(name: str, answers: Any) -> None:
    wanted = ENGINES[name][2]
    assert len(answers[name][1]) == bool(wanted)
    assert wanted in "".join(answers[name][1])


def test_the_optimizer_steps_without_any_process_group() -> None:
    model = make_model()
    optimizer = Lamb(model.named_parameters(), lr=1e-2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(optimizer.trust_statistics()) == 37
