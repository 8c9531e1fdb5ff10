"""The report of a run: two lines on the console, figures, and one HTML page."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_verbs import run_verb
from tiny_training import TinyModel, ds_config, join_alone, step_batches, tiny_loop, tiny_services

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.reading.config_files import shipped_file
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, LambConfig
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.reporting.run_figures import _evaluated_how, draw_figures
from bert_ds.reporting.run_history import below_unigram, read_history, summary_lines
from bert_ds.reporting.run_page import render_page
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_loop import train
from bert_ds.training.optimizers.factory import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
START = {"kind": "start", "step": 0, "attempt": 1, "time": 0.0, "data": {"unigram_cross_entropy": 7.0}}


def trained(folder: Path, config: Any) -> Path:
    """Train six steps of the tiny model, every one logged."""
    join_alone()
    model = TinyModel()
    optimizer = make_optimizer(config(lr=1e-2, weight_decay=0.1), model.named_parameters())
    engine = make_engine(model, optimizer, ds_config(1, accumulation=2))
    services = tiny_services(folder, 0, 1)
    services.log.start(0, {})
    train(engine, step_batches(0, 0, 2), state=TrainState(), loop=tiny_loop(6, log_every_steps=1), services=services)
    services.log.close()
    return folder


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    """A run folder with these rows."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def logged(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "step": step, "attempt": 1, "time": 10.0 * step, "loss": 8.0, **values}


def test_a_lamb_run_has_a_figure_of_the_trust_ratios_of_every_adapted_kind_of_layer(tmp_path: Path) -> None:
    history = read_history(trained(tmp_path, LambConfig))
    pictures = {picture.name: picture for picture in draw_figures(history)}
    assert list(pictures) == ["loss", "rates", "speed", "trust_ratios", "update_norms"]
    assert all(picture.png.startswith(b"\x89PNG") for picture in pictures.values())
    assert (
        "because it was 1 throughout: LayerNorm.bias, LayerNorm.weight, dense.bias" in pictures["trust_ratios"].caption
    )
    assert history.trust("trust_ratio").keys() == history.trust("update_norm").keys()


def test_a_band_is_what_the_optimizer_logged(tmp_path: Path) -> None:
    spreads = [{"min": 0.1, "median": 0.2, "max": 0.4}, {"min": 0.2, "median": 0.3, "max": None}]
    rows = [
        logged("train", step, trust={"dense.weight": {"trust_ratio": spread}})
        for step, spread in enumerate(spreads, start=1)
    ]
    band = read_history(written(tmp_path, *rows)).trust("trust_ratio")["dense.weight"]
    assert (band.low, band.median) == ([0.1, 0.2], [0.2, 0.3])
    assert band.high == pytest.approx([0.4, float("nan")], nan_ok=True)


def test_a_run_without_trust_ratios_has_no_figure_of_them(tmp_path: Path) -> None:
    names = [picture.name for picture in draw_figures(read_history(trained(tmp_path, AdamWConfig)))]
    assert names == ["loss", "rates", "speed"]


def test_the_page_holds_its_figures_and_loads_nothing(tmp_path: Path) -> None:
    history = read_history(trained(tmp_path, LambConfig))
    pictures = draw_figures(history)
    page = render_page(history, pictures)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(pictures) and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|<script|<link|url\(", page)


def test_the_page_tells_of_attempts_checkpoints_and_skipped_steps(tmp_path: Path) -> None:
    again = {**START, "step": 2, "attempt": 2, "time": 25.0}
    skipped = logged("skipped", 3, loss=None)
    saved = logged("checkpoint", 2, bytes=3_000_000, seconds=0.5)
    rows = [START, logged("train", 1), saved, logged("train", 3), again, skipped, logged("train", 4)]
    page = render_page(read_history(written(tmp_path, *rows)), [])
    for text in ("attempt 1 begins", "attempt 2 continues", "checkpoint, 3 MB in 0.5 s", "step skipped: loss nan"):
        assert text in page
    assert "not finished, step 4, 2 attempts" in page
    assert "not finished, step 1, 1 attempt, last" in render_page(read_history(written(tmp_path, *rows[:2])), [])


def test_what_a_user_wrote_is_escaped(tmp_path: Path) -> None:
    folder = written(tmp_path, START, logged("train", 1))
    (folder / "run_config.json").write_text(json.dumps({"name": "<script>alert(1)</script>"}))
    assert "<script>" not in render_page(read_history(folder), [])


EVALUATED = {
    "loss_mlm": 5.5,
    "loss_mlm_masked": 6.25,
    "loss_mlm_random": 8.5,
    "loss_mlm_kept": 0.5,
    "mlm_masked_accuracy": 0.125,
    "mlm_random_accuracy": 0.0,
    "mlm_kept_accuracy": 0.75,
    "mlm_masked_targets": 8000,
    "mlm_random_targets": 1001,
    "mlm_kept_targets": 999,
}


def test_the_summary_compares_the_validation_loss_at_mask_with_the_piece_frequencies(tmp_path: Path) -> None:
    earlier = logged("evaluation", 0, **{**EVALUATED, "loss_mlm_masked": 7.5})
    rows = [START, earlier, logged("train", 1, tokens_per_s=1234.5), logged("evaluation", 1, **EVALUATED)]
    history = read_history(written(tmp_path, *rows))
    assert summary_lines(history) == [
        "step 1: 1,234 non-pad tokens/s (median of the logged intervals)",
        "validation text at [MASK]: loss 6.250 nats, accuracy 0.125, 8,000 targets; piece frequencies alone 7.000 "
        "nats, 0.750 above the model",
        "at random pieces: loss 8.500, accuracy 0.000, 1,001 targets; at kept pieces: loss 0.500, accuracy 0.750, "
        "999 targets",
    ]
    assert below_unigram(history) == 0.75


@pytest.mark.parametrize(("loss", "code"), [(None, 5), (6.6, 5), (6.5, 0), (8.0, 5)])
def test_only_a_finite_loss_that_far_below_passes_the_bar(tmp_path: Path, loss: float | None, code: int) -> None:
    rows = [START, logged("train", 1), logged("evaluation", 1, **{**EVALUATED, "loss_mlm_masked": loss})]
    arguments = ["--run_dir", written(tmp_path, *rows), "--require_below_unigram", "0.5"]
    done = run_verb(ROOT / "bert_ds/report.py", *arguments)
    assert done.returncode == code, done.stderr
    assert ("1.000 below the model" in done.stdout) == (loss == 8.0)


def test_a_run_of_an_earlier_version_opens_and_its_flattering_mean_passes_no_bar(tmp_path: Path) -> None:
    rows = [START, logged("train", 1, loss_mlm=6.0), logged("evaluation", 1, loss_mlm=4.0, mlm_accuracy=0.25)]
    history = read_history(written(tmp_path, *rows))
    assert summary_lines(history)[1:] == [
        "masked words of the validation text: loss 4.000 nats, the mean over 80/10/10 of an earlier version, which "
        "copying the kept pieces flatters"
    ]
    pictures = {picture.name: picture.caption for picture in draw_figures(history)}
    assert list(pictures) == ["loss", "evaluation", "rates", "speed"]
    assert "the mean over 80/10/10 of an earlier version" in pictures["evaluation"]
    assert "This run has no figure at [MASK]" in pictures["evaluation"]
    both = [*rows, logged("evaluation", 2, **EVALUATED)]
    caption = _evaluated_how(read_history(written(tmp_path, *both)))
    assert "What counts is the prediction at [MASK]. Evaluations without it are the mean over 80/10/10" in caption
    assert _evaluated_how(read_history(written(tmp_path, *rows[:2], both[-1]))).endswith("the prediction at [MASK].")
    written(tmp_path, *rows)
    start = {**START, "data": {}}  # as versions before this one wrote it
    for first in (START, start):
        sentence = "mean over 80/10/10 of an earlier version, wanted loss_mlm_masked.*--resume auto evaluates"
        with pytest.raises(DataError, match=sentence):
            below_unigram(read_history(written(tmp_path, first, *rows[1:])))


def test_the_figures_show_the_validation_loss_at_mask_and_not_the_mean(tmp_path: Path) -> None:
    def drawn(**changes: float) -> list[bytes]:
        rows = [logged("evaluation", step, **{**EVALUATED, **changes}) for step in (1, 2)]
        history = read_history(written(tmp_path, START, logged("train", 1, loss_mlm=6.0), *rows))
        return [picture.png for picture in draw_figures(history)[:2]]

    shown = drawn()
    assert drawn(loss_mlm=4.0) == shown
    assert all(other != picture for other, picture in zip(drawn(loss_mlm_masked=6.5), shown, strict=True))


def test_a_run_without_evaluation_is_not_taken_for_one_that_has_learned(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no evaluation"):
        below_unigram(read_history(written(tmp_path, START, logged("train", 1))))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl does not exist"):
        read_history(tmp_path)
    with pytest.raises(DataError, match="no logged step"):
        read_history(written(tmp_path, START))


def test_without_matplotlib_the_figures_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        draw_figures(read_history(written(tmp_path, START, logged("train", 1))))


def test_the_command_writes_the_page_and_the_pictures(tmp_path: Path) -> None:
    folder = written(tmp_path, START, logged("train", 1, grad_norm=None), logged("evaluation", 1, **EVALUATED))
    arguments = ["--run_dir", folder, "--html", "--require_below_unigram", "1"]
    refused = run_verb(ROOT / "bert_ds/report.py", *arguments)
    assert refused.returncode == 2
    assert "holds 'metrics.jsonl', which is not ours" in refused.stderr
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    shutil.copy(shipped_file("recipes/embedded_default.json"), folder / "run_config.json")
    (folder / "report.html").write_text("<!DOCTYPE html>mine")
    refused = run_verb(ROOT / "bert_ds/report.py", *arguments)
    assert (refused.returncode, (folder / "report.html").read_text()) == (2, "<!DOCTYPE html>mine")
    assert "report.html is not a page of report.py" in refused.stderr and not (folder / "figures").exists()
    (folder / "report.html").unlink()
    (folder / "figures").mkdir()
    (folder / "figures/loss.png").write_text("mine")
    run_verb(ROOT / "bert_ds/report.py", *arguments)
    (folder / "report.html").write_text((folder / "report.html").read_text().replace("</body>", "noted</body>"))
    done = run_verb(ROOT / "bert_ds/report.py", *arguments)
    assert done.returncode == 5, done.stderr
    assert "0.750 nats below the unigram cross-entropy, wanted at least 1.0" in done.stderr
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (folder / "figures/loss.png.kept-1").read_text() == "mine"
    assert "noted</body>" in (folder / "report.html.kept-1").read_text(encoding="utf-8")
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "loss.png",
        "loss.png.kept-1",
        "evaluation.png",
        "rates.png",
        "speed.png",
    }
