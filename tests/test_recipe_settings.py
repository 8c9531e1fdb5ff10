"""Each setting that a recipe may hold reaches what it is for: another value makes another run."""

from __future__ import annotations

from typing import Any

import pytest
import test_model_settings
import test_optimizer_settings
from recipe_workshop import RECIPE, Workshop
from settings_walk import Change, observed, setting_paths
from test_model_settings import BERT, FAMILIES, SIZES
from test_optimizer_settings import MOMENTS, OPTIMIZERS, TRUST

from bert_ds.configuration.recipe.run_config import RunConfig

REASONS = {
    "$schema": "for editors",
    "format": "has one value",
    **{
        f"model:{family}.classifier_dropout": "of tasks, which set it: test_task_settings"
        for family in ("albert", "bert", "electra", "roberta")
    },
    "model:distilbert.qa_dropout": "of tasks, which set it: test_task_settings",
    "model:distilbert.seq_classif_dropout": "of tasks, which set it: test_task_settings",
    "model:roberta.type_vocab_size": "has one value",
    "model:modernbert.max_position_embeddings": "a limit alone: sequences.max_seq_length keeps to it",
    "model:modernbert.classifier_pooling": "of tasks: test_families",
    "model:modernbert.classifier_dropout": "of tasks, which set it: test_task_settings",
    "name": "a label: it stands in run_config.json and in the model card of the export",
    "training.kernels": "the same figures by other means: test_kernels_in_training",
    "training.max_minutes": "becomes total_steps by the clock: test_step_budget, test_pretrain_wiring",
    "training.compile": "the same figures by a compiler, on kernels: test_compiled_layers",
    "training.num_workers": "the same batches by other processes: test_loader",
    "checkpoints.asynchronous": "the same checkpoints, written later: test_checkpoint_saver",
    **{
        f"optimizer:{kind}.": "a kernel that is compiled or wants a GPU; no test follows its settings"
        for kind in ("deepspeed_fused_adam", "deepspeed_cpu_adam", "deepspeed_fused_lamb", "apex_fused_lamb")
    },
}
"""Settings, or beginnings of settings, whose change no run here can show, and why."""


def form(kind: str, **settings: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "lr": 5e-3, **settings}}


def moments(kind: str) -> dict[str, Change]:
    """Changes of what every optimizer has."""
    made = {f"optimizer:{kind}.{name}": Change(value, form(kind)) for name, value in MOMENTS.items()}
    return {**made, f"optimizer:{kind}.type": Change("lion" if kind == "adamw" else "adamw", form(kind))}


LAMB = {"bias_correction": False, "grad_averaging": False, "adam_w_mode": False, "use_nvlamb": True}
PLAIN = {"sequences.sentence_pair": "none"}
WORDS = {"masking.whole_word_mask": True}
LISTED = {**WORDS, "masking.word_segmenter": "word_list", "masking.word_list": "words.txt"}
ROUGH = {
    "recovery": {"spike_sigmas": 0.1, "spike_window": 8, "max_bad_steps": 1, "max_rollbacks": 2},
    "schedule": {"type": "constant", "warmup_steps": 0},
    **{"optimizer.lr": 0.1, "checkpoints.every_steps": 9, "training.total_steps": 20},
}
"""A run in which ripples of the loss count as spikes."""
CAREFUL = {"spike_sigmas": 3.0, "spike_window": 9, "max_bad_steps": 3, "max_rollbacks": 0}
TAUGHT = {"distillation": {"teacher": "teacher"}}
WEIGHED = [{"type": "masked_words", "weight": 0.5}, {"type": "sentence_pair", "weight": 2.0}]
STAGE = {"until": 0.25, "max_seq_length": 24, "train_batch_size": 6, "mlm_probability": 0.25}
LENGTH, SHAPED = {"total_steps": 5, "train_batch_size": 6}, {"power": "polynomial", "decay_fraction": "wsd"}
EVALUATED = {"every_steps": 2, "num_examples": 12, "batch_size": 3}
REPLACING = [{"type": "replaced_tokens", "generator_fraction": 0.5}, {"type": "masked_words"}]
REPLACED = {**PLAIN, "objectives": REPLACING, "model.type": "electra", "model.embedding_size": 8}
STAGED = {"stages": [{"until": 0.5, "max_seq_length": 16, "train_batch_size": 8, "mlm_probability": 0.4}]}
EMBEDDED = {
    "corpus": {"type": "embedded", "vocab_size": 400, "max_bytes": 600_000},
    "model.vocab_size": 400,
    "training.total_steps": 1,
    "schedule.warmup_steps": 0,
}
BPE = {**PLAIN, **EMBEDDED, "model.type": "roberta", "corpus.tokenizer_kind": "bpe", "corpus.lowercase": False}


CHANGES = {
    "seed": Change(6),
    "init_from": Change("teacher"),
    "word_vectors": Change("vectors.txt"),
    "output_bias": Change("log_unigram"),
    "model:bert.vocab_size": Change(300, EMBEDDED, {"corpus.vocab_size": 300}),
    "model:bert.norm_position": Change("pre"),
    "model:bert.positions": Change("sinusoid"),
    "model:bert.type": Change("modernbert", PLAIN),
    **{f"model:bert.{name}": Change(value) for name, value in {**SIZES, **BERT}.items() if name != "vocab_size"},
    "model:albert.type": Change("electra", {**PLAIN, "model.type": "albert", "model.embedding_size": 16}),
    **{
        f"model:{family}.type": Change("bert", {**PLAIN, "model.type": family})
        for family in FAMILIES
        if family not in ("albert", "roberta")
    },
    "model:roberta.type": Change("bert", BPE, {"corpus.tokenizer_kind": "wordpiece"}),
    "corpus:embedded.type": Change("shards", EMBEDDED, {"corpus": RECIPE["corpus"], "model.vocab_size": 64}),
    "corpus:embedded.vocab_size": Change(300, EMBEDDED, {"model.vocab_size": 300}),
    "corpus:embedded.lowercase": Change(False, EMBEDDED),
    "corpus:embedded.tokenizer_kind": Change("wordpiece", BPE, {"model.type": "bert"}),
    "corpus:embedded.max_bytes": Change(580_000, EMBEDDED),
    "corpus:embedded.validation_fraction": Change(0.1, EMBEDDED),
    "corpus:shards.type": Change("embedded", also={"corpus": EMBEDDED["corpus"], "model.vocab_size": 400}),
    "corpus:shards.sources.0.path": Change("more"),
    "corpus:shards.sources.0.weight": Change(0.5),
    "corpus:shards.tokenizer": Change("other", code=3),
    "corpus:shards.temperature": Change(9.0, {"corpus.sources": [{"path": "shards"}, {"path": "more"}]}),
    "sequences.max_seq_length": Change(24),
    "sequences.sentence_pair": Change("sop"),
    "sequences.short_seq_prob": Change(0.9),
    "sequences.cross_documents": Change(True, PLAIN),
    "sequences.whole_sentences": Change(False, {**PLAIN, "sequences.short_seq_prob": 0.0}),
    "masking.mlm_probability": Change(0.3),
    "masking.mask_token_fraction": Change(0.2),
    "masking.random_token_fraction": Change(0.0, {"masking.mask_token_fraction": 0.2}),
    "masking.whole_word_mask": Change(True),
    "masking.span_mask": Change(True, {**WORDS, "masking.mlm_probability": 0.4}),
    "masking.word_segmenter": Change("word_list", WORDS, {"masking.word_list": "words.txt"}),
    "masking.word_list": Change("words2.txt", LISTED),
    "masking.max_predictions_per_seq": Change(1),
    "objectives.0.type": Change("sentence_pair", {"objectives": WEIGHED}, {"objectives.1.type": "masked_words"}),
    "objectives.0.weight": Change(0.25, {"objectives": WEIGHED}),
    "objectives.0.generator_fraction": Change(1.0, REPLACED),
    **moments("adamw"),
    **moments("lamb"),
    **{f"optimizer:lamb.{name}": Change(value, form("lamb")) for name, value in TRUST.items()},
    **{f"optimizer:lamb.{name}": Change(value, form("lamb")) for name, value in LAMB.items()},
    "optimizer:lamb.correct_lr": Change(True, form("lamb", bias_correction=False)),
    **{f"optimizer:{kind}.type": Change("adamw", form(kind)) for kind in OPTIMIZERS},
    "schedule.type": Change("constant"),
    "schedule.warmup_steps": Change(1),
    "schedule.warmup_fraction": Change(0.75, {"schedule": {"type": "linear", "warmup_fraction": 0.5}}),
    **{f"schedule.{name}": Change(0.5, {"schedule.type": kind}) for name, kind in SHAPED.items()},
    "schedule.min_lr_fraction": Change(0.5),
    **{f"training.{name}": Change(value) for name, value in LENGTH.items()},
    "training.precision": Change("bf16"),
    "training.gradient_clipping": Change(0.05),
    "training.few_shapes": Change(True),
    "training.layer_drop": Change(0.5),
    "training.stochastic_depth": Change(0.5),
    "training.log_every_steps": Change(3),
    **{f"stages.0.{name}": Change(value, STAGED) for name, value in STAGE.items()},
    **{f"evaluation.{name}": Change(value) for name, value in EVALUATED.items()},
    "checkpoints.every_steps": Change(3),
    "checkpoints.keep_last": Change(1, {"checkpoints.every_steps": 2}),
    "checkpoints.keep_every_steps": Change(2, {"checkpoints": {"every_steps": 1, "keep_last": 1}}),
    **{f"recovery.{name}": Change(value, ROUGH) for name, value in CAREFUL.items()},
    "distillation.teacher": Change("teacher2", TAUGHT),
    **{f"distillation.{name}": Change(1.0, TAUGHT) for name in ("temperature", "mlm_weight", "soft_weight")},
    "distillation.hidden_weight": Change(0.0, TAUGHT),
    "distillation.init_layers": Change([1, 0], TAUGHT),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("recipes"))


def is_excused(path: str) -> bool:
    return any(path == name or (name.endswith(".") and path.startswith(name)) for name in REASONS)


def test_every_setting_of_a_recipe_is_changed_below_or_has_a_reason() -> None:
    paths = set(setting_paths(RunConfig))
    changed_here = {path.replace(".0.", ".") for path in CHANGES}
    elsewhere = {**test_model_settings.CHANGES, **test_optimizer_settings.CHANGES}
    assert {path for path in paths if not is_excused(path)} == changed_here | set(elsewhere)
    assert all(any(path.startswith(name) for path in paths) for name in REASONS)


def test_the_same_recipe_makes_the_same_run(workshop: Workshop) -> None:
    assert observed(workshop.run({})) == observed(workshop.run({"name": "again"}))


@pytest.mark.parametrize("path", CHANGES)
def test_another_value_of_a_recipe_s_setting_makes_another_run(path: str, workshop: Workshop) -> None:
    change = CHANGES[path]
    before = observed(workshop.run(change.base))
    after = observed(workshop.run({**change.base, path: change.value, **change.also}, code=change.code))
    assert before != after
