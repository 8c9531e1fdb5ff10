"""The training loop: it gets an engine and an iterator of batches, and knows nothing of either's inside.

What one rank decides for all (how many targets the step has, whether to stop) travels in one small host-side
all-reduce per step. Losses that are reported are those of the very step, so a resumed run repeats them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deepspeed import DeepSpeedEngine

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import CheckpointError, DivergedError
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints.train_state import LoopSettings, TrainState
from bert_ds.training.launch.hang_watchdog import Heartbeat
from bert_ds.training.launch.restart import StopRequest
from bert_ds.training.loop.bad_steps import gradient_report, trouble_folder, write_report
from bert_ds.training.loop.evaluation import Evaluation, named_means
from bert_ds.training.loop.loss_guard import LossGuard
from bert_ds.training.loop.rank_times import RankTimes
from bert_ds.training.loop.throughput import Throughput
from bert_ds.training.loop.train_step import (
    Judge,
    Step,
    agree_on_totals,
    fetch,
    forward_backward,
    set_learning_rate,
    sum_of_ranks,
    take_step,
)
from bert_ds.training.optimizers.lr_schedule import learning_rates
from bert_ds.training.optimizers.trust_statistics import trust_row

MAX_REPORTS = 20
"""Skipped steps of a run after which no more reports are left in its folder."""


@dataclass(frozen=True)
class Services:
    """What surrounds the loop."""

    log: RunLog
    stop: StopRequest
    throughput: Throughput
    save: Callable[[TrainState], bool] | None = None
    """Saves a checkpoint, or begins to; a collective. False, on all ranks alike, where it could not be written."""
    settle: Callable[[bool], bool] | None = None
    """Where saves go on behind the training: is called after every step; a collective. Given True it waits for the end
    of the save. False where the newest save has failed."""
    evaluate: Callable[[TrainState], Evaluation] | None = None
    """Measures the model as it is; a collective."""
    row_facts: Callable[[int], Mapping[str, Any]] | None = None
    """What the caller adds to the training row of a step, on rank 0."""
    roll_back: Callable[[TrainState], Iterator[Sequence[MicroBatch]] | None] = lambda state: None
    """Puts engine and state back to the newest checkpoint and gives the batches from there on; a collective. None
    where there is no checkpoint."""
    rank_times: RankTimes | None = None
    """Tells slow ranks from fast ones in every training row."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Is told what this rank is doing."""


def train(
    engine: DeepSpeedEngine,
    batches: Iterator[Sequence[MicroBatch]],
    *,
    state: TrainState,
    loop: LoopSettings,
    services: Services,
) -> TrainState:
    """Train from the state's step to the loop's last, or until a rank is asked to stop; a collective.

    An evaluation may end the run too, before its last step: the state is saved there like at the end. A step whose loss
    or gradients are not finite, or whose loss spikes, leaves the weights alone; after loop.max_bad_steps of them in a
    row the run goes back to its newest checkpoint and on with the batches that it has not seen.

    Args:
        engine: from `make_engine`.
        batches: yields this rank's micro-batches of one step, starting after the state's step; never ends early.
        state: advanced in place and returned; `state.step == loop.total_steps` says that the run is complete.

    Raises:
        DivergedError: too many bad steps in a row, and the run cannot go back (again).
        CheckpointError: the checkpoint at the end, or at a requested stop, could not be written.
    """
    engine.train()
    run = _Training(engine, batches, state=state, loop=loop, services=services)
    while state.step < run.last_step:
        step = run.take_step()
        if step is None:
            reason = services.stop.reason or "on another rank"
            services.log.info(f"asked to stop ({reason}), {_what_is_saved(state.step, run.saved_step)}")
            break
        if not step.applied:
            run.look_into(step)
            if state.bad_streak >= loop.max_bad_steps:
                run.go_back(step)
                continue
        elif step.number % loop.log_every_steps == 0 or step.number in (1, run.last_step):
            run.log_step(step)
        if services.settle is not None:
            services.settle(False)
        found = run.evaluate() if _is_due(state.step, loop.evaluate_every_steps) else Evaluation({})
        if found.save or (_is_due(state.step, loop.checkpoint_every_steps) and not state.bad_streak):
            run.save()
        if found.stop:
            services.log.info(f"nothing more to gain: the run ends at step {state.step} of {loop.total_steps}")
            break
    run.end()
    return state


class _Training:
    """A run on its way: what is worked out once before its steps, and what they leave for each other."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        batches: Iterator[Sequence[MicroBatch]],
        *,
        state: TrainState,
        loop: LoopSettings,
        services: Services,
    ) -> None:
        self.engine, self.batches, self.state, self.loop, self.services = engine, batches, state, loop, services
        self.last_step, self.saved_step, self.evaluated_step = loop.last_step, state.step, -1
        self.seed = loop.seed if loop.draws else None
        self.num_warmup_steps = loop.schedule.num_warmup_steps(loop.total_steps)
        self.learning_rate = learning_rates(loop.schedule, peak=loop.peak_lr, total_steps=loop.total_steps)
        self.guard = self._new_guard()

    def take_step(self) -> Step | None:
        """Take the next optimizer step and count it, or return None if a rank is asked to stop."""
        engine, state, services, number = self.engine, self.state, self.services, self.state.step + 1
        heart = services.heartbeat
        heart.enter("data wait", step=number)
        micro_batches, data_wait_s = fetch(self.batches)
        if services.rank_times:
            services.rank_times.data_wait_s += data_wait_s
        heart.enter("agreement", step=number)
        stop = services.stop.reason is not None
        totals = agree_on_totals(micro_batches, data_wait_s=data_wait_s, stop=stop)
        if totals.stop:
            return None
        lr = self.learning_rate(number)
        set_learning_rate(engine.optimizer, lr)
        heart.enter("forward and backward", step=number)
        if self.guard and state.step + state.passed_over in self.loop.stage_starts:
            self.guard.forget()
        judge = Judge(self.guard, armed=number > self.num_warmup_steps) if self.guard else None
        sums = forward_backward(engine, micro_batches, counts=totals.counts, seed=self.seed, step=number, judge=judge)
        heart.enter("optimizer", step=number)
        applied, grad_norm = take_step(engine)
        state.advance(applied, examples=engine.train_batch_size())
        services.throughput.add(
            num_tokens=totals.num_tokens,
            padded_tokens=totals.padded_tokens,
            filling_tokens=totals.filling_tokens,
            data_wait_s=totals.data_wait_s,
        )
        return Step(number, lr, totals, sums, applied, grad_norm, micro_batches)

    def log_step(self, step: Step) -> None:
        """Write the row of a step; its losses are this step's, over all ranks."""
        services = self.services
        means = self._means(step)
        row = {
            **means,
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),  # host sync: once per logged step
            "num_tokens": step.totals.num_tokens,
            **services.throughput.report(steps_left=self.loop.total_steps - step.number),
            **(services.rank_times.report() if services.rank_times else {}),
        }
        if services.log.is_main:
            row.update(trust_row(self.engine.basic_optimizer))
            row.update(services.row_facts(step.number) if services.row_facts else {})
        services.log.train_row(step.number, row)
        figures = {**means, "grad_norm": row["grad_norm"], "tokens_per_s": row["tokens_per_s"]}
        _write_monitor(self.engine, "train", figures)

    def look_into(self, step: Step) -> None:
        """Say what was wrong with a step that was not applied; of the first in a row leave a report in `trouble/`."""
        engine, state, log = self.engine, self.state, self.services.log
        means = self._means(step)
        spike = self.guard.explain() if self.guard else None
        reason = spike or f"loss {means['loss']:.4g}, gradient norm {float(step.grad_norm):.4g}"
        log.info(f"step {step.number} skipped: {reason}")
        facts = {**means, "lr": step.lr, "skipped_steps": state.skipped_steps, "spike": spike is not None}
        log.row("skipped", step.number, facts)
        if engine.fp16_enabled() and spike is None and abs(means["loss"]) < float("inf"):
            state.bad_streak = 0  # fp16 finds its loss scale by overflowing; its own lower bound ends a futile search
        if state.bad_streak == 1 and state.skipped_steps <= MAX_REPORTS:
            counts, seed = step.totals.counts, self.loop.seed
            report = gradient_report(engine, step.micro_batches, counts=counts, seed=seed, step=step.number)
            folder = trouble_folder(log.run_dir, step.number)
            batch = step.number + state.passed_over
            where = {"step": step.number, "batch": batch, "reason": reason}
            write_report(folder, {**where, "lr": step.lr, **means}, report)
            log.info(f"tensors and examples of step {step.number} are in {folder}")

    def go_back(self, step: Step) -> None:
        """Return to the newest checkpoint and go on with the batches after those seen so far."""
        state, loop, services = self.state, self.loop, self.services
        bad = f"{state.bad_streak} steps in a row, up to step {step.number}, had a loss or gradients that"
        bad += " are not finite or spike" if loop.spike_sigmas is not None else " are not finite"
        first = trouble_folder(services.log.run_dir, step.number - state.bad_streak + 1)
        if state.rollbacks >= loop.max_rollbacks:
            again = f" after going back {state.rollbacks} times" if state.rollbacks else ""
            raise DivergedError(f"{bad}{again}: look at {first}, the learning rate and the data")
        services.heartbeat.enter("checkpoint", step=state.step, patient=True)
        self._is_settled()
        with services.throughput.paused():
            batches = services.roll_back(state)
        if batches is None:
            raise DivergedError(f"{bad}, and there is no checkpoint to go back to: look at {first}")
        if any(state.step <= start < state.step + state.passed_over for start in loop.stage_starts):
            state.recent_losses = []  # the batches passed over may hold the beginning of a stage
        self.batches, self.saved_step, self.guard = batches, state.step, self._new_guard()

    def evaluate(self) -> Evaluation:
        """Measure the model and write the row of it."""
        state, services = self.state, self.services
        self.evaluated_step = state.step
        if services.evaluate is None:
            return Evaluation({})
        services.heartbeat.enter("evaluation", step=state.step, patient=True)
        with services.throughput.paused():
            found = services.evaluate(state)
        services.log.evaluation_row(state.step, found.means)
        _write_monitor(self.engine, "evaluation", found.means)
        return found

    def save(self, *, must: bool = False) -> None:
        """Save and note the step that is now safe, -1 if it is not; at the end of a launch a failure is final."""
        state, services = self.state, self.services
        if services.save is None:
            self.saved_step = state.step
            return
        state.recent_losses = self.guard.recent() if self.guard else []
        services.heartbeat.enter("checkpoint", step=state.step, patient=True)
        with services.throughput.paused():
            saved = services.save(state) and (not must or self._is_settled())
        if must and not saved:
            raise CheckpointError(f"the last checkpoint, at step {state.step}, could not be written")
        self.saved_step = state.step if saved else -1

    def end(self) -> None:
        """Evaluate a run at its end, and save what is not saved yet."""
        state = self.state
        if state.step == self.loop.total_steps and self.evaluated_step != state.step:
            self.evaluate()
        self.services.heartbeat.enter("checkpoint", step=state.step, patient=True)
        if not self._is_settled() or self.saved_step != state.step:
            self.save(must=True)

    def _is_settled(self) -> bool:
        """Wait for the end of a save; whether the newest one has not failed."""
        return self.services.settle is None or self.services.settle(True)

    def _means(self, step: Step) -> dict[str, float]:
        return named_means(self.engine.module.terms, sum_of_ranks(step.sums), counts=step.totals.counts)

    def _new_guard(self) -> LossGuard | None:
        """Return a guard that knows the losses up to the state, or None where no spike is to be skipped."""
        sigmas, window = self.loop.spike_sigmas, self.loop.spike_window
        if sigmas is None:
            return None
        return LossGuard(sigmas, window, recent=self.state.recent_losses, device=self.engine.device)


def _what_is_saved(step: int, saved_step: int) -> str:
    if step != saved_step:
        return f"saving at step {step}"
    return f"no step since the checkpoint of step {step}" if step else "no step was taken and nothing is saved"


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _write_monitor(engine: DeepSpeedEngine, section: str, values: Mapping[str, float | None]) -> None:
    """Write values to the monitors that the DeepSpeed configuration asks for; DeepSpeed itself writes the rate only."""
    if engine.monitor.enabled:
        engine.monitor.write_events(
            [(f"{section}/{name}", v, engine.global_samples) for name, v in values.items() if v is not None]
        )
