"""What a recipe may say of where its weights start: each is said once."""

from __future__ import annotations

from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.recipe.run_config import RunConfig


def start_problems(run: RunConfig) -> list[Problem]:
    """Return contradictions between what weights start from."""
    problems = []
    if run.word_vectors is not None:
        problems += _word_vectors_problems(run)
    if run.distillation is not None and run.distillation.init_layers is not None:
        problems += _init_layers_problems(run, run.distillation.init_layers)
    return problems if run.output_bias == "zeros" else problems + _output_bias_problems(run)


def _output_bias_problems(run: RunConfig) -> list[Problem]:
    found, text = f'"{run.output_bias}"', None
    if run.init_from is not None:
        text = f'{found} and init_from both say where the bias starts: wanted "zeros", or no init_from'
    elif run.distillation is not None and run.distillation.init_layers is not None:
        text = f"{found} and distillation.init_layers, which takes the teacher's head, both say where the bias starts"
    elif not run.model.has_output_bias:
        text = f'{found} wants a bias of the word scores: model.decoder_bias true, or "zeros" here'
    return [Problem("output_bias", text)] if text else []


def _word_vectors_problems(run: RunConfig) -> list[Problem]:
    other = "init_from" if run.init_from is not None else None
    if run.distillation is not None and run.distillation.init_layers is not None:
        other = "distillation.init_layers"
    text = f"both it and {other} say where the word embedding starts: wanted one of them"
    return [Problem("word_vectors", text)] if other else []


def _init_layers_problems(run: RunConfig, init_layers: tuple[int, ...]) -> list[Problem]:
    where, number = "distillation.init_layers", run.model.num_hidden_layers
    if run.init_from is not None:
        return [Problem(where, "both it and init_from say where the weights start: wanted one of them")]
    if len(init_layers) != number:
        text = f"names {len(init_layers)} layers of the teacher, model.num_hidden_layers is {number}"
        return [Problem(where, text)]
    return []
