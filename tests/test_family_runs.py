"""Every family's runs: the same curve at each ZeRO stage and number of ranks, resumed to the bit, exported."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from family_cases import OWN_LAYERS, WIRED, of_size
from family_runs import STEPS, TOKENIZER, Run, losses, run_folder, train_all, write_inputs
from ranks_harness import run_ranks

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.encoder.hf_mapping import from_hf
from bert_ds.export_hf import export
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

STAGES, ENDS, DIVIDED = (0, 1, 2, 3), (1, 3), (3,)
"""ENDS: where the weights are whole and where they are divided; what lies between is seen in one family. DIVIDED: of
families whose layers are another's there is no more to see than how weights are gathered; ALBERT's layers are one."""
OTHERS = [name for name in WIRED if name != "bert"]
PLAIN = [Run(f"zero{stage}", stage) for stage in STAGES]
MUON = Run("muon", 2, optimizer="muon")
WHOLE = [Run(f"whole{stage}", stage, dropout=0.1, recompute=True) for stage in STAGES]
FILLED = [
    Run("filled", 1, settings=("training.few_shapes=true",)),
    Run("filled, whole", 3, dropout=0.1, recompute=True, settings=("training.few_shapes=true",)),
    Run("filled, resumed", 3, dropout=0.1, resumes="filled, whole", settings=("training.few_shapes=true",)),
]
FILLING = ("bert", "electra", "modernbert")
"""Families whose batches are filled up in runs here, at stage 1 too; of others in test_few_shapes alone, as of all."""
RESUMED = [Run(f"resumed{stage}", stage, dropout=0.1, resumes=f"whole{stage}") for stage in STAGES]


class Trained(NamedTuple):
    """A family with the folder of its runs."""

    config: EncoderConfig
    folder: Path
    stages: tuple[int, ...]


def runs_on(world_size: int, stages: tuple[int, ...]) -> list[Run]:
    plain = [PLAIN[stage] for stage in stages if stage]
    if world_size == 1:
        return [PLAIN[0], MUON._replace(stage=0), *(plain if stages == STAGES else ())]
    some = [] if stages == DIVIDED else [runs[stage] for runs in (WHOLE, RESUMED) for stage in stages]
    return [*(PLAIN[:1] if stages == STAGES else ()), MUON, *plain, *some, *(FILLED if 1 in stages else ())]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("bert", STAGES), id="bert"),
        *(pytest.param((name, ENDS if name in (*OWN_LAYERS, "albert") else DIVIDED), id=name) for name in OTHERS),
        *(pytest.param((name, STAGES), marks=pytest.mark.campaign, id=f"{name}, all stages") for name in OTHERS),
    ],
)
def trained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder, (name, stages) = tmp_path_factory.mktemp("runs"), request.param
    config = of_size(WIRED[name], vocab_size=TOKENIZER.vocab_size)
    write_inputs(folder, config)
    for world_size in (1, 2):
        runs = runs_on(world_size, stages)
        made = [run for run in runs if run not in FILLED or config.family in FILLING]
        run_ranks(train_all, world_size, folder, made)
    return Trained(config, folder, stages)


def test_every_stage_on_one_and_two_ranks_is_one_curve(trained: Trained) -> None:
    folder = trained.folder
    wanted = losses(run_folder(folder, 1, PLAIN[0]))
    assert len(wanted) == STEPS and wanted[-1] < wanted[0] - 0.03
    for world_size in (1, 2):
        for run in PLAIN:
            if run in runs_on(world_size, trained.stages):
                assert losses(run_folder(folder, world_size, run)) == pytest.approx(wanted, rel=2e-5), run
    muon = [losses(run_folder(folder, world_size, MUON)) for world_size in (1, 2)]
    assert muon[0] == pytest.approx(muon[1], rel=2e-5) and muon[0] != pytest.approx(wanted, rel=1e-3)


def test_a_run_whose_batches_are_filled_up_is_the_same_run_and_resumes_to_the_same_bits(trained: Trained) -> None:
    config, folder, stages = trained
    if config.family not in FILLING or 1 not in stages:
        pytest.skip("filled up in test_few_shapes alone")
    plain, whole, resumed = (run_folder(folder, 2, run) for run in FILLED)
    assert losses(plain) == pytest.approx(losses(run_folder(folder, 1, PLAIN[0])), rel=2e-5)
    assert losses(whole) == losses(resumed) == pytest.approx(losses(run_folder(folder, 2, WHOLE[3])), rel=2e-5)
    evaluations = (read_metrics(run / "metrics.jsonl", "evaluation")[-1]["loss"] for run in (plain, whole))
    wanted = (
        read_metrics(run_folder(folder, 2, run) / "metrics.jsonl", "evaluation")[-1]["loss"]
        for run in (PLAIN[1], WHOLE[3])
    )
    assert list(evaluations) == pytest.approx(list(wanted), rel=2e-5)
    shares = {row["filling_share"] for row in read_metrics(plain / "metrics.jsonl")}
    assert all(0 < share < 0.2 for share in shares)


def test_a_run_without_recomputed_layers_goes_on_from_one_with_them_to_the_same_bits(trained: Trained) -> None:
    folder = trained.folder
    if trained.stages == DIVIDED:
        pytest.skip("resumed where the layers are the family's own")
    for whole, resumed in ((WHOLE[stage], RESUMED[stage]) for stage in trained.stages):
        ends = [
            load_fp32_state_dict(run_folder(folder, 2, run) / f"checkpoints/global_step{STEPS}")
            for run in (whole, resumed)
        ]
        assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items()), whole
        curves = [losses(run_folder(folder, 2, run)) for run in (whole, resumed)]
        assert curves[0] == curves[1] != losses(run_folder(folder, 2, PLAIN[whole.stage]))


def test_a_checkpoint_of_every_stage_is_exported(trained: Trained) -> None:
    config, folder, stages = trained
    for run in (PLAIN[stage] for stage in stages):
        run_dir, output = run_folder(folder, 2, run), folder / f"exported{run.stage}"
        output.mkdir()
        assert "tokenizer equal" in export(run_dir, None, output, shown=output)
        weights = load_fp32_state_dict(run_dir / f"checkpoints/global_step{STEPS}")
        found = from_hf(load_hf_folder(output).tensors, config, has_pair_head=False)
        shared = [name for name in weights if "token_type" not in name]
        assert all(torch.equal(found[name], weights[name]) for name in shared)
        said = (output / "README.md").read_text()
        assert ("trained on one; the others are equal to it" in said) == (config.num_segments > 1)
