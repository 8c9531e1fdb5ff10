"""What the sharded optimizers cannot do under some DeepSpeed settings, asked of a built engine.

The layout reader refuses what it can see at the first step. These functions see the rest: settings under which
DeepSpeed never calls the optimizer, or calls it on some ranks only, and checkpoints that DeepSpeed would convert into
something else without an error. Statements hold for DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

import torch


def unsupported_settings(engine: Any) -> list[str]:
    """Return one sentence per setting of the engine under which a sharded optimizer would be wrong; empty is good."""
    offload = engine.zero_offload_optimizer()
    stage = engine.zero_optimization_stage()
    fp16_autocast = engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16
    checks = {
        "fp16 with ZeRO stage 0: the loss is never multiplied by the loss scale that its gradients are divided by; "
        "use bf16 or stage 1, 2 or 3": engine.fp16_enabled() and stage == 0,
        "bf16_master_weights_and_grads and fp16_master_weights_and_grads: the optimizer needs fp32 master weights": (
            engine.bf16_master_weights_and_gradients() or engine.fp16_master_weights_and_gradients()
        ),
        "offload_optimizer.device nvme: the shard is not in memory when its layout is read": (
            offload is not None and str(getattr(offload.device, "value", offload.device)) == "nvme"
        ),
        "offload_optimizer.super_offload: SuperOffload steps its own Adam": bool(engine.super_offload()),
        "offload_optimizer.ratio below 1: the part on the device is stepped by an AdamW of DeepSpeed's": (
            engine.zero_partial_offload() < 1.0
        ),
        "zenflow: ZenFlow steps its own Adam": engine.zenflow_config() is not None,
        "compute_grad_norm false with fp16 torch_autocast: ranks may disagree about an overflow and hang": (
            fp16_autocast and stage in (1, 2) and not engine.zero_compute_grad_norm()
        ),
        "tensor parallelism: a rank does not see the norm of a whole tensor": engine.autotp_size() > 1,
    }
    return [reason for reason, applies in checks.items() if applies]


def universal_checkpoint_blockers(engine: Any) -> list[str]:
    """Return why a checkpoint of this engine must not be converted to a universal one; empty is good.

    Each reason names a conversion or a load that DeepSpeed gets wrong, in most cases without an error.
    """
    stage, groups = engine.zero_optimization_stage(), engine.basic_optimizer.param_groups
    moments = {key for state in engine.basic_optimizer.state.values() for key in state} - {"step"}
    checks = {
        "round_robin_gradients: the address of every parameter in the checkpoint is another parameter's; weights are "
        "exchanged silently": stage in (1, 2) and bool(engine.zero_round_robin_gradients()),
        "several parameter groups at stage 3: all get the settings of the first, weight decay included": (
            stage == 3 and any(_settings(group) != _settings(groups[0]) for group in groups)
        ),
        "several parameter groups at stage 1 or 2: a rank that owns nothing of a group cannot load it": (
            stage in (1, 2) and len(groups) > 1
        ),
        "optimizer state other than exp_avg and exp_avg_sq: the converter keeps exactly these two": bool(
            moments and moments != {"exp_avg", "exp_avg_sq"}
        ),
        "frozen parameters or buffers: only what the optimizer holds is loaded": _has_untrained_state(engine.module),
        "a rank that owns no parameter cannot load its step count": stage in (1, 2) and _owns_nothing(engine.module),
        "elastic_checkpoint: its optimizer state has another format": bool(engine.zero_elastic_checkpoint()),
    }
    return [reason for reason, applies in checks.items() if applies]


def _has_untrained_state(module: torch.nn.Module) -> bool:
    trained = {name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return any(name not in trained for name in module.state_dict())


def _owns_nothing(module: torch.nn.Module) -> bool:
    return all(getattr(parameter, "_hp_mapping", None) is None for parameter in module.parameters())


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
