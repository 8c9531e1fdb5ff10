"""How large a run is: parameters exactly, FLOPs by a published formula, memory and disk as estimates.

Letters: D hidden size, F intermediate size, L layers, H heads, V padded vocabulary, N parameters, S tokens of a
sequence, T tokens of a micro-batch, R ranks.
"""

from __future__ import annotations

from typing import NamedTuple

from bert_ds.configuration.deepspeed_file.ds_effective import LARGEST_BUCKET
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.precision import Precision, planned
from bert_ds.configuration.recipe.run_config import RunConfig

FLOPS_SOURCE = (
    "6 per matrix weight and token for forward and backward (Kaplan et al. 2020, arXiv 2001.08361), 12 L D S for "
    "attention scores and values, vocabulary head on masked positions only"
)

_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}


class MemoryEstimate(NamedTuple):
    """Bytes of one rank while it trains, an estimate: allocator, kernels' workspace and libraries come on top."""

    weights: int
    """Weights in the training precision; at stage 3 a rank's share and what is gathered at a time."""
    gradients: int
    """Gradients and the buffers they are accumulated and reduced in."""
    optimizer: int
    """fp32 master weights and moments that lie with the weights."""
    activations: int
    """What the backward pass needs, for a micro-batch of sequences of full length."""
    host: int
    """Offloaded to the memory of the host, per rank."""

    @property
    def device(self) -> int:
        """Bytes beside the model, on the GPU where there is one."""
        return self.weights + self.gradients + self.optimizer + self.activations


def flops_per_token(run: RunConfig, mean_length: float) -> float:
    """Return FLOPs of forward and backward per token that is no padding: FLOPS_SOURCE.

    Args:
        run: the recipe.
        mean_length: tokens of a sequence; sequences of unequal length cost a little more, attention being quadratic.
    """
    encoders, words = run.encoders, run.encoders[-1]
    kept = 1 - run.training.layer_drop
    flops = sum(_encoder_flops(encoder, mean_length, kept_layers=kept) for encoder in encoders)
    flops += _head_flops(words, run, mean_length)
    if run.generator is not None:
        flops += 6 * run.model.detector_weights() + _drawn_flops(words, run, mean_length)
    return flops


def num_parameters(run: RunConfig) -> int:
    """Return the trainable parameters of a recipe, padded rows of the vocabulary included."""
    if run.generator is not None:
        return run.model.count_with_generator(run.generator)
    classes = run.sequences.pair_classes
    third = run.model.hidden_size + 1 if classes == 3 else 0
    return run.model.count_parameters(has_pair_head=classes > 0) + third


def teacher_flops_per_token(teacher: EncoderConfig, run: RunConfig, mean_length: float) -> float:
    """Return FLOPs of the forward pass of a model that teaches: a third of forward and backward."""
    return (_encoder_flops(teacher, mean_length) + _head_flops(teacher, run, mean_length)) / 3


def _encoder_flops(model: EncoderConfig, mean_length: float, *, kept_layers: float = 1.0) -> float:
    layer_weights = sum(rows * columns for rows, columns in model.layer_matrices())
    attention = 12 * model.hidden_size * model.attended_tokens(mean_length)
    return 6 * model.projection_weights + kept_layers * (6 * model.num_hidden_layers * layer_weights + attention)


def _head_flops(model: EncoderConfig, run: RunConfig, mean_length: float) -> float:
    hidden = model.hidden_size
    classes = run.sequences.pair_classes
    pooler = 6 * (hidden * hidden + classes * hidden) if classes else 0
    return (6 * model.word_head_weights() * _predictions(run, mean_length) + pooler) / mean_length


def _drawn_flops(model: EncoderConfig, run: RunConfig, mean_length: float) -> float:
    """Return those of the scores that pieces are drawn by, made once more than for the loss and without a gradient."""
    return 2 * model.embedding_width * model.padded_vocab_size * _predictions(run, mean_length) / mean_length


def _predictions(run: RunConfig, mean_length: float) -> float:
    most = run.masking.max_predictions_per_seq
    predictions = run.masking.mlm_probability * mean_length
    return predictions if most is None else min(predictions, most)


def optimizer_flops(run: RunConfig) -> int:
    """Return the FLOPs of a step's matrix products in the optimizer, over all ranks together; 0 where it has none."""
    return sum(run.optimizer.matrix_flops(one.own_matrices()) for one in run.encoders)


def activation_bytes(run: RunConfig, micro_batch_size: int, *, recompute: bool) -> int:
    """Estimate what the forward pass keeps: T `kept_values` per layer of all encoders and T mlm_probability V logits.

    Dropout masks are computed again, not kept. The torch attention keeps T H S scores twice as well.

    Args:
        run: the recipe.
        micro_batch_size: sequences, taken as max_seq_length long.
        recompute: with activation checkpointing only T D per layer is kept, and one layer in full.
    """
    width, layers = _BYTES[planned(run.training.precision)], 0
    tokens = micro_batch_size * run.sequences.max_seq_length
    for model in run.encoders:
        layer = tokens * model.kept_values()
        if run.training.kernels == "torch":
            layer += 2 * tokens * model.num_attention_heads * run.sequences.max_seq_length
        kept = tokens * model.hidden_size * model.num_hidden_layers + layer
        layers += kept if recompute else layer * model.num_hidden_layers
    logits = int(tokens * run.masking.mlm_probability) * run.model.padded_vocab_size
    return (layers + logits) * width


def memory_estimate(
    run: RunConfig, *, stage: int, world_size: int, offload: bool, activations: int, num_fixed: int = 0
) -> MemoryEstimate:
    """Estimate the memory of one rank under a ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054).

    Low precision p = 2 bytes: weights 2 N, gradients 2 N and fp32 accumulation 4 N where the stage has it, master 4 N,
    moments 8 N (Lion 4 N). Stage 1 divides master and moments by R, stage 2 the accumulated gradients too, stage 3 the
    weights too, where the word embedding is the largest thing gathered at a time.

    Args:
        run: the recipe.
        stage: 0, 1, 2 or 3.
        world_size: ranks.
        offload: master weights, moments and accumulated gradients lie in the memory of the host.
        activations: bytes of `activation_bytes`.
        num_fixed: parameters of a teacher, which every rank holds whole.
    """
    number = num_parameters(run)
    width = _BYTES[planned(run.training.precision)]
    shard = -(-number // world_size)
    low = width == 2
    # In fp32, stages 1 and 2 still clone their shard of the weights; stages 0 and 3 use the weights themselves.
    master = 4 if low or stage in (1, 2) else 0
    owned = number if stage == 0 else shard
    optimizer = owned * (run.optimizer.moment_bytes + master)
    embedding = run.model.padded_vocab_size * run.model.embedding_width
    weights = (number if stage < 3 else shard + 2 * embedding) * width + num_fixed * width
    whole = {0: width + (4 if low else 0), 1: width + (4 if low else 0), 2: 0, 3: 0}[stage]
    accumulated = shard * 4 if stage >= 2 else 0
    buckets = 2 * min(number, LARGEST_BUCKET) * width if stage >= 1 else 0
    if offload:
        return MemoryEstimate(weights, number * whole + buckets, 0, activations, optimizer + accumulated)
    return MemoryEstimate(weights, number * whole + accumulated + buckets, optimizer, activations, 0)


def checkpoint_bytes(run: RunConfig, *, stage: int) -> int:
    """Estimate one checkpoint of all ranks: weights in the training precision, fp32 master and moments."""
    number = num_parameters(run)
    width = _BYTES[planned(run.training.precision)]
    master = 4 if width == 2 or stage > 0 else 0
    weights = 0 if stage == 3 else width
    return number * (weights + master + run.optimizer.moment_bytes)


def kept_checkpoints(run: RunConfig) -> int:
    """Return the most checkpoints that lie on disk at a time: keep_last, the next one, and those kept for good."""
    policy, steps = run.checkpoints, run.training.total_steps
    if steps is None:
        return policy.keep_last + 1
    saved = steps // policy.every_steps + 1 if policy.every_steps is not None else 1
    for_good = steps // policy.keep_every_steps if policy.keep_every_steps is not None else 0
    return min(policy.keep_last + 1 + for_good, saved)
