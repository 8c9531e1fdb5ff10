"""What a plan says to people: its numbers as rows of name and text."""

from __future__ import annotations

from collections.abc import Mapping

from bert_ds.basics.ranks import LAUNCHER_PATIENCE_S
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.corpus_config import MaskingConfig
from bert_ds.configuration.recipe.precision import precision_text
from bert_ds.configuration.run_plan import RunPlan, size_text
from bert_ds.configuration.run_size import FLOPS_SOURCE, kept_checkpoints, optimizer_flops
from bert_ds.configuration.run_stages import stage_rows


def plan_table(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the derived numbers as rows of name and text."""
    run, length = plan.run, plan.run.sequences.max_seq_length
    flops, own_tokens = plan.flops_per_token(length), plan.train_batch_size * length
    rows = [
        (
            "run",
            f"{run.name}: {run.optimizer.type}, {precision_text(run.training.precision)}, ZeRO stage {plan.zero_stage}",
        ),
        ("global batch", batch_text(plan.split)),
        ("tokens per step", f"at most {own_tokens:,} ({plan.train_batch_size:,} x {length})"),
        ("masks", masks_text(run.masking)),
        *stage_rows(plan.stages),
        *_step_rows(plan),
        ("parameters", f"{plan.num_parameters:,} ({run.model.padded_vocab_size:,} rows in the vocabulary)"),
        ("FLOPs per token", f"{flops:.3e} at length {length}; {FLOPS_SOURCE}"),
    ]
    if run.training.total_steps is not None:
        rows.append(("FLOPs of the run", f"at most {plan.max_flops:.3e}"))
    if in_optimizer := optimizer_flops(run):
        share = in_optimizer / (flops * own_tokens)
        rows.append(("FLOPs of the optimizer", f"{in_optimizer:.3e} a step over all ranks, {share:.1%} of the model's"))
    if run.generator is not None:
        parameters = next(index for index, (name, _) in enumerate(rows) if name == "parameters")
        rows.insert(parameters + 1, ("generator", generator_text(run.generator, run.objective_weights)))
    if plan.teacher is not None:
        parameters = next(index for index, (name, _) in enumerate(rows) if name == "parameters")
        rows.insert(parameters + 1, ("teacher", f"{plan.num_teacher_parameters:,} parameters, whole on every rank"))
    rows += memory_rows(plan)
    kept = kept_checkpoints(run)
    disk = f"{size_text(plan.checkpoint_bytes)} each, {size_text(plan.disk_bytes)} for {kept} at a time (estimate)"
    speed = size_text(plan.checkpoint_bytes / LAUNCHER_PATIENCE_S)
    stop = (
        f"after a step and a save, measured at the first one; deepspeed alone kills after {LAUNCHER_PATIENCE_S} s, "
        f"enough for a save above {speed}/s; bert-ds and Slurm wait"
    )
    return [*rows, ("checkpoints", disk), ("stop on request", stop)]


def batch_text(split: BatchSplit) -> str:
    """Return a global batch as the product that it is."""
    return (
        f"{split.train_batch_size:,} = {split.micro_batch_size} micro-batch x {split.accumulation} accumulation "
        f"x {split.world_size} ranks"
    )


def masks_text(masking: MaskingConfig) -> str:
    """Return what is masked, and by what, as text."""
    shares = {"[MASK]": masking.mask_token_fraction, "a random piece": masking.random_token_fraction}
    shares["kept"] = 1.0 - sum(shares.values())
    shown = [f"{_percent(share)} {name}" for name, share in shares.items() if share > 1e-9]
    units = " in runs of whole words" * masking.span_mask or " in whole words" * masking.whole_word_mask
    bound = masking.max_predictions_per_seq
    most = "" if bound is None else f", at most {bound} in an example"
    return f"{_percent(masking.mlm_probability)} of the pieces{units}: {', '.join(shown)}{most}"


def generator_text(generator: EncoderConfig, weights: Mapping[str, float]) -> str:
    """Return what replaces tokens, and what both losses weigh."""
    heads = "1 head" if generator.num_attention_heads == 1 else f"{generator.num_attention_heads} heads"
    sizes = f"{generator.num_hidden_layers} layers of {generator.hidden_size} with {heads}, the model's embeddings"
    return f"{sizes}; its loss weighs {weights['masked_words']:g}, the detector's {weights['replaced_tokens']:g}"


def memory_rows(plan: RunPlan) -> list[tuple[str, str]]:
    """Return the memory of a rank at each ZeRO stage as rows of name and text."""
    return [_memory_row(plan, stage) for stage in (0, 1, 2, 3)]


def _step_rows(plan: RunPlan) -> list[tuple[str, str]]:
    minutes, examples = plan.run.training.max_minutes, plan.run.training.total_steps and plan.examples_seen
    if examples is None:
        return [("steps", f"as many as fit into {minutes:g} minutes, decided at the launch")]
    tokens = f"at most {plan.max_tokens():,} tokens{_epochs(plan)}"
    return [
        ("steps", f"{plan.total_steps:,}, the first {plan.warmup_steps:,} of them warm-up"),
        ("examples", f"{examples:,}, {tokens}"),
    ]


def _percent(share: float) -> str:
    return f"{round(100 * share, 2):g}%"


def _epochs(plan: RunPlan) -> str:
    if not plan.corpus_tokens:
        return ""
    epochs = plan.max_tokens() / plan.corpus_tokens
    return f", {epochs:.1f} epochs of {plan.corpus_tokens:,}"


def _memory_row(plan: RunPlan, stage: int) -> tuple[str, str]:
    found = plan.memory(stage)
    parts = [
        f"weights {size_text(found.weights)}",
        f"gradients {size_text(found.gradients)}",
        f"optimizer {size_text(found.optimizer)}",
        f"activations {size_text(found.activations)}",
    ]
    host = f"; {size_text(found.host)} on the host" if found.host else ""
    mark = " <- this run" if stage == plan.zero_stage else ""
    return f"memory at stage {stage}", f"{size_text(found.device)} per rank (estimate): {', '.join(parts)}{host}{mark}"
