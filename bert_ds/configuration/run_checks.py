"""Every check of a recipe that needs more than one section, the DeepSpeed file, or a file the recipe names.

A problem stops the run; a warning is something that works and that the user may not want.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.families.encoder_config import EncoderConfig, other_marks_text
from bert_ds.configuration.families.marks import MARKS
from bert_ds.configuration.families.table import described
from bert_ds.configuration.model_folder import (
    folder_model,
    no_family_text,
    read_json_file,
    tokenizer_problem,
    weights_problem,
)
from bert_ds.configuration.reading.config_problems import Problem, describe
from bert_ds.configuration.recipe.objective_config import objective_problems
from bert_ds.configuration.recipe.run_config import EmbeddedCorpus, RunConfig, ScheduleConfig, ShardCorpus, TrainedRun
from bert_ds.configuration.run_stages import run_stages, stage_problems
from bert_ds.configuration.start_checks import start_problems
from bert_ds.configuration.vector_file import vectors_problem


def recipe_problems(run: RunConfig) -> list[Problem]:
    """Return contradictions inside the recipe."""
    model, sequences, training = run.model, run.sequences, run.training
    problems = stage_problems(run)
    if sequences.max_seq_length > model.max_position_embeddings:
        text = f"{sequences.max_seq_length} is more than model.max_position_embeddings {model.max_position_embeddings}"
        problems.append(Problem("sequences.max_seq_length", text))
    if isinstance(run.corpus, EmbeddedCorpus) and run.corpus.vocab_size != model.vocab_size:
        text = f"{run.corpus.vocab_size} differs from model.vocab_size {model.vocab_size}"
        problems.append(Problem("corpus.vocab_size", text))
    if isinstance(run.corpus, EmbeddedCorpus):
        found = MARKS["bert" if run.corpus.tokenizer_kind == "wordpiece" else "roberta"]
        if found != model.MARKS:
            problems.append(Problem("corpus.tokenizer_kind", other_marks_text(type(model), found.pieces)))
    if sequences.sentence_pair != "none" and model.num_segments == 0:
        text = f'"{sequences.sentence_pair}" wants segments, which {model.family} does not tell apart: wanted "none"'
        problems.append(Problem("sequences.sentence_pair", text))
    elif sequences.sentence_pair not in ("none", *model.learned_pairs):
        wanted = " or ".join(f'"{word}"' for word in (*model.learned_pairs, "none"))
        what = "that learns it" if model.learned_pairs else "for pairs"
        text = f'"{sequences.sentence_pair}" wants a head {what}, which {model.family} has not: wanted {wanted}'
        problems.append(Problem("sequences.sentence_pair", text))
    elif sequences.sentence_pair != "none" and model.num_segments == 1:
        text = f'1 segment is too few for sentence_pair "{sequences.sentence_pair}", wanted 2'
        problems.append(Problem("model.type_vocab_size", text))
    if training.compile and training.kernels == "torch":
        text = 'true wants the Triton kernels, but training.kernels is "torch": wanted "auto" or "triton" there'
        problems.append(Problem("training.compile", text))
    for name, share in training.left_out.items():
        if training.compile and share:
            text = f"true is for layers that all compute, training.{name} is {share}: wanted 0 there"
            problems.append(Problem("training.compile", text))
    problems += start_problems(run)
    pair, is_distilled = sequences.sentence_pair, run.distillation is not None
    problems += objective_problems(run.objectives, model, sentence_pair=pair, is_distilled=is_distilled)
    predictions = run.masking.max_predictions_per_seq
    if predictions is not None and predictions > sequences.max_seq_length:
        text = f"{predictions} is more than sequences.max_seq_length {sequences.max_seq_length}"
        problems.append(Problem("masking.max_predictions_per_seq", text))
    checkpoints = run.checkpoints
    if checkpoints.keep_every_steps is not None and checkpoints.keep_every_steps % (checkpoints.every_steps or 1):
        text = f"{checkpoints.keep_every_steps} is not a multiple of checkpoints.every_steps {checkpoints.every_steps}"
        problems.append(Problem("checkpoints.keep_every_steps", text))
    if checkpoints.keep_every_steps is not None and checkpoints.every_steps is None:
        problems.append(Problem("checkpoints.keep_every_steps", "needs checkpoints.every_steps"))
    return problems + (schedule_problems(run.schedule, training.total_steps) if training.total_steps else [])


def spread_problems(run: TrainedRun, *, stage: int, offloaded: bool) -> list[Problem]:
    """Return what does not compute what it claims, or does not run, at this ZeRO stage: optimizers, compiled layers.

    Args:
        run: the recipe, or a task.
        stage: of the DeepSpeed file.
        offloaded: optimizer state lies on the host.
    """
    optimizer = run.optimizer
    if run.training.compile and stage == 3:
        text = "true at stage 3, whose hooks gather the weights inside of a layer: wanted false, or stage 0, 1 or 2"
        return [Problem("training.compile", text)]
    if optimizer.sharded_fault and stage != 0:
        wrong = f"{optimizer.sharded_fault} at stage {stage}: wanted stage 0, or"
    elif optimizer.runs_on == "host" and not offloaded:
        wrong = "works on the host: wanted zero_optimization.offload_optimizer, or"
    elif optimizer.runs_on == "GPU" and offloaded:
        wrong = "works on the GPU and the state is offloaded: wanted"
    else:
        return []
    return [Problem("optimizer.type", f'"{optimizer.type}" {wrong} {optimizer.replacement}')]


def schedule_problems(schedule: ScheduleConfig, total_steps: int) -> list[Problem]:
    """Return what of a schedule does not fit into a run of total_steps."""
    warmup = schedule.num_warmup_steps(total_steps)
    if warmup > total_steps:
        text = f"{warmup} is more than training.total_steps {total_steps}"
        return [Problem("schedule.warmup_steps", text)]
    decay = round(schedule.decay_fraction * total_steps)
    if schedule.type == "wsd" and warmup + decay > total_steps:
        text = f"{decay} steps of decay and {warmup} of warm-up are more than training.total_steps {total_steps}"
        return [Problem("schedule.decay_fraction", text)]
    return []


def recipe_warnings(run: RunConfig) -> list[str]:
    """Return what works in the recipe and may not be meant."""
    masking, training = run.masking, run.training
    warnings = []
    stages = [stage.run for stage in run_stages(run, BatchSplit(1, 1, 1))]
    expected = max(stage.masking.mlm_probability * stage.max_seq_length for stage in stages)
    if masking.max_predictions_per_seq is not None and masking.max_predictions_per_seq < int(expected):
        warnings.append(
            f"masking.max_predictions_per_seq {masking.max_predictions_per_seq} cuts the {expected:.0f} predictions "
            f"of a full sequence"
        )
    for name, every in (("evaluation", run.evaluation.every_steps), ("checkpoints", run.checkpoints.every_steps)):
        if every is not None and training.total_steps is not None and every > training.total_steps:
            warnings.append(f"{name}.every_steps {every} is more than training.total_steps {training.total_steps}")
    if run.schema_ and "://" not in run.schema_ and not Path(run.schema_).is_file():
        warnings.append(f"$schema: {run.schema_} does not exist here, so that no editor checks the file")
    if masking.word_segmenter == "jieba" and importlib.util.find_spec("jieba") is None:
        warnings.append('masking.word_segmenter is "jieba", which is not installed here: pip install jieba')
    return warnings


def named_files(run: RunConfig) -> tuple[list[Problem], list[str]]:
    """Compare the recipe with the tokenizer, shards and weights it names, as far as they exist here.

    Returns:
        problems, and a warning per file that is not there.
    """
    problems: list[Problem] = []
    missing = []
    checks: list[tuple[str, str | None, Callable[[Path], str | None]]] = [
        ("masking.word_list", run.masking.word_list, lambda path: None),
        ("init_from", run.init_from, lambda path: weights_problem(path, run)),
        ("word_vectors", run.word_vectors, lambda path: vectors_problem(path, width=run.model.embedding_width)),
    ]
    if run.distillation is not None:
        checks.append(("distillation.teacher", run.distillation.teacher, lambda path: _teacher_problem(path, run)))
    if isinstance(run.corpus, ShardCorpus):
        vocab_size = run.model.vocab_size
        checks.append(("corpus.tokenizer", run.corpus.tokenizer, lambda path: tokenizer_problem(path, run.model)))
        for index, source in enumerate(run.corpus.sources):
            where = f"corpus.sources.{index}.path"
            checks.append((where, source.path, lambda path: _manifest_problem(path, vocab_size)))
    for where, name, check in checks:
        if name is None:
            continue
        try:
            if not Path(name).exists():
                missing.append(f"{where}: {name} does not exist here")
                continue
            text = check(Path(name))
        except OSError as error:
            text = f"{describe(name)} cannot be read: {error.strerror}"
        if text is not None:
            problems.append(Problem(where, text))
    return problems + _fingerprint_problems(run.corpus), missing


def teacher_model(run: RunConfig) -> EncoderConfig | None:
    """Return the shape of the model that teaches; None where there is none, or where it is not here."""
    return folder_model(Path(run.distillation.teacher)) if run.distillation is not None else None


def drawn_weights(corpus: ShardCorpus) -> tuple[float, ...]:
    """Return how many times the examples of each source are seen in an epoch, its temperature applied.

    An epoch stays as long as it is: the sum of weight x tokens (multilingual BERT's smoothing, Conneau et al. 2020,
    arXiv 1911.02116). The weights as given where a manifest is not there.
    """
    weights = tuple(source.weight for source in corpus.sources)
    tokens = [_train_tokens(Path(source.path)) for source in corpus.sources]
    if corpus.temperature == 1.0 or not all(tokens):
        return weights
    seen = [weight * (count or 0) for weight, count in zip(weights, tokens, strict=True)]
    drawn = [one ** (1 / corpus.temperature) for one in seen]
    return tuple(share * sum(seen) / sum(drawn) / (count or 1) for share, count in zip(drawn, tokens, strict=True))


def corpus_tokens(run: RunConfig) -> int | None:
    """Return the training tokens of one epoch, weights applied; None where a manifest is not there."""
    if not isinstance(run.corpus, ShardCorpus):
        return None
    total = 0.0
    for source in run.corpus.sources:
        if (tokens := _train_tokens(Path(source.path))) is None:
            return None
        total += tokens * source.weight
    return int(total)


def _train_tokens(shards: Path) -> int | None:
    found = read_json_file(shards / "manifest.json")
    tokens = (found.get("splits", {}).get("train") or {}).get("num_tokens") if isinstance(found, dict) else None
    return tokens if isinstance(tokens, int) else None


def _teacher_problem(folder: Path, run: RunConfig) -> str | None:
    """Say what keeps the model in a folder from teaching this one."""
    content = read_json_file(folder / "config.json")
    if not isinstance(content, dict):
        return f"{folder} holds no config.json: wanted an exported model, for example the hf/ of a run"
    distillation = run.distillation
    assert distillation is not None
    if (found := described(content)) is None:
        return no_family_text(content)
    given = {"embedding_width": found.given.get("embedding_size", found.given.get("hidden_size")), **found.given}
    equal = ["vocab_size"]
    if distillation.init_layers is not None:
        if found.config.LAYERS != run.model.LAYERS:
            return f"init_layers takes layers of a teacher of another family than {run.model.family}"
        fixed = [name for settings in found.config.HF_TYPES.values() for name in settings]
        names = (*run.model.SIZES, "embedding_width", *dict.fromkeys(fixed))
        equal = [name for name in names if name not in ("num_hidden_layers", "embedding_size")]
    elif distillation.hidden_weight:
        equal.append("hidden_size")
    wrong = [
        f"{name} {describe(given.get(name))} (here {getattr(run.model, name)})"
        for name in equal
        if given.get(name) != getattr(run.model, name)
    ]
    if wrong:
        return f"the teacher has {', '.join(wrong)}"
    layers, positions = given.get("num_hidden_layers", 0), given.get("max_position_embeddings", 0)
    if type(layers) is not int or type(positions) is not int:
        return f"the teacher has {describe(layers)} layers and {describe(positions)} positions, wanted whole numbers"
    if distillation.init_layers is not None and max(distillation.init_layers) >= layers:
        return f"the teacher has {layers} layers, init_layers names {max(distillation.init_layers)} (counted from 0)"
    if positions < run.max_seq_length:
        return f"the teacher has {positions} positions, sequences.max_seq_length is {run.max_seq_length}"
    return None


def _manifest_problem(folder: Path, vocab_size: int) -> str | None:
    content = read_json_file(folder / "manifest.json")
    if not isinstance(content, dict):
        return f"{folder} holds no manifest.json of a finished build"
    found = content.get("vocab_size")
    return None if found == vocab_size else f"was built with {describe(found)} pieces, model.vocab_size is {vocab_size}"


def _fingerprint_problems(corpus: EmbeddedCorpus | ShardCorpus) -> list[Problem]:
    if not isinstance(corpus, ShardCorpus):
        return []
    found = {}
    for index, source in enumerate(corpus.sources):
        content = read_json_file(Path(source.path) / "manifest.json")
        if isinstance(content, dict):
            found[index] = content.get("tokenizer_fingerprint")
    return [
        Problem(
            f"corpus.sources.{index}.path", f"was built with another tokenizer than corpus.sources.{min(found)}.path"
        )
        for index, fingerprint in found.items()
        if fingerprint != found[min(found)]
    ]
