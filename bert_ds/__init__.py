"""Pre-training of BERT-class encoders with DeepSpeed; the command is `bert-ds`.

Three helpers for a notebook are here, and import what they need when they are first asked for:

    bert_ds.load_history("runs/mine")          the rows of a run's log, a pandas frame where pandas is installed
    bert_ds.check("my_run.json", "zero2")      what `bert-ds check_run` says of a recipe
    bert_ds.load_predictor("runs/sst2/hf")     a function from texts to answers, see `bert-ds predict`
"""

__version__ = "0.1.0"

_HELPERS = ("load_history", "check", "load_predictor")


def __getattr__(name: str) -> object:
    if name not in _HELPERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("bert_ds.downstream.notebook"), name)
