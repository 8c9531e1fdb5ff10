"""A recipe of one's own: what is chosen for a corpus, a machine and a time, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from config_cases import RECIPE, changed, write_json
from corpus_fixtures import random_documents, tiny_unigram, write_shards

import bert_ds.init
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config, load_pair
from bert_ds.configuration.reading.config_files import ConfigError, shipped_file
from bert_ds.configuration.recipe.run_config import load_run_config
from bert_ds.configuration.run_choice import (
    SIZES,
    Choice,
    Speed,
    choose,
    enough_tokens,
    modern_model,
    on_card,
    on_cpu,
    useful_tokens,
)
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.configuration.run_size import optimizer_flops
from bert_ds.configuration.run_speed import CARDS, step_times
from bert_ds.training.launch import launch_precision

BASE = {"name": "mine", "model": {"vocab_size": 8192}, "corpus": {"type": "embedded", "vocab_size": 8192}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_shards(folder / "shards", random_documents(60), random_documents(20, seed=1))
    return folder / "shards"


def made(folder: Path, corpus: Path, *words: object) -> dict[str, Any]:
    """Run the verb for an H100 and return the file that it has written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["init.py", str(folder / "my.json"), "--corpus", str(corpus), *map(str, words)])
        bert_ds.init.main()
    return json.loads((folder / "my.json").read_text())


def at_speed(tokens_per_s: float) -> Any:
    """A machine that computes so many tokens of the smallest size a second, and others in proportion."""

    def measure(plan: RunPlan) -> Speed:
        flops = plan.flops_per_token(64)
        return Speed(plan.max_tokens_per_step * flops / (4e6 * tokens_per_s), 0.0)

    return measure


def chosen(minutes: float, *, base: dict[str, Any] = BASE, measure: Any = None) -> Choice:
    measure = measure or at_speed(20_000)
    return choose(base, load_ds_config("zero1"), minutes=minutes, measure=measure, world_size=1)


def test_a_family_takes_the_tokenizer_of_the_corpus_or_is_refused(tmp_path: Path) -> None:
    documents = random_documents(60), random_documents(20, seed=1)
    shards = write_shards(tmp_path / "shards", *documents, tokenizer=tiny_unigram())
    with pytest.raises(ConfigError, match=r"<mask>, ModernBERT wants \[PAD\]"):
        made(tmp_path, shards, "--hours", 2, "--gpu", "H100")
    assert not (tmp_path / "my.json").exists()
    content = made(tmp_path, shards, "--hours", 2, "--gpu", "H100", "--from", "roberta_base")
    assert content["model"]["type"] == "roberta"


def test_the_recipe_is_valid_where_it_lies_and_names_what_it_was_made_for(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = made(tmp_path, corpus, "--hours", 2, "--gpu", "H100", "--world_size", 4)
    run, ds = load_pair(tmp_path / "my.json", "zero1")
    assert (run.name, run.model.vocab_size, run.training.max_minutes) == ("my", 1000, 120.0)
    assert run.corpus.sources[0].path == str(corpus) and run.corpus.tokenizer == str(corpus / "tokenizer")
    assert not Path(content["corpus"]["sources"][0]["path"]).is_absolute()
    assert Path(content["$schema"]) == shipped_file("schema.json")
    assert run.training.train_batch_size % 4 == 0
    assert (run.model.family, run.optimizer.type, run.masking.mask_token_fraction) == ("modernbert", "muon", 1.0)
    assert make_plan(run, ds, 4).warnings == () and not run.training.few_shapes
    said = capsys.readouterr()
    assert "120 minutes at about" in said.out and "4 H100, counted from data sheets" in said.out
    assert "the run reads its corpus" in said.err and "times: more text is wanted" in said.err


def test_the_size_is_the_largest_whose_weights_see_enough_tokens() -> None:
    sizes = {layers_hidden[:2]: index for index, layers_hidden in enumerate(SIZES)}
    places = []
    for minutes in (5, 60, 600, 6000):
        found = chosen(minutes)
        model = found.plan.run.model
        places.append(sizes[model.num_hidden_layers, model.hidden_size])
        assert found.num_steps == int(60 * minutes / found.speed.step_s)
        assert useful_tokens(found) == found.tokens >= enough_tokens(found) * found.weights
        larger = chosen(minutes, base={**BASE, "model": {**model_of(SIZES[places[-1] + 1]), "vocab_size": 8192}})
        assert larger.tokens < enough_tokens(larger) * larger.weights
    assert places == sorted(set(places))


def model_of(size: tuple[int, int, int]) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size")
    shape = dict(zip(names, size, strict=True))
    return {"type": "modernbert", **shape, "num_attention_heads": size[1] // 64, "max_position_embeddings": 512}


def test_evaluations_are_of_the_time_and_a_batch_is_one_of_all_ranks() -> None:
    def slow(plan: RunPlan) -> Speed:
        return Speed(0.01, 30.0)

    found = choose(BASE, load_ds_config("zero1"), minutes=5, measure=slow, world_size=3)
    assert found.num_steps == (300 - 4 * 30) / 0.01
    assert found.plan.run.training.train_batch_size % 3 == 0


def test_batch_length_and_rate_follow_from_the_time() -> None:
    short, long = chosen(5).plan.run, chosen(6000).plan.run
    assert (short.max_seq_length, long.max_seq_length) == (64, 128)
    assert short.training.train_batch_size * 64 < long.training.train_batch_size * 128
    assert short.optimizer.lr == 0.004 > long.optimizer.lr
    assert not short.sequences.whole_sentences and not long.sequences.whole_sentences
    near = (True,) * (short.model.num_hidden_layers - 1) + (False,)
    assert (short.model.has_window, short.model.window, short.model.global_rope_theta) == (near, 4, 1000.0)
    assert (long.model.layer_types, long.model.window, long.model.global_rope_theta) == (None, 64, 160_000.0)
    assert chosen(5).num_steps == pytest.approx(1500, rel=0.5)


def test_narrow_matrices_begin_larger() -> None:
    found = [modern_model(size, 1_000_000)["initializer_range"] for size in SIZES]
    assert found == [0.071, 0.058, 0.05, 0.041, 0.035, 0.029, 0.029, 0.025]


def test_short_sequences_among_long_ones_are_made_of_whole_sentences() -> None:
    sequences = {"short_seq_prob": 0.1, "cross_documents": False}
    assert chosen(5, base={**BASE, "sequences": sequences}).plan.run.sequences.whole_sentences


def test_a_corpus_that_is_read_again_and_again_teaches_no_larger_model(corpus: Path) -> None:
    shards = {"type": "shards", "sources": [{"path": str(corpus)}], "tokenizer": str(corpus / "tokenizer")}
    base = {"name": "mine", "model": {"vocab_size": 1000}, "corpus": shards}
    found, embedded = chosen(600, base=base), chosen(600)
    assert found.epochs > 40 and found.weights < embedded.weights
    assert useful_tokens(found) == 40 * found.plan.corpus_tokens


def test_the_speed_of_a_card_is_that_of_check_run_and_of_a_cpu_a_share_of_its_products() -> None:
    plan = chosen(60).plan
    card = CARDS["H100"]
    assert on_card(card)(plan).step_s == max(times.step for times in step_times(plan, card))
    speed = on_cpu(lambda run: 1e11)(plan)
    length = plan.run.max_seq_length
    work = plan.flops_per_token(length) * plan.max_tokens_per_step
    assert speed.step_s == pytest.approx((work + optimizer_flops(plan.run)) / 1e11)
    assert speed.evaluation_s == pytest.approx(plan.flops_per_token(length) * 1024 * length / 3 / 1e11)


def test_the_cores_are_measured_once_for_each_width_in_the_precision_that_a_launch_would_take() -> None:
    measure = bert_ds.init.cpu_measure()
    small, again, wide = chosen(5).plan, chosen(30).plan, chosen(6000).plan
    assert small.run.model.hidden_size != wide.run.model.hidden_size
    assert 0 < measure(small).step_s == measure(small).step_s
    assert 0 < measure(again).step_s < measure(wide).step_s


def test_the_cores_are_taken_at_the_speed_of_the_precision_that_the_recipe_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates = launch_precision.GemmRates(fp32=1e9, bf16=9e9)
    monkeypatch.setattr(launch_precision, "gemm_rates", lambda model: rates)
    seconds = {}
    for precision in ("fp32", "auto"):
        plan = chosen(5, base={**BASE, "training": {"precision": precision}}).plan
        seconds[precision] = bert_ds.init.cpu_measure()(plan).step_s
    assert seconds["fp32"] / seconds["auto"] == pytest.approx(0.67 * 9e9 / (1.1 * 1e9))


def test_a_shipped_recipe_keeps_its_network_and_objective_and_gets_a_batch_that_suits_the_time(
    tmp_path: Path, corpus: Path
) -> None:
    content = made(tmp_path, corpus, "--from", "bert_base", "--hours", 3, "--gpu", "A100")
    shipped = json.loads(shipped_file("recipes/bert_base_phase1.json").read_text())
    assert content["model"]["hidden_size"] == 768 and content["model"]["vocab_size"] == 1000
    assert content["optimizer"]["type"] == "lamb" and content["sequences"]["sentence_pair"] == "nsp"
    batch, full = content["training"]["train_batch_size"], shipped["training"]["train_batch_size"]
    assert batch < full and full % batch == 0
    assert content["optimizer"]["lr"] == pytest.approx(shipped["optimizer"]["lr"] * (batch / full) ** 0.5, rel=0.05)
    assert content["schedule"]["warmup_fraction"] == shipped["schedule"]["warmup_fraction"]
    of_original = bert_ds.init._of_recipe("bert_original")["schedule"]
    assert of_original["warmup_fraction"] == 0.0111 and "warmup_steps" not in of_original
    assert content["training"]["max_minutes"] == 180 and "total_steps" not in content["training"]
    load_run_config(tmp_path / "my.json")


@pytest.mark.parametrize("base", [None, "bert_base"])
def test_a_recipe_for_the_cores_here_fills_up_to_few_shapes(
    base: str | None, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bert_ds.init, "cpu_measure", lambda: at_speed(20_000))
    made(tmp_path, corpus, *(("--from", base) if base else ()), "--minutes", 30)
    assert load_run_config(tmp_path / "my.json").training.few_shapes


@pytest.mark.parametrize(("has_head", "pair"), [(True, "nsp"), (False, "none")])
def test_the_shape_of_a_folder_comes_with_the_pairs_that_it_has_a_head_for(
    has_head: bool, pair: str, tmp_path: Path, corpus: Path
) -> None:
    from export_cases import CONFIG, export, spread_state_dict, write_tokenizer

    export(tmp_path / "hf", write_tokenizer(tmp_path / "t"), spread_state_dict(has_pair_head=has_head), pair)
    content = made(tmp_path, corpus, "--like", tmp_path / "hf", "--gpu", "H100")
    assert content["sequences"]["sentence_pair"] == pair
    run = load_run_config(tmp_path / "my.json")
    assert run.model.hidden_size == CONFIG.hidden_size and run.model.vocab_size == 1000
    assert run.max_seq_length <= CONFIG.max_position_embeddings


def test_what_cannot_be_is_one_sentence_and_touches_nothing(tmp_path: Path, corpus: Path) -> None:
    other = tmp_path / "other"
    write_shards(other, random_documents(8), random_documents(4))
    (other / "manifest.json").unlink()
    from export_cases import write_tokenizer

    cases: list[tuple[type[Exception], str, tuple[object, ...]]] = [
        (DataError, "holds no manifest.json of a finished build: bert-ds build_shards makes", ("--corpus", other)),
        (DataError, "is not the one that", ("--tokenizer", write_tokenizer(tmp_path / "t"))),
        (ConfigError, "--like .*nope: there is no such folder", ("--like", tmp_path / "nope")),
        (ConfigError, 'did you mean "bert_base_zh"', ("--from", "bert_bas_zh")),
        (ConfigError, "1e-05 minutes are too few: 50 steps and 4 evaluations of the smallest", ("--minutes", 1e-5)),
    ]
    for kind, text, words in cases:
        with pytest.raises(kind, match=text):
            made(tmp_path, corpus, "--gpu", "H100", *words)
    with pytest.raises(SystemExit):
        made(tmp_path, corpus, "--gpu", "H100", "--minutes", 0)
    assert not (tmp_path / "my.json").exists()
    with pytest.raises(DataError, match=r"my\.json cannot be written: No such file or directory"):
        made(tmp_path / "nowhere", corpus, "--gpu", "H100")
    (tmp_path / "my.json").write_text("mine")
    with pytest.raises(ConfigError, match="is there already, and nothing was touched"):
        made(tmp_path, corpus, "--gpu", "H100")
    assert (tmp_path / "my.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("steps", "text"),
    [(1, "the run reads 0."), (40_000_000, "times: more text is wanted, or fewer steps"), (2_000, None)],
)
def test_check_run_warns_of_epochs_that_nobody_means(
    steps: int, text: str | None, tmp_path: Path, corpus: Path
) -> None:
    shards = {"type": "shards", "sources": [{"path": str(corpus)}], "tokenizer": str(corpus / "tokenizer")}
    recipe = changed(changed(RECIPE, "corpus", shards), "model.vocab_size", 1000)
    recipe = changed(changed(recipe, "training.total_steps", steps), "training.train_batch_size", 2)
    recipe = changed(changed(recipe, "schedule.warmup_steps", 0), "sequences", {"max_seq_length": 16})
    plan = make_plan(*load_pair(write_json(tmp_path, "run.json", recipe), "zero1"), 1)
    assert [one for one in plan.warnings if "the run reads" in one and (text or "") in one] == (
        [] if text is None else [one for one in plan.warnings if "reads" in one]
    )
    assert bool([one for one in plan.warnings if "reads" in one]) == (text is not None)


def test_check_run_warns_of_a_schema_that_is_not_there(tmp_path: Path) -> None:
    def warnings(schema: str) -> list[str]:
        path = write_json(tmp_path, "run.json", {"$schema": schema, **RECIPE})
        return [one for one in make_plan(*load_pair(path, "zero1"), 1).warnings if one.startswith("$schema")]

    assert warnings("../nowhere.json")[0].startswith(f"$schema: {tmp_path.parent}/nowhere.json does not exist here")
    assert warnings(str(shipped_file("schema.json"))) == warnings("https://example.org/schema.json") == []
