"""What a run will be: batches, steps, size, memory and disk, and every cross-check of its two files.

Used by check_run, pretrain and submit alike. Standard library and pydantic only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, pair_problems
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.recipe.precision import planned
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_checks import (
    corpus_tokens,
    named_files,
    recipe_problems,
    recipe_warnings,
    spread_problems,
    teacher_model,
)
from bert_ds.configuration.run_size import (
    MemoryEstimate,
    activation_bytes,
    checkpoint_bytes,
    flops_per_token,
    kept_checkpoints,
    memory_estimate,
    num_parameters,
    teacher_flops_per_token,
)
from bert_ds.configuration.run_stages import RunStage, run_stages, stage_split_problems

FEWEST_EPOCHS, MOST_EPOCHS = 0.05, 400.0
"""Of a run that nobody has to be asked about: BERT read its text 40 times."""


@dataclass(frozen=True)
class RunPlan:
    """A run whose files agree, on a number of ranks."""

    run: RunConfig
    ds: DsConfig
    split: BatchSplit
    """Of the global batch over the ranks."""
    warnings: tuple[str, ...] = ()
    """What works and may not be meant."""
    corpus_tokens: int | None = None
    """Tokens of one epoch, where the shards are there."""
    teacher: EncoderConfig | None = None
    """Shape of the model that teaches, where there is one and its folder is there."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.split.world_size

    @property
    def zero_stage(self) -> int:
        """0, 1, 2 or 3."""
        return self.ds.zero_stage

    @property
    def train_batch_size(self) -> int:
        """Examples per step over all ranks."""
        return self.run.training.train_batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, which training.max_minutes leaves to the launch."""
        return self.run.training.steps

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return self.run.schedule.num_warmup_steps(self.total_steps)

    @property
    def examples_seen(self) -> int:
        """Examples of the whole run, repetitions counted."""
        return sum(stage.num_steps * stage.split.train_batch_size for stage in self.stages)

    @property
    def stages(self) -> tuple[RunStage, ...]:
        """Parts of the run that differ in batch, length or masks, in turn; one where nothing does."""
        return run_stages(self.run, self.split)

    @property
    def largest_stage(self) -> int:
        """Number, from 0, of the stage whose micro-batch keeps most for the backward pass."""
        kept = [self._activation_bytes(stage) for stage in self.stages]
        return kept.index(max(kept))

    @property
    def max_tokens_per_step(self) -> int:
        """Tokens of a step if every example is full, in the stage with most."""
        return max(stage.max_tokens_per_step for stage in self.stages)

    def max_tokens(self, done_steps: int = 0) -> int:
        """Tokens of the steps after done_steps if every example is full."""
        left = ((stage, stage.end_step - max(stage.first_step, done_steps)) for stage in self.stages)
        return sum(max(0, steps) * stage.max_tokens_per_step for stage, steps in left)

    @property
    def max_flops(self) -> float:
        """FLOPs of forward and backward of the whole run if every example is full."""
        return sum(
            self.flops_per_token(stage.run.max_seq_length, stage.run) * stage.num_steps * stage.max_tokens_per_step
            for stage in self.stages
        )

    @property
    def has_pair_head(self) -> bool:
        """Whether the model has pooler and two-class head."""
        return self.run.sequences.sentence_pair != "none"

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, padded vocabulary rows included."""
        return num_parameters(self.run)

    def flops_per_token(self, mean_length: float, run: RunConfig | None = None) -> float:
        """FLOPs of forward and backward per token that is no padding, for sequences of this mean length.

        A teacher's forward pass is part of them. Of the recipe itself, or of a stage's.
        """
        run = run or self.run
        own = flops_per_token(run, mean_length)
        return own if self.teacher is None else own + teacher_flops_per_token(self.teacher, run, mean_length)

    @property
    def num_teacher_parameters(self) -> int:
        """Weights of the teacher that are used, 0 without one."""
        return 0 if self.teacher is None else self.teacher.count_parameters(has_pair_head=False)

    def memory(self, stage: int | None = None) -> MemoryEstimate:
        """Estimated memory of a rank, at the DeepSpeed file's ZeRO stage or at another."""
        stage = self.zero_stage if stage is None else stage
        offload = self.ds.offload_optimizer != "none" and stage > 0
        return memory_estimate(
            self.run,
            stage=stage,
            world_size=self.world_size,
            offload=offload,
            activations=max(self._activation_bytes(part) for part in self.stages),
            num_fixed=self.num_teacher_parameters,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated size of one checkpoint."""
        return checkpoint_bytes(self.run, stage=self.zero_stage)

    @property
    def disk_bytes(self) -> int:
        """Estimated space that the checkpoints of the run need at a time."""
        return self.checkpoint_bytes * kept_checkpoints(self.run)

    def _activation_bytes(self, stage: RunStage) -> int:
        recompute = self.ds.activation_checkpointing
        return activation_bytes(stage.run, stage.split.micro_batch_size, recompute=recompute)


def make_plan(run: RunConfig, ds: DsConfig, world_size: int, *, gpu_memory_bytes: int | None = None) -> RunPlan:
    """Check the two files against each other and derive the numbers.

    Args:
        run: the recipe.
        ds: the DeepSpeed file.
        world_size: number of ranks, at least 1.
        gpu_memory_bytes: memory of one GPU, for a warning where the estimate is larger.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    if world_size < 1:
        raise ConfigError(f"world size: found {world_size}, wanted >= 1")
    lines, missing = _pair_lines(run, ds)
    in_ds = _rank_problems(ds, world_size)
    split = ds.split_batch(run, world_size)
    if isinstance(split, Problem):
        in_ds.append(split)
    else:
        lines += [problem.line(ds.recipe_name) for problem in stage_split_problems(run, split)]
    lines += [problem.line(ds.name) for problem in in_ds]
    if lines:
        raise ConfigError("\n".join(lines))
    assert isinstance(split, BatchSplit)
    warnings = (*missing, *recipe_warnings(run), *_spread_warnings(run, ds, split))
    tokens, teacher = corpus_tokens(run), teacher_model(run)
    plan = RunPlan(run, ds, split, warnings, tokens, teacher)
    if run.training.total_steps is not None and tokens:
        plan = replace(plan, warnings=(*plan.warnings, *epoch_warnings(plan.max_tokens() / tokens)))
    return replace(plan, warnings=(*plan.warnings, *memory_warnings(plan, gpu_memory_bytes)))


def epoch_warnings(epochs: float) -> list[str]:
    """Return what to look at where a run reads next to nothing of its corpus, or little of it thousands of times."""
    if FEWEST_EPOCHS <= epochs <= MOST_EPOCHS:
        return []
    if epochs < 1:
        return [f"the run reads {epochs:.2g} of its corpus: more steps may be meant, or a part of the text is enough"]
    return [f"the run reads its corpus {epochs:,.0f} times: more text is wanted, or fewer steps"]


def require_files(run: RunConfig, ds: DsConfig) -> None:
    """Check the two files against each other, whatever the number of ranks, and that every file they name is here.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    lines, missing = _pair_lines(run, ds)
    lines += [f"{ds.recipe_name}: {text}" for text in missing]
    if lines:
        raise ConfigError("\n".join(lines))


def memory_warnings(plan: RunPlan, gpu_memory_bytes: int | None) -> list[str]:
    """Return what to do where a rank needs more than a GPU has; nothing where that is not known."""
    needed = plan.memory().device
    if gpu_memory_bytes is None or needed <= gpu_memory_bytes:
        return []
    needs = f"a rank needs about {size_text(needed)}, a GPU has {size_text(gpu_memory_bytes)}"
    return [f"{needs}: try a smaller micro-batch"]


def size_text(number: float) -> str:
    """Return a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _pair_lines(run: RunConfig, ds: DsConfig) -> tuple[list[str], list[str]]:
    """Return what is wrong whatever the number of ranks, and the named files that are not here."""
    file_problems, missing = named_files(run)
    in_recipe = [*recipe_problems(run), *file_problems]
    in_recipe += spread_problems(run, stage=ds.zero_stage, offloaded=ds.offload_optimizer != "none")
    lines = [problem.line(ds.recipe_name) for problem in in_recipe]
    return lines + [problem.line(ds.name) for problem in pair_problems(run, ds)], missing


def _rank_problems(ds: DsConfig, world_size: int) -> list[Problem]:
    secondary = ds.settings.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if world_size % secondary:
        text = f"{secondary} does not divide {world_size} ranks"
        return [Problem("zero_optimization.zero_hpz_partition_size", text)]
    return []


def _spread_warnings(run: RunConfig, ds: DsConfig, split: BatchSplit) -> list[str]:
    warnings = []
    if ds.zero_stage == 0 and planned(run.training.precision) == "bf16" and split.accumulation > 1:
        warnings.append(
            f"stage 0 accumulates {split.accumulation} micro-steps in bf16, which costs precision; stages 1 to 3 "
            "accumulate in fp32"
        )
    if ds.settings.get("zero_optimization", {}).get("round_robin_gradients"):
        warnings.append("with round_robin_gradients a run cannot be continued on another number of ranks")
    is_small = split.accumulation > 1 or split.world_size == 1
    if ds.zero_stage in (2, 3) and is_small and {ds.offload_optimizer, ds.offload_param} == {"none"}:
        why = "one rank has nobody to share with" if split.world_size == 1 else "gradients are reduced every micro-step"
        warnings.append(f"stage {ds.zero_stage}: {why}; on GPUs ds_configs/zero1.json waits least if its memory fits")
    if "nvme" in (ds.offload_optimizer, ds.offload_param):
        warnings.append(f"offload to NVMe has not been tried with {run.optimizer.type}")
    return warnings
