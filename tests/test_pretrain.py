"""The whole way as a user walks it: text, tokenizer, shards, pre-training, interruption, export, filled masks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from forked_verbs import run_text, run_verb

from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
NOUNS = ["cat", "dog", "bird", "house", "tree", "river", "stone", "child", "king", "farmer", "road", "cloud"]
VERBS = ["sees", "finds", "follows", "paints", "carries", "watches", "leaves", "likes"]
TOTAL_STEPS = 12
WITHOUT_DROPOUT = ("model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0")


run = run_verb


def pretrain_command(workshop: Path, run_dir: Path, *extra: object, stage: int = 2) -> list[object]:
    """Command line of one rank, without a launcher."""
    files = ("--run", workshop / "recipe.json", "--deepspeed_config", ROOT / f"ds_configs/zero{stage}.json")
    return [ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir, *extra]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small text, its tokenizer and shards, and a recipe."""
    return make_workshop(tmp_path_factory.mktemp("workshop"))


def make_workshop(folder: Path) -> Path:
    """Fill a folder with a small text, its tokenizer and shards, and a recipe; return the folder."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(7)

    def sentence() -> str:
        return f"the {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} near the {draw.choice(NOUNS)} ."

    text = "\n\n".join("\n".join(sentence() for _ in range(12)) for _ in range(60))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    made = run(
        ROOT / "bert_ds/train_wordpiece.py", "--input", folder / "text.txt", "--output", tokenizer, "--vocab_size", 120
    )
    assert made.returncode == 0, made.stderr
    places = ("--input", folder / "text.txt", "--tokenizer", tokenizer, "--output", shards)
    made = run(ROOT / "bert_ds/build_shards.py", *places, "--validation_fraction", 0.2)
    assert made.returncode == 0, made.stderr
    recipe = {
        "name": "tiny",
        "seed": 5,
        "model": {
            "vocab_size": 120,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "tokenizer"},
        "sequences": {"max_seq_length": 32, "sentence_pair": "sop"},
        "optimizer": {"type": "adamw", "lr": 5e-3},
        "schedule": {"type": "linear", "warmup_steps": 2},
        "training": {
            "total_steps": TOTAL_STEPS,
            "train_batch_size": 8,
            "precision": "bf16",
            "log_every_steps": 1,
            "num_workers": 1,
        },
        "evaluation": {"num_examples": 16, "batch_size": 8},
        "checkpoints": {"every_steps": 4, "keep_last": 2},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished_run(workshop: Path) -> Path:
    """A run of one rank from beginning to end, dropout on."""
    run_dir = workshop / "runs/finished"
    finished = run(*pretrain_command(workshop, run_dir))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return run_dir


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training step, the newest attempt's where a step was taken twice."""
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir / "metrics.jsonl")]


def evaluated(run_dir: Path) -> tuple[float, dict[str, float]]:
    """Cross-entropy of piece frequencies, and the figures of the last evaluation."""
    (start,) = read_metrics(run_dir / "metrics.jsonl", "start")
    row = read_metrics(run_dir / "metrics.jsonl", "evaluation")[-1]
    return start["data"]["unigram_cross_entropy"], {name: row[name] for name in row if name != "time"} | {"kind": 0}


def test_everything_in_a_run_folder_follows_the_umask(finished_run: Path) -> None:
    os.umask(mask := os.umask(0))
    modes = {path.stat().st_mode & 0o777 for path in finished_run.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask}


def test_the_small_modernbert_learns(workshop: Path, tmp_path: Path) -> None:
    corpus = {
        "type": "shards",
        "sources": [{"path": str(workshop / "shards")}],
        "tokenizer": str(workshop / "tokenizer"),
    }
    settings = {"corpus": json.dumps(corpus), "model.vocab_size": 120, "evaluation.every_steps": "null"}
    settings |= {"training.total_steps": 20, "training.train_batch_size": 8, "training.log_every_steps": 1}
    settings |= {"schedule.warmup_steps": 4, "sequences.max_seq_length": 96, "evaluation.num_examples": 8}
    files = ("--run", ROOT / "ds_configs/recipes/modernbert_small.json", "--run_dir", tmp_path / "run")
    changes = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    finished = run(ROOT / "bert_ds/pretrain.py", *files, "--deepspeed_config", ROOT / "ds_configs/zero2.json", *changes)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    made = json.loads((tmp_path / "run/run_config.json").read_text())["model"]
    assert (made["type"], made["num_hidden_layers"], made["hidden_size"]) == ("modernbert", 4, 256)
    found = [loss for _, loss in losses(tmp_path / "run")]
    assert len(found) == 20 and max(found[-4:]) < found[0] - 0.5, found


def test_a_step_can_be_replayed_alone_and_shows_its_examples_and_gradients(workshop: Path, finished_run: Path) -> None:
    before = (finished_run / "metrics.jsonl").read_text()
    # In a machine without bf16 instructions, where a new run would compute in fp32, the run keeps its precision.
    auto, old_machine = ("--set", "training.precision=auto"), {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    replayed = run(*pretrain_command(workshop, finished_run, "--replay_step", 10, *auto), env=old_machine)
    assert "training.precision auto: bf16, as in " in replayed.stdout
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "step 10, batch 10, on the weights of step 8" in replayed.stdout
    part = json.loads(replayed.stdout.split("rank 0 micro-step 0: ")[1].splitlines()[0])
    assert (len(part["example_ids"]), part["not_finite"], len(part["largest_gradients"])) == (8, [], 10)
    assert set(part["loss_shares"]) == {"mlm", "pair"}
    assert (finished_run / "metrics.jsonl").read_text() == before
    described = {
        path: path.read_bytes() for path in (finished_run / "run_config.json", finished_run / "ds_config.json")
    }
    assert json.loads(described[finished_run / "run_config.json"])["training"]["precision"] == "bf16"
    too_early = run(*pretrain_command(workshop, finished_run, "--replay_step", 3, "--set", "optimizer.lr=1"))
    assert too_early.returncode == 4
    assert "holds no whole checkpoint from before step 3" in too_early.stderr
    assert all(path.read_bytes() == text for path, text in described.items())


def test_a_launch_that_does_not_fit_leaves_what_describes_the_run(workshop: Path, finished_run: Path) -> None:
    names = ("run_config.json", "ds_config.json", "tokenizer/vocab.txt")
    before = [(finished_run / name).read_bytes() for name in names]
    refused = run(*pretrain_command(workshop, finished_run, "--resume", "auto", "--set", "training.precision=fp32"))
    assert refused.returncode == 4 and "was saved with precision bfloat16" in refused.stderr
    assert [(finished_run / name).read_bytes() for name in names] == before


def test_the_launcher_trains_two_ranks_and_leaves_a_whole_run_folder(workshop: Path) -> None:
    run_dir = workshop / "runs/two_ranks"
    script, *arguments = pretrain_command(workshop, run_dir)
    path = f"{ROOT / 'tests/light_launcher'}:{os.environ.get('PYTHONPATH', '')}"
    light = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port", 29817)
    launched = run(*launcher, script, *arguments, env=light)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    left = {path.name for path in run_dir.iterdir()}
    wanted = {"run_config.json", "ds_config.json", "environment.json", "metrics.jsonl", "logs", "checkpoints", "DONE"}
    assert wanted <= left
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def test_two_ranks_see_the_batches_of_one(workshop: Path, finished_run: Path) -> None:
    settings = [f"--set={key}" for key in (*WITHOUT_DROPOUT, "training.precision=fp32")]
    alone, together = workshop / "runs/alone", workshop / "runs/together"
    assert run(*pretrain_command(workshop, alone, *settings)).returncode == 0
    launched = run(*pretrain_command(workshop, together, *settings), world_size=2)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    for (step, loss), (same_step, same_loss) in zip(losses(alone), losses(together), strict=True):
        assert step == same_step
        assert same_loss == pytest.approx(loss, rel=2e-5)
    floors, judged = zip(*(evaluated(run_dir) for run_dir in (alone, together)), strict=True)
    assert floors[0] == floors[1] > 1.0
    assert judged[1] == pytest.approx(judged[0], rel=2e-4, abs=1e-6)
    assert judged[0]["mlm_masked_targets"] > 20 and {"perplexity", "mlm_accuracy"}.isdisjoint(judged[0])


def test_a_run_of_two_ranks_continues_on_one_with_the_losses_it_would_have_had(workshop: Path) -> None:
    """Follows the test above, which leaves the finished run of two ranks."""
    together, resized = workshop / "runs/together", workshop / "runs/resized"
    shutil.copytree(together, resized)
    shutil.rmtree(resized / "checkpoints/global_step12")
    (resized / "DONE").unlink()
    settings = [f"--set={key}" for key in (*WITHOUT_DROPOUT, "training.precision=auto")]
    resumed = run(*pretrain_command(workshop, resized, "--resume", "must", *settings))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (resized / "DONE").exists()
    assert "saved by 2 ranks, continuing on 1" in resumed.stdout
    assert '"train_micro_batch_size_per_gpu": 4' in (together / "ds_config.json").read_text()
    assert '"train_micro_batch_size_per_gpu": 8' in (resized / "ds_config.json").read_text()
    for (step, loss), (same_step, same_loss) in zip(losses(together), losses(resized), strict=True):
        assert step == same_step
        assert same_loss == pytest.approx(loss, rel=2e-5)


def test_a_world_size_that_cannot_make_the_global_batch_is_a_config_error_that_names_one_that_can(
    workshop: Path,
) -> None:
    three = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}
    refused = run(*pretrain_command(workshop, workshop / "runs/three", "--resume", "auto"), env=three)
    assert refused.returncode == 2
    assert "is not a multiple of 3 ranks; with 2 or 4 ranks it is" in refused.stderr


def test_a_killed_run_continues_with_the_identical_losses(workshop: Path, finished_run: Path) -> None:
    run_dir = workshop / "runs/killed"
    words = [str(word) for word in pretrain_command(workshop, run_dir, "--resume", "auto")]
    code = (
        "import os, runpy\n"
        "sys.stdout.write = lambda text: os.kill(os.getpid(), 9) if text.startswith('step 7/') else len(text)\n"
        f"sys.argv = {words}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    assert run_text(code).returncode == -signal.SIGKILL
    continued = run(*pretrain_command(workshop, run_dir, "--resume", "must"))
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "resumed from" in continued.stdout
    assert losses(run_dir) == losses(finished_run)


def test_the_export_fills_masks_in_plain_transformers(workshop: Path, finished_run: Path) -> None:
    exported = run(ROOT / "bert_ds/export_hf.py", "--run_dir", finished_run)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    code = (
        f"from transformers import pipeline\nfill = pipeline('fill-mask', model={str(finished_run / 'hf')!r})\n"
        "print(len(fill('the cat sees the [MASK] .')))"
    )
    filled = run_text(code)
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout.strip().splitlines()[-1] == "5"
    loss = evaluated(finished_run)[1]["loss_mlm_masked"]
    card = (finished_run / "hf/README.md").read_text(encoding="utf-8")
    assert f"| held-out text at [MASK] | loss {loss:.3f} nats, accuracy 0." in card


def test_another_run_starts_from_an_export_and_from_a_run(workshop: Path, finished_run: Path) -> None:
    one_step = ("--set", "training.total_steps=1", "--set", "schedule.warmup_steps=0")
    for source in (finished_run, finished_run / "hf"):
        run_dir = workshop / f"runs/from_{source.name}"
        started = run(*pretrain_command(workshop, run_dir, "--init_from", source, *one_step))
        assert started.returncode == 0, started.stdout + started.stderr
        assert losses(run_dir)[0][1] < losses(finished_run)[0][1] - 0.5


def test_a_folder_with_checkpoints_is_not_overwritten(workshop: Path, finished_run: Path) -> None:
    refused = run(*pretrain_command(workshop, finished_run))
    assert refused.returncode == 2
    assert "--resume auto continues it" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_misspelt_setting_ends_with_exit_code_2_and_a_suggestion(workshop: Path) -> None:
    begun = time.monotonic()
    refused = run(*pretrain_command(workshop, workshop / "runs/typo", "--set", "optimizer.learning_rate=1e-3"))
    assert refused.returncode == 2
    assert "optimizer.learning_rate" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (workshop / "runs/typo").exists()
    assert time.monotonic() - begun < 60


def test_damaged_shards_end_with_exit_code_3_and_the_file_s_name(workshop: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (workshop / "shards").iterdir():
        if path.is_file():
            (shards / path.name).write_bytes(path.read_bytes())
    damaged = next(shards.glob("train-*.tokens"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    refused = run(*pretrain_command(workshop, tmp_path / "run", "--set", f"corpus.sources.0.path={shards}"))
    assert refused.returncode == 3, refused.stderr
    assert damaged.name in refused.stderr


def test_a_dry_run_takes_one_step_and_prints_the_memory(workshop: Path) -> None:
    tried = run(*pretrain_command(workshop, workshop / "runs/dry", "--dry_run", "--set", "training.precision=auto"))
    assert tried.returncode == 0, tried.stderr
    assert "GiB at its peak" in tried.stdout
    assert not list((workshop / "runs/dry").glob("checkpoints/*"))


def test_a_precision_that_is_decided_at_the_launch_is_said_and_written_down(workshop: Path) -> None:
    """Follows the test above, which leaves the folder of a run whose recipe says "auto"."""
    run_dir = workshop / "runs/dry"
    log = (run_dir / "logs/rank_0.log").read_text()
    said = re.search(r"training.precision auto: (fp32|bf16); .* GFLOP/s in fp32 and .* in bf16 on 1 threads", log)
    assert said is not None, log
    described = json.loads((run_dir / "run_config.json").read_text())["training"]["precision"]
    effective = json.loads((run_dir / "ds_config.json").read_text())
    assert (described, effective["data_types"]["param_dtype"]) == (said[1], said[1])
    assert effective["bf16"]["enabled"] == (said[1] == "bf16")
