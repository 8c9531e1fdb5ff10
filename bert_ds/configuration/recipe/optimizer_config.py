"""Optimizer and schedule sections of a recipe.

Ours (adamw, lamb, lans, stableadamw, lion, muon) run at any ZeRO stage. The others are foreign kernels selected by
name, for comparison; `run_plan` says at which stages they compute what they claim.

None of them clips: the global gradient norm is known to DeepSpeed alone, so `training.gradient_clipping` is the one
place for it.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_ds.configuration.reading.config_section import Beta, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section

_MAX_SINGULAR_VALUE = 2.0
"""Where a polynomial of Muon may take a singular value that should end near 1."""


class MomentConfig(Section):
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


class LionConfig(Section):
    """Lion (Chen et al. 2023, arXiv 2302.06675): w -= lr (sign(beta1 m + (1 - beta1) g) + weight_decay w)."""

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

    type: Literal["muon"] = "muon"
    lr: PositiveFloat
    """Peak learning rate of the matrices."""
    adamw_lr: PositiveFloat | None = None
    """Peak learning rate of everything else; null is lr."""
    momentum: Beta = 0.95
    """Decay rate of the matrices' momentum."""
    nesterov: bool = True
    """Orthogonalise momentum x b + (1 - momentum) g instead of b."""
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    """(a, b, c) of the polynomial a s + b s^3 + c s^5 that is applied to every singular value."""
    ns_steps: Annotated[int, Field(ge=1, le=20)] = 5
    """How often the polynomial is applied."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW: decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """AdamW: added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of every weight except biases and LayerNorm."""

    @model_validator(mode="after")
    def _check(self) -> MuonConfig:
        a, b, c = self.ns_coefficients
        for start in (k / 100 for k in range(1, 101)):
            value = start
            for step in range(1, self.ns_steps + 1):
                value = a * value + b * value**3 + c * value**5
                if not 0 < value <= _MAX_SINGULAR_VALUE:
                    raise ValueError(
                        f"ns_coefficients {[a, b, c]} diverge: a singular value of {start:g} becomes {value:.4g} after "
                        f"{step} steps, wanted above 0 and at most {_MAX_SINGULAR_VALUE:g}"
                    )
        return self


class DeepSpeedFusedAdamConfig(MomentConfig):
    """DeepSpeed's CUDA kernel `FusedAdam` in AdamW mode."""

    type: Literal["deepspeed_fused_adam"] = "deepspeed_fused_adam"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""


class DeepSpeedCpuAdamConfig(MomentConfig):
    """DeepSpeed's vectorised CPU kernel `DeepSpeedCPUAdam` in AdamW mode, for offloaded optimizer state."""

    type: Literal["deepspeed_cpu_adam"] = "deepspeed_cpu_adam"
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""


class DeepSpeedFusedLambConfig(MomentConfig):
    """DeepSpeed's CUDA kernel `FusedLamb`: no correction of the moments, ratio clamped, decay scaled with the rate."""

    type: Literal["deepspeed_fused_lamb"] = "deepspeed_fused_lamb"
    bias_correction: bool = True
    """Scale the rate by sqrt(1 - beta2^t) / (1 - beta1^t), which is what this kernel does in its place."""
    min_coeff: NonNegativeFloat = 0.01
    """Lower clamp of the trust ratio."""
    max_coeff: PositiveFloat = 10.0
    """Upper clamp of the trust ratio."""


class ApexFusedLambConfig(MomentConfig):
    """NVIDIA apex's CUDA kernel `FusedLAMB`; apex has to be installed."""

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


class ScheduleConfig(Section):
    """Learning rate over the run: warm-up, then a published decay to min_lr_fraction x lr."""

    type: Literal["constant", "linear", "polynomial", "cosine", "wsd"] = "linear"
    """wsd: warm-up, stable, then decay over the last decay_fraction."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up from 0; give this or warmup_fraction."""
    warmup_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of total_steps spent in warm-up."""
    power: PositiveFloat = 1.0
    """Exponent of the polynomial decay; 0.5 in NVIDIA's LAMB recipe."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """wsd only: share of total_steps in the final decay."""
    min_lr_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Final learning rate as a share of the peak."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            raise ValueError("give exactly one of warmup_steps and warmup_fraction")
        for name, default, owners in (
            ("power", 1.0, ("polynomial",)),
            ("decay_fraction", 0.1, ("wsd",)),
            ("min_lr_fraction", 0.0, ("linear", "polynomial", "cosine", "wsd")),
        ):
            if getattr(self, name) != default and self.type not in owners:
                wanted = " or ".join(owners)
                raise ValueError(f'{name} {getattr(self, name)} is for type {wanted}, the type is "{self.type}"')
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of total_steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_fraction is not None
        return math.floor(self.warmup_fraction * total_steps)
