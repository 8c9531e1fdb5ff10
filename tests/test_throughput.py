"""Speed figures from a clock that the test moves."""

from __future__ import annotations

import pytest

from bert_ds.training.loop.throughput import Throughput, peak_flops


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def metered(clock: Clock, **changes: float) -> Throughput:
    meter = Throughput(world_size=2, clock=clock, **changes)  # type: ignore[arg-type]
    meter.add(num_tokens=600, padded_tokens=800, data_wait_s=1.0)
    meter.add(num_tokens=400, padded_tokens=1200, data_wait_s=1.0)
    clock.now += 4.0
    return meter


def test_tokens_per_second_count_no_padding() -> None:
    assert metered(Clock()).report(steps_left=0)["tokens_per_s"] == 250.0


def test_padding_avoided_is_the_share_of_the_padded_batch() -> None:
    assert metered(Clock()).report(steps_left=0)["padding_avoided"] == 0.5


def test_the_share_of_fillings_is_of_all_tokens_and_unknown_where_there_are_none() -> None:
    meter = metered(Clock())
    assert meter.report(steps_left=0)["filling_share"] is None
    meter.add(num_tokens=750, padded_tokens=800, data_wait_s=0.0, filling_tokens=250)
    assert meter.report(steps_left=0)["filling_share"] == 0.25
    assert meter.report(steps_left=0)["filling_share"] is None


def test_the_data_wait_is_the_mean_over_ranks() -> None:
    assert metered(Clock()).report(steps_left=0)["data_wait_share"] == 0.25


def test_the_time_left_follows_from_the_last_steps() -> None:
    assert metered(Clock()).report(steps_left=10)["eta_s"] == 20.0


def test_mfu_is_model_flops_over_the_peak_of_all_ranks() -> None:
    meter = metered(Clock(), flops_per_token=4.0, peak_flops_per_rank=1000.0)
    assert meter.report(steps_left=0)["mfu"] == 0.5


def test_mfu_is_unknown_without_a_peak() -> None:
    assert metered(Clock(), flops_per_token=4.0).report(steps_left=0)["mfu"] is None


def test_a_pause_is_left_out() -> None:
    clock = Clock()
    meter = metered(clock)
    with meter.paused():
        clock.now += 1000.0
    assert meter.report(steps_left=0)["tokens_per_s"] == 250.0


def test_a_report_starts_over() -> None:
    clock = Clock()
    meter = metered(clock)
    meter.report(steps_left=0)
    meter.add(num_tokens=10, padded_tokens=10, data_wait_s=0.0)
    clock.now += 1.0
    assert meter.report(steps_left=0)["tokens_per_s"] == 10.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("Some Future GPU", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device(name: str, peak: float | None) -> None:
    assert peak_flops(name, "bf16") == peak


def test_there_is_no_peak_for_fp32() -> None:
    assert peak_flops("NVIDIA H200", "fp32") is None
