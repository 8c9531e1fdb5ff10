"""DeepSpeed files that are wrong in ways people are wrong: 24 of such 55 pass DeepSpeed 0.19.8's own parser.

Each is a setting of a DeepSpeed file and the name that a refusal has to give.
"""

from __future__ import annotations

from typing import Any

BROKEN: tuple[tuple[dict[str, Any], str], ...] = (
    # names
    ({"zero_optimisation": {"stage": 2}}, "zero_optimisation"),
    ({"zero_optimization ": {"stage": 2}}, "zero_optimization"),
    ({"zero": {"stage": 2}}, "zero"),
    ({"gradient_acumulation_steps": 4}, "gradient_acumulation_steps"),
    ({"fp_16": {"enabled": True}}, "fp_16"),
    ({"bf_16": {"enabled": True}}, "bf_16"),
    ({"FP16": {"enabled": True}}, "FP16"),
    ({"train_batchsize": 48}, "train_batchsize"),
    ({"train-batch-size": 48}, "train-batch-size"),
    ({"micro_batch_size": 4}, "micro_batch_size"),
    ({"gradient_clip": 1.0}, "gradient_clip"),
    ({"activation_checkpoint": {"partition_activations": True}}, "activation_checkpoint"),
    ({"wall_clock_break_down": True}, "wall_clock_break_down"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "zero_optimization.overlap_com"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimiser": {"device": "cpu"}}},
        "zero_optimization.offload_optimiser",
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}, "zero_optimization.offload_param.devise"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "zero_optimization.cpu_offload"),
    ({"bf16": {"enable": True}}, "bf16.enable"),
    ({"optimizer": {"type": "Lamb", "parameters": {"lr": 1e-3}}}, "optimizer.parameters"),
    ({"scheduler": {"kind": "WarmupLR"}}, "scheduler.kind"),
    # types
    ({"zero_optimization": True}, "zero_optimization"),
    ({"zero_optimization": 2}, "zero_optimization"),
    ({"zero_optimization": []}, "zero_optimization"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2.5}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": None}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "zero_optimization.overlap_comm"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer"),
    ({"train_micro_batch_size_per_gpu": 3.7}, "train_micro_batch_size_per_gpu"),
    ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu"),
    ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu"),
    ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps"),
    ({"gradient_clipping": "one"}, "gradient_clipping"),
    ({"gradient_clipping": True}, "gradient_clipping"),
    ({"bf16": True}, "bf16"),
    ({"bf16": {"enabled": "true"}}, "bf16.enabled"),
    ({"fp16": {"enabled": 1}}, "fp16.enabled"),
    ({"optimizer": "Lamb"}, "optimizer"),
    ({"optimizer": {"type": "Lamb", "params": {"lr": "1e-4"}}}, "optimizer.params.lr"),
    ({"steps_per_print": "10"}, "steps_per_print"),
    # values
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": -1}}, "zero_optimization.stage"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}}, "offload_optimizer.device"),
    (
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer",
    ),
    ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 0}}, "zero_optimization.allgather_bucket_size"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu"),
    ({"train_micro_batch_size_per_gpu": -4}, "train_micro_batch_size_per_gpu"),
    ({"gradient_clipping": -1.0}, "gradient_clipping"),
    ({"optimizer": {"type": "Lamb", "params": {"lr": -1}}}, "optimizer.params.lr"),
    ({"optimizer": {"type": "LambX", "params": {"lr": 0.002}}}, "optimizer.type"),
    ({"scheduler": {"type": "WarmupX", "params": {}}}, "scheduler.type"),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled"),
    ({"elasticity": {"enabled": True}}, "elasticity"),
)
