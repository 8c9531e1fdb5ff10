"""Optimizer section of a recipe, and what everybody else has to know of each optimizer.

Ours run at any ZeRO stage; the others are foreign kernels selected by name, for comparison. One more optimizer of ours
is a class here, in the union at the end, and a row in `training/optimizers/factory`. None clips: DeepSpeed alone knows
the global gradient norm, so `training.gradient_clipping` is the one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from bert_ds.configuration.reading.config_section import Beta, NonNegativeFloat, PositiveFloat, Section
from bert_ds.configuration.recipe.muon_polynomials import (
    JORDAN,
    Polynomials,
    orthogonalising_flops,
    step_polynomials,
)

_MAX_SINGULAR_VALUE = 2.0
"""Where a polynomial of Muon may take a singular value that should end near 1."""


class OptimizerSettings(Section):
    """What an optimizer says of itself to those who plan, check and translate: the class variables."""

    moment_bytes: ClassVar[int] = 8
    """fp32 moments of a weight."""
    sharded_fault: ClassVar[str] = ""
    """What it does wrong at the ZeRO stages 1 to 3; "" where it is right at all of them."""
    runs_on: ClassVar[Literal["both", "host", "GPU"]] = "both"
    """Where its kernel finds the optimizer state; "both" is memory of either, never NVMe."""
    replacement: ClassVar[str] = ""
    """What to take where it is wrong."""
    deepspeed_types: ClassVar[tuple[str, ...]] = ()
    """Its names as optimizer.type of a DeepSpeed file, in lower case, besides its own."""
    deepspeed_names: ClassVar[Mapping[str, str]] = {}
    """DeepSpeed's name of a parameter -> ours, where they differ."""
    deepspeed_constants: ClassVar[Mapping[str, Any]] = {}
    """Parameters of DeepSpeed's that there is no setting for, with the only value they can have."""

    def matrix_flops(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Return the FLOPs of a step's products with matrices of these rows and columns; 0 where there are none."""
        return 0


class MomentConfig(OptimizerSettings):
    """What every optimizer with two moments has."""

    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of every weight except biases and LayerNorm."""


class AdamWConfig(MomentConfig):
    """AdamW with decoupled decay (Loshchilov and Hutter 2019), on torch's fused kernel."""

    deepspeed_types = ("adam",)  # it decays as AdamW, unless told otherwise
    deepspeed_constants = {"adam_w_mode": True, "torch_adam": True, "bias_correction": True, "amsgrad": False}

    type: Literal["adamw"] = "adamw"


class TrustConfig(MomentConfig):
    """Clamps of the layer-wise trust ratio."""

    min_trust: NonNegativeFloat = 0.0
    """Lower clamp of the trust ratio."""
    max_trust: PositiveFloat | None = None
    """Upper clamp of the trust ratio; 1.0 is LAMBC, null is none."""
    weight_norm_clamp: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """Range that the weight norm is clamped to before the ratio is taken (the paper's phi); null is none."""

    @model_validator(mode="after")
    def _check(self) -> TrustConfig:
        if self.max_trust is not None and self.min_trust > self.max_trust:
            raise ValueError(f"min_trust {self.min_trust} is larger than max_trust {self.max_trust}")
        clamp = self.weight_norm_clamp
        if clamp is not None and clamp[0] > clamp[1]:
            raise ValueError(f"weight_norm_clamp is {list(clamp)}: the lower bound is larger than the upper")
        return self


class LambConfig(TrustConfig):
    """LAMB (You et al. 2020, arXiv 1904.00962), exact per tensor at any ZeRO stage.

    u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w; w -= lr |w| / |u| u, per tensor. The
    defaults are those of NVIDIA's BERT recipe (apex FusedLAMB, to be run with gradient_clipping 1.0).
    """

    deepspeed_names = {"min_coeff": "min_trust", "max_coeff": "max_trust"}
    deepspeed_constants = {"eps_inside_sqrt": False, "amsgrad": False}

    type: Literal["lamb"] = "lamb"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t (paper v1 and apex); false is the paper's v3."""
    correct_lr: bool = False
    """Multiply lr by sqrt(1 - beta2^t) / (1 - beta1^t) instead, as DeepSpeed's kernel does."""
    grad_averaging: bool = True
    """Weigh the gradient by 1 - beta1 in the first moment."""
    adam_w_mode: bool = True
    """Decay in the update (true) or added to the gradient (false)."""
    use_nvlamb: bool = False
    """Apply the trust ratio to tensors without decay too, as the paper does; NVIDIA's BERT recipe does not."""

    @model_validator(mode="after")
    def _check_correction(self) -> LambConfig:
        if self.correct_lr and self.bias_correction:
            raise ValueError("correct_lr replaces bias_correction: set one of them to false")
        return self


class LansConfig(TrustConfig):
    """LANS (Zheng et al. 2020, arXiv 2006.13484): LAMB with a gradient normalised per tensor and Nesterov's step.

    g is divided by its norm; with d = sqrt(v / (1 - beta2^t)) + eps, a = (m / (1 - beta1^t)) / d + weight_decay w and
    b = g / d + weight_decay w: w -= lr |w| (beta1 a / |a| + (1 - beta1) b / |b|), per tensor.
    """

    type: Literal["lans"] = "lans"


class StableAdamWConfig(MomentConfig):
    """StableAdamW (Wortsman et al. 2023, arXiv 2304.13013): AdamW whose rate is cut per tensor where v lags behind.

    lr is divided by max(1, sqrt(mean(g^2 / max(v, eps^2)))), which takes the place of gradient clipping.
    """

    type: Literal["stableadamw"] = "stableadamw"
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay rates of the two moments."""


class LionConfig(OptimizerSettings):
    """Lion (Chen et al. 2023, arXiv 2302.06675): w -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay w)."""

    moment_bytes = 4

    type: Literal["lion"] = "lion"
    lr: PositiveFloat
    """Peak learning rate; a third to a tenth of AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Weight of the momentum in the step, and decay rate of the momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of every weight except biases and LayerNorm; three to ten times AdamW's."""


class MuonConfig(MomentConfig):
    """Muon (Jordan et al. 2024; scale and decay of Liu et al. 2025, arXiv 2502.16982) for the matrices of the layers.

    b = momentum b + (1 - momentum) g; u = orthogonalise(momentum b + (1 - momentum) g);
    w -= lr (0.2 sqrt(max(rows, columns)) u + weight_decay w), per matrix; query, key and value are one each. All else
    (embeddings, heads, biases, norms) gets AdamW. Rates and decays that suit AdamW suit both.
    """

    deepspeed_names = {"muon_lr": "lr", "adam_lr": "adamw_lr"}

    type: Literal["muon"] = "muon"
    lr: PositiveFloat
    """Peak learning rate of the matrices."""
    adamw_lr: PositiveFloat | None = None
    """Peak learning rate of everything else; null is lr."""
    momentum: Beta = 0.95
    """Decay rate of the matrices' momentum."""
    nesterov: bool = True
    """Orthogonalise momentum x b + (1 - momentum) g instead of b."""
    ns_coefficients: Polynomials = JORDAN
    """(a, b, c) of the polynomial a s + b s^3 + c s^5 that is applied to every singular value; or one of each step."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """How often a polynomial is applied; with one of each step as many as there are."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW: decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """AdamW: added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of every weight except biases and LayerNorm."""

    @model_validator(mode="after")
    def _check(self) -> MuonConfig:
        polynomials, wanted = step_polynomials(self.ns_coefficients, self.ns_steps), self.ns_steps
        if len(polynomials) != wanted:
            raise ValueError(f"ns_coefficients has polynomials of {len(polynomials)} steps, ns_steps is {wanted}")
        for start in (k / 100 for k in range(1, 101)):
            value = start
            for step, (a, b, c) in enumerate(polynomials, start=1):
                value = a * value + b * value**3 + c * value**5
                if not 0 < value <= _MAX_SINGULAR_VALUE:
                    raise ValueError(
                        f"ns_coefficients {[a, b, c]} diverge: a singular value of {start:g} becomes {value:.4g} after "
                        f"{step} steps, wanted above 0 and at most {_MAX_SINGULAR_VALUE:g}"
                    )
        return self

    def matrix_flops(self, shapes: Iterable[tuple[int, int]]) -> int:
        """Return the FLOPs of orthogonalising matrices of these rows and columns."""
        return sum(orthogonalising_flops(*shape, self.ns_steps) for shape in shapes)


class DeepSpeedFusedAdamConfig(MomentConfig):
    """DeepSpeed's CUDA kernel `FusedAdam` in AdamW mode."""

    runs_on = "GPU"
    replacement = '"deepspeed_cpu_adam" or "adamw"'
    deepspeed_types = ("fusedadam",)
    deepspeed_constants = {"adam_w_mode": True, "amsgrad": False}

    type: Literal["deepspeed_fused_adam"] = "deepspeed_fused_adam"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""


class DeepSpeedCpuAdamConfig(MomentConfig):
    """DeepSpeed's vectorised CPU kernel `DeepSpeedCPUAdam` in AdamW mode, for offloaded optimizer state."""

    runs_on = "host"
    replacement = '"adamw"'
    deepspeed_types = ("deepspeedcpuadam",)
    deepspeed_constants = {"adamw_mode": True, "fp32_optimizer_states": True, "amsgrad": False}

    type: Literal["deepspeed_cpu_adam"] = "deepspeed_cpu_adam"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""


class DeepSpeedFusedLambConfig(MomentConfig):
    """DeepSpeed's CUDA kernel `FusedLamb`: no correction of the moments, ratio clamped, decay scaled with the rate."""

    sharded_fault = "takes one trust ratio per shard"
    runs_on = "GPU"
    replacement = '"lamb"'
    deepspeed_types = ("fusedlamb",)
    deepspeed_constants = {"eps_inside_sqrt": False, "amsgrad": False}

    type: Literal["deepspeed_fused_lamb"] = "deepspeed_fused_lamb"
    bias_correction: bool = True
    """Scale the rate by sqrt(1 - beta2^t) / (1 - beta1^t), which is what this kernel does in its place."""
    min_coeff: NonNegativeFloat = 0.01
    """Lower clamp of the trust ratio."""
    max_coeff: PositiveFloat = 10.0
    """Upper clamp of the trust ratio."""


class ApexFusedLambConfig(MomentConfig):
    """NVIDIA apex's CUDA kernel `FusedLAMB`; apex has to be installed."""

    sharded_fault = "takes one trust ratio per shard"
    runs_on = "GPU"
    replacement = '"lamb"'

    type: Literal["apex_fused_lamb"] = "apex_fused_lamb"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""
    grad_averaging: bool = True
    """Weigh the gradient by 1 - beta1 in the first moment."""
    adam_w_mode: bool = True
    """Decay in the update (true) or added to the gradient (false)."""
    use_nvlamb: bool = False
    """Apply the trust ratio to tensors without decay too."""


OptimizerConfig = Annotated[
    AdamWConfig
    | LambConfig
    | LansConfig
    | StableAdamWConfig
    | LionConfig
    | MuonConfig
    | DeepSpeedFusedAdamConfig
    | DeepSpeedCpuAdamConfig
    | DeepSpeedFusedLambConfig
    | ApexFusedLambConfig,
    Field(discriminator="type"),
]

OPTIMIZERS: Mapping[str, type[OptimizerSettings]] = {
    settings.model_fields["type"].default: settings for settings in get_args(get_args(OptimizerConfig)[0])
}
"""optimizer.type -> its settings."""
