"""A rank is killed at random moments, again and again, and the run comes out as if nothing had happened.

The whole of it is `make campaign-kills`; here is one case of it.
"""

from __future__ import annotations

from pathlib import Path

from campaign_kills import CASES, run_case
from ranks_harness import run_forked


def test_random_kills_of_a_rank_of_two_change_no_bit_of_the_run(tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == "zero3-adamw-fp32-2rank")
    row = run_forked(run_case, case, tmp_path, 4)
    assert (row["kills"], row["steps"], row["checkpoints_lost"]) == (4, 16, 0)
    assert row["same_losses"]
    assert row["same_evaluations"]
    assert row["same_weights_and_optimizer"]
