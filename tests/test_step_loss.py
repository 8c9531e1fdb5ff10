"""The share of one micro-batch in the loss of a step, and its dropout seed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bert_ds.basics.loss_term import LossTerm
from bert_ds.training.loop.dropout_seeds import dropout_seed, dropout_seed_value, splitmix64
from bert_ds.training.loop.step_loss import poison_if_not_finite, step_loss

TERMS = (LossTerm("first", count="a"), LossTerm("second", count="b"))


def test_the_shares_of_unequal_micro_batches_add_up_to_the_mean_over_all_targets() -> None:
    first, second = (
        step_loss(torch.tensor(sums), {"b": 4.0, "a": 10.0}, terms=TERMS) for sums in ([6.0, 1.0], [14.0, 2.0])
    )
    assert float(first + second) == pytest.approx(2.0 + 0.75)


def test_a_term_is_multiplied_by_its_weight() -> None:
    halved = (TERMS[0], replace(TERMS[1], weight=0.5))
    assert float(step_loss(torch.tensor([6.0, 1.0]), {"a": 3.0, "b": 1.0}, terms=halved)) == 2.5


def test_a_term_without_targets_counts_for_nothing() -> None:
    assert float(step_loss(torch.tensor([6.0, 0.0]), {"a": 3.0, "b": 0.0}, terms=TERMS)) == 2.0


def test_terms_and_sums_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="1 loss sums of 2 loss terms"):
        step_loss(torch.zeros(1), {"a": 1.0, "b": 1.0}, terms=TERMS)


def test_a_count_that_no_batch_brings_is_an_error_and_no_zero() -> None:
    with pytest.raises(KeyError, match="b"):
        step_loss(torch.zeros(2), {"a": 1.0}, terms=TERMS)


def test_a_finite_loss_passes_unchanged() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    loss = poison_if_not_finite(x * 3.0)
    loss.backward()
    assert (loss.item(), x.grad) == (6.0, torch.tensor(3.0))


def test_an_infinite_loss_with_finite_gradients_gives_nan_gradients() -> None:
    x = torch.tensor(2.0, requires_grad=True)
    poison_if_not_finite(x + float("inf")).backward()
    assert x.grad is not None
    assert x.grad.isnan()


def test_splitmix64_gives_the_published_sequence() -> None:
    # First outputs of the reference generator seeded with 1234567.
    state, step = 1234567, 0x9E3779B97F4A7C15
    outputs = [splitmix64((state + k * step) % 2**64) for k in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_seed_depends_on_run_step_and_part_and_fits_int64() -> None:
    values = {dropout_seed_value(s, t, p) for s in range(8) for t in range(8) for p in range(8)}
    assert len(values) == 512
    assert all(-(2**63) <= value < 2**63 for value in values)
    assert min(values) < 0


def test_the_seed_tensor_holds_the_value() -> None:
    seed = dropout_seed(1, 2, 3, device="cpu")
    assert (seed.dtype, seed.shape, int(seed)) == (torch.int64, (1,), dropout_seed_value(1, 2, 3))
