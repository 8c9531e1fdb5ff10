"""What folders of models say of themselves without torch: an encoder's Hugging Face folder, or a run's.

What a person gives in its place is named: a run folder, a name of the hub, a folder that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bert_ds.basics.input_gate import MAX_JSON_BYTES, open_regular, read_json, read_text, split_lines
from bert_ds.configuration.families.encoder_config import EncoderConfig, other_marks_text
from bert_ds.configuration.families.marks import MARKS
from bert_ds.configuration.families.table import FAMILY_CONFIGS, HF_FAMILIES, described
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import describe, did_you_mean, one_of
from bert_ds.configuration.recipe.run_config import RunConfig

GENERATOR_FOLDER = "generator"
"""In the folder of an exported discriminator: the model of masked words that replaced tokens for it."""
_RUN_FILES = ("run_config.json", "task_config.json", "bert_ds_folder.json")


def folder_model(folder: Path) -> EncoderConfig | None:
    """Return the shape of the model of a Hugging Face folder; None where there is none, or of no family here."""
    content = read_json_file(folder / "config.json")
    if not isinstance(content, dict):
        return None
    found = described(content)
    if found is None:
        return None
    # With all that a plan may count, or where a setting is none of ours with the sizes alone.
    for names in (found.config.model_fields, found.config.SIZES):
        try:
            given = {name: found.given[name] for name in names if name in found.given}
            return found.config.model_validate_json(json.dumps(given))
        except ValidationError:
            continue
    return None


def folder_problem(folder: Path) -> str | None:
    """Say what keeps a folder from being the Hugging Face folder of an encoder; None where nothing does.

    The text goes on behind the folder's name.
    """
    if not folder.exists():
        return _absent_text(folder)
    if any((folder / name).is_file() for name in _RUN_FILES) and not (folder / "config.json").is_file():
        exports = [path for path in (folder / "hf", *sorted(folder.glob("*/hf"))) if any(path.glob("**/config.json"))]
        if exports:
            return f" is a run folder, not a model: did you mean {exports[0]}?"
        return f" is a run folder without an export: bert-ds export_hf --run_dir {folder} makes {folder / 'hf'}"
    if not (folder / "config.json").is_file() and not any(folder.glob("*/config.json")):
        return " has no config.json: wanted the Hugging Face folder of an encoder"
    return None


def require_model_folder(folder: Path) -> None:
    """Raise ConfigError unless this is the Hugging Face folder of an encoder."""
    if (text := folder_problem(folder)) is not None:
        raise ConfigError(f"--model {folder}{text}")


def weights_problem(folder: Path, run: RunConfig) -> str | None:
    """Say what keeps the weights of a Hugging Face folder or of a run from being those that a recipe starts from."""
    model, recipe = run.model, read_json_file(folder / "run_config.json")
    content = recipe.get("model") if isinstance(recipe, dict) else read_json_file(folder / "config.json")
    if not isinstance(content, dict):
        return f"{folder} holds neither config.json nor run_config.json"
    if (found := described(content)) is None:
        return no_family_text(content)
    if found.config is not type(model):
        name = found.config.model_fields["type"].default
        return f'the weights are of the family "{name}", model.type is "{model.family}"'
    fixed = dict.fromkeys(name for settings in model.HF_TYPES.values() for name in settings)
    wrong = [
        f"{name} {describe(found.given[name])} (here {getattr(model, name)})"
        for name in (*model.SIZES, *fixed)
        if name in found.given and found.given[name] != getattr(model, name)
    ]
    if wrong:
        return f"the weights have {', '.join(wrong)}"
    if run.sequences.sentence_pair != "none" and not has_pair_head(folder, recipe):
        return f"{folder} has no head for sentence pairs: wanted sequences.sentence_pair=none"
    is_structure = isinstance(recipe, dict) and _pair_of(recipe) == "structure"
    if run.sequences.pair_classes and (run.sequences.pair_classes == 3) != is_structure:
        text = f"the head of {folder} tells {3 if is_structure else 2} kinds of pairs apart"
        return f'{text}, sequences.sentence_pair "{run.sequences.sentence_pair}" wants another'
    if any(one.type == "replaced_tokens" for one in run.objectives or ()) and not has_generator(folder, recipe):
        return f"{folder} has no generator: wanted the run or the export of one that learned replaced_tokens"
    return None


def has_generator(folder: Path, recipe: Any = None) -> bool:
    """Whether a run learned replaced tokens, or the folder of a discriminator has its generator in it."""
    if not isinstance(recipe, dict):
        return (folder / GENERATOR_FOLDER / "config.json").is_file()
    listed = recipe.get("objectives")
    types = [one.get("type") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return "replaced_tokens" in types


def tokenizer_problem(folder: Path, model: EncoderConfig) -> str | None:
    """Say what keeps a tokenizer folder from being the one of a model; None where nothing does."""
    ids = _piece_ids(folder)
    if ids is None:
        return f"{folder} holds neither vocab.txt nor tokenizer.json"
    return special_pieces_problem(model, ids) or _vocab_text(len(ids), model.vocab_size)


def special_pieces_problem(model: EncoderConfig, ids: Mapping[Any, Any]) -> str | None:
    """Say what keeps a vocabulary from having the special pieces that a model wants; None where nothing does.

    Args:
        model: of a recipe.
        ids: of the vocabulary, by piece.
    """
    others = max(MARKS.values(), key=lambda marks: sum(piece in ids for piece in marks.pieces))
    if others != model.MARKS and others.cls in ids:
        return other_marks_text(type(model), others.pieces)
    pad, wanted = ids.get(model.MARKS.pad), getattr(model, "pad_token_id", None)
    if wanted is not None and pad is not None and pad != wanted:
        return f"{model.MARKS.pad} has the id {describe(pad)}, model.pad_token_id is {wanted}"
    return None


def _piece_ids(folder: Path) -> dict[Any, Any] | None:
    """Return the ids of the pieces in vocab.txt or tokenizer.json; None where there is neither."""
    try:
        lines = split_lines(read_text(folder / "vocab.txt"))
        return {line: index for index, line in enumerate(lines) if line}
    except ValueError:
        content = read_json_file(folder / "tokenizer.json")
    model = content.get("model") if isinstance(content, dict) else None
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, list):
        return {str(row[0]): index for index, row in enumerate(pieces) if isinstance(row, list) and row}
    return pieces if isinstance(pieces, dict) else None


def _vocab_text(found: int, vocab_size: int) -> str | None:
    return None if found == vocab_size else f"holds {found} pieces, model.vocab_size is {vocab_size}"


def has_pair_head(folder: Path, recipe: Any = None) -> bool:
    """Whether weights have the head for sentence pairs, as far as that is known without torch: true where it is not."""
    if isinstance(recipe, dict):
        return _pair_of(recipe) != "none"
    try:
        with open_regular(folder / "model.safetensors") as file:
            size = int.from_bytes(file.read(8), "little")
            names = b"" if size > MAX_JSON_BYTES else file.read(size)
        return not names or any(config.PAIR_HEAD.encode() in names for config in FAMILY_CONFIGS.values())
    except (OSError, ValueError):
        return True


def _pair_of(recipe: dict[str, Any]) -> Any:
    """Return what a recipe says of pairs."""
    return (recipe.get("sequences") or {}).get("sentence_pair", "nsp")


def no_family_text(content: dict[str, Any]) -> str:
    """Say that a config.json is of no family that we have."""
    return f"model_type is {describe(content.get('model_type'))}, wanted {one_of(HF_FAMILIES)}"


def read_json_file(path: Path) -> Any:
    """Return the content of a JSON file; None where there is none or it is damaged."""
    try:
        return read_json(path)
    except ValueError:
        return None


def near_folder(folder: Path) -> str:
    """Return '; did you mean "x"?' for the folder whose name is like that of one that is not there, or nothing."""
    beside = folder.absolute().parent
    try:
        names = [path.name for path in beside.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        names = []
    return did_you_mean(folder.name, names)


def _absent_text(folder: Path) -> str:
    if near := near_folder(folder):
        return f": there is no such folder{near}"
    return (
        ": there is no such folder; names of the Hugging Face hub are not looked up, a model from there is downloaded "
        "first (hf download NAME --local-dir FOLDER)"
    )
