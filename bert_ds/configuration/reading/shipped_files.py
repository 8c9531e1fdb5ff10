"""Files that a person names in one word: the recipes, tasks and DeepSpeed files of ds_configs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from bert_ds.configuration.reading.config_files import ConfigError, shipped_file
from bert_ds.configuration.reading.config_problems import did_you_mean, found_wanted, one_of

Kind = Literal["recipe", "task", "DeepSpeed file"]
_SHIPPED: dict[Kind, tuple[str, str, str]] = {
    "recipe": ("--run", "recipes", "*.json"),
    "task": ("--task", "tasks", "*.json"),
    "DeepSpeed file": ("--deepspeed_config", ".", "zero*.json"),
}
"""Option that names it, folder of ds_configs, files."""


def named_file(name: str | Path, kind: Kind) -> Path:
    """Return the file that a person means: by its path, or one of ds_configs by its bare name.

    Args:
        name: as in "my_run.json", "bert_base_phase1" or "zero2".
        kind: what it is.

    Raises:
        ConfigError: a bare name that nothing has; the message lists the names and the nearest one.
    """
    option, folder, pattern = _SHIPPED[kind]
    if "/" in str(name) or str(name).endswith(".json"):
        return Path(name)
    shipped = {path.stem: path for path in sorted((shipped_file("zero1.json").parent / folder).glob(pattern))}
    if str(name) in shipped:
        return shipped[str(name)]
    if Path(name).exists():
        return Path(name)
    wanted = f"{one_of(shipped)} or a file"
    raise ConfigError(f"{option}: {found_wanted(str(name), wanted)}{did_you_mean(name, shipped)}")
