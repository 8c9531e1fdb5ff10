"""micro-batch x accumulation x ranks = global batch: decided here and nowhere else."""

from __future__ import annotations

from typing import NamedTuple

from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.recipe.run_config import TrainedRun

AUTO_TOKENS = 16_384
"""Upper bound on the tokens of a micro-batch that is "auto"; see `auto_batch` for what a launch knows besides."""


class BatchSplit(NamedTuple):
    """How a global batch is cut into micro-batches, which are numbered over all ranks."""

    micro_batch_size: int
    """Examples per rank and micro-step."""
    accumulation: int
    """Micro-steps per step."""
    world_size: int

    @property
    def num_parts(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.world_size * self.accumulation

    @property
    def train_batch_size(self) -> int:
        """Examples of a step, over all ranks."""
        return self.micro_batch_size * self.num_parts

    def parts_of(self, rank: int) -> range:
        """Return the numbers of a rank's micro-batches, in the order of its micro-steps."""
        return range(rank * self.accumulation, (rank + 1) * self.accumulation)


def split_batch(
    run: TrainedRun, world_size: int, *, micro: int | None = None, accumulation: int | None = None
) -> BatchSplit | Problem:
    """Cut the global batch, or say what is wrong and what would be right.

    A micro-batch that is not given is the largest divisor of a rank's share that keeps
    micro-batch x max_seq_length within AUTO_TOKENS, and at least 1.

    Args:
        run: the recipe or the task, which has the global batch.
        world_size: number of ranks.
        micro: examples per rank and micro-step, from the DeepSpeed file.
        accumulation: micro-steps per step, from the DeepSpeed file.
    """
    total = run.training.train_batch_size
    if total % world_size:
        near = _nearest(total, world_size, divisors(total))
        text = f"the recipe's global batch of {total} is not a multiple of {world_size} ranks; with {near} ranks it is"
        return Problem("train_batch_size", text)
    share = total // world_size
    if micro is None and accumulation is not None:
        if share % accumulation:
            near = _nearest(share, accumulation, divisors(share))
            text = (
                f"{accumulation} does not divide a rank's share of {share} examples ({total} over {world_size} ranks)"
            )
            return Problem("gradient_accumulation_steps", f"{text}; the nearest that does is {near}")
        micro = share // accumulation
    if micro is None:
        longest = max(1, AUTO_TOKENS // run.max_seq_length)
        micro = max(one for one in divisors(share) if one <= longest)
    if share % micro:
        return _micro_problem(total, world_size, micro)
    if accumulation not in (None, share // micro):
        text = (
            f"found {accumulation}, but {total} examples over {world_size} ranks with train_micro_batch_size_per_gpu "
            f"{micro} take {share // micro}"
        )
        return Problem("gradient_accumulation_steps", f"{text}; leave it out")
    return BatchSplit(micro, share // micro, world_size)


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, the smallest first."""
    small = [one for one in range(1, int(number**0.5) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def _micro_problem(total: int, world_size: int, micro: int) -> Problem:
    share = total // world_size
    text = (
        f"{micro} x {world_size} ranks does not divide train_batch_size {total}; with {world_size} ranks "
        f"{_nearest(share, micro, divisors(share))} does"
    )
    if total % micro == 0:
        ranks = divisors(total // micro)
        text += f", with a micro-batch of {micro} {_nearest(total // micro, world_size, ranks)} ranks do"
    return Problem("train_micro_batch_size_per_gpu", text)


def _nearest(number: int, wanted: int, divisors: list[int]) -> str:
    below = [one for one in divisors if one <= wanted]
    above = [one for one in divisors if one >= wanted]
    return " or ".join(dict.fromkeys(str(one) for one in (below[-1:] + above[:1])))
