"""The recipe: one frozen, validated object that describes a pre-training run.

A recipe is a JSON file. It owns everything that decides *what* is trained (model, text, objectives, optimizer,
schedule, global batch, precision, steps, seed, evaluation, checkpoints). How the run is spread over ranks belongs to
the DeepSpeed file (`ds_config.py`); every check that needs both files lives in `run_plan.py`.

Only the standard library and pydantic are imported, so that a login node validates a recipe without torch.
Validators check and never change a value; derived numbers are properties.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORE_INDEX = -100
"""Label of a position or sequence that has no target."""

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
DropoutProbability = Annotated[float, Field(ge=0.0, lt=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """A setting is missing, unknown or contradictory; the message names file, field, value found and value wanted."""


class Section(BaseModel):
    """Strictness shared by every part of a recipe: no unknown key, no coercion, no mutation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """The BERT encoder, in Hugging Face's spelling; the defaults are BERT-base uncased."""

    vocab_size: Annotated[int, Field(ge=8)] = 30522
    """Number of word pieces of the tokenizer, without padding rows."""
    pad_vocab_size_to_multiple_of: PositiveInt = 64
    """Rows of the word embedding are padded to this multiple for tensor cores; the export cuts them off."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    num_hidden_layers: PositiveInt = 12
    """Number of transformer layers."""
    num_attention_heads: PositiveInt = 12
    """Number of attention heads; divides hidden_size."""
    intermediate_size: PositiveInt = 3072
    """Width of the feed-forward layer."""
    hidden_act: Literal["gelu", "gelu_new"] = "gelu"
    """"gelu" is the published erf form, "gelu_new" the tanh approximation."""
    hidden_dropout_prob: DropoutProbability = 0.1
    """Dropout after the embeddings and after both dense blocks of a layer."""
    attention_probs_dropout_prob: DropoutProbability = 0.1
    """Dropout of the attention probabilities."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence in tokens."""
    type_vocab_size: PositiveInt = 2
    """Number of segment ids."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Epsilon inside the square root of every LayerNorm."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the normal initialisation of every weight matrix."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: vocab_size rounded up to pad_vocab_size_to_multiple_of."""
        multiple = self.pad_vocab_size_to_multiple_of
        return -(-self.vocab_size // multiple) * multiple

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class ShardSource(Section):
    """One folder of token shards, made by build_shards.py."""

    path: Annotated[str, Field(min_length=1)]
    """Folder with manifest.json. A relative path is taken from the recipe's own folder."""
    weight: PositiveFloat = 1.0
    """How many times the source's examples are seen in one epoch; 2.5 means two and a half times."""


class EmbeddedCorpus(Section):
    """The text every machine already has: docstrings of the installed packages and the standard library."""

    type: Literal["embedded"] = "embedded"
    vocab_size: Annotated[int, Field(ge=8)]
    """Word pieces of the tokenizer trained on this text; equals model.vocab_size."""
    lowercase: bool = True
    """Uncased tokenizer."""
    max_bytes: PositiveInt = 20_000_000
    """Upper bound on the text that is read, in bytes of UTF-8."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of the documents held out for validation."""


class ShardCorpus(Section):
    """Token shards, one or several weighted folders."""

    type: Literal["shards"] = "shards"
    sources: Annotated[tuple[ShardSource, ...], Field(min_length=1)]
    """The shard folders."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """Tokenizer folder; its fingerprint must be the one stored in every manifest."""


class SequenceConfig(Section):
    """How documents become examples."""

    max_seq_length: Annotated[int, Field(ge=8)] = 128
    """Longest example in tokens, [CLS] and [SEP] included."""
    sentence_pair: Literal["nsp", "sop", "none"] = "nsp"
    """nsp: next sentence or a random one (BERT). sop: two segments in order or swapped (ALBERT). none: no pair."""
    short_seq_prob: Probability = 0.1
    """Share of examples whose target length is drawn from 2..max_seq_length instead of being the maximum."""
    cross_documents: bool = False
    """With sentence_pair "none": fill an example from several documents, separated by [SEP]."""

    @model_validator(mode="after")
    def _check(self) -> SequenceConfig:
        if self.cross_documents and self.sentence_pair != "none":
            raise ValueError(f'cross_documents needs sentence_pair "none", not "{self.sentence_pair}"')
        return self


class MaskingConfig(Section):
    """The masked language modelling objective."""

    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens that are predicted."""
    mask_token_fraction: Probability = 0.8
    """Share of the predicted tokens replaced by [MASK]."""
    random_token_fraction: Probability = 0.1
    """Share of the predicted tokens replaced by a random piece; the rest stays as it is."""
    whole_word_mask: bool = False
    """Mask all pieces of a word together."""
    word_segmenter: Literal["wordpiece", "jieba", "word_list"] = "wordpiece"
    """What a word is: "##" pieces, Chinese words by jieba (extra "zh"), or the longest match in word_list."""
    word_list: str | None = None
    """Text file with one word per line, for word_segmenter "word_list"."""
    max_predictions_per_seq: PositiveInt | None = None
    """Upper bound on predicted tokens per example; null means no bound."""

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        total = self.mask_token_fraction + self.random_token_fraction
        if total > 1.0 + 1e-9:
            raise ValueError(
                f"mask_token_fraction {self.mask_token_fraction} + random_token_fraction "
                f"{self.random_token_fraction} is {total}, more than 1"
            )
        if (self.word_segmenter == "word_list") != (self.word_list is not None):
            raise ValueError(f'word_list is for word_segmenter "word_list", which is "{self.word_segmenter}" here')
        if self.word_segmenter != "wordpiece" and not self.whole_word_mask:
            raise ValueError(f'word_segmenter "{self.word_segmenter}" needs whole_word_mask: true')
        return self


class AdamWConfig(Section):
    """AdamW with decoupled decay (Loshchilov and Hutter 2019), torch's fused implementation."""

    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay of every weight except biases and LayerNorm."""


class LambConfig(Section):
    """LAMB (You et al. 2020, arXiv 1904.00962), exact per tensor at any ZeRO stage."""

    type: Literal["lamb"] = "lamb"
    lr: PositiveFloat
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: PositiveFloat = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay inside the update of every weight except biases and LayerNorm."""
    bias_correction: bool = True
    """Divide the moments by 1 - beta^t (paper v1 and apex); false is the paper's v3."""
    grad_averaging: bool = True
    """Weigh the gradient by 1 - beta1 in the first moment."""
    adam_w_mode: bool = True
    """Decay in the update (true) or added to the gradient (false)."""
    use_nvlamb: bool = False
    """Apply the trust ratio to tensors without decay too."""
    min_trust: NonNegativeFloat = 0.0
    """Lower clamp of the trust ratio."""
    max_trust: PositiveFloat | None = None
    """Upper clamp of the trust ratio; 1.0 is LAMBC, null is none."""


class TrainingConfig(Section):
    """Steps, global batch and precision."""

    total_steps: PositiveInt
    """Optimizer steps of the whole run."""
    train_batch_size: PositiveInt
    """Examples per optimizer step over all ranks: micro-batch x accumulation x ranks."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of weights and activations in forward and backward; optimizer state is always fp32."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """auto: the Triton kernels on CUDA, torch elsewhere."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of the log and rows of metrics.jsonl."""
    num_workers: NonNegativeInt = 1
    """Loader processes per rank; 0 loads in the training process."""


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
        return self

    def num_warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of total_steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        assert self.warmup_fraction is not None
        return math.floor(self.warmup_fraction * total_steps)


class EvaluationConfig(Section):
    """Loss and accuracy on held-out documents, with masks that never change."""

    every_steps: PositiveInt | None = None
    """Steps between evaluations; null evaluates at the end only."""
    num_examples: PositiveInt = 512
    """Validation examples per evaluation (fewer if the split holds fewer)."""
    batch_size: PositiveInt = 32
    """Examples per forward pass and rank."""


class CheckpointConfig(Section):
    """When training state is saved and how much of it is kept."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints; null saves at the end only."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""


class RunConfig(Section):
    """A whole recipe, as loaded from one JSON file."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of schema.json, for editors."""
    format: Literal[1] = 1
    """Version of this file format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run; part of file names."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initialisation, data order, masks and dropout."""
    init_from: str | None = None
    """Folder of an exported or Hugging Face BERT, or of a run, whose weights start this run."""
    model: ModelConfig
    corpus: Annotated[EmbeddedCorpus | ShardCorpus, Field(discriminator="type")]
    sequences: SequenceConfig = SequenceConfig()
    masking: MaskingConfig = MaskingConfig()
    optimizer: Annotated[AdamWConfig | LambConfig, Field(discriminator="type")]
    schedule: ScheduleConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
