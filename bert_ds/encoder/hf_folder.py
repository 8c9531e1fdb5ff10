"""Hugging Face model folders: write one, and read one without executing anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bert_ds.basics import input_gate
from bert_ds.basics.input_gate import open_regular, read_text, refuse_link_out
from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.basics.tensor_files import load_tensor_file
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.hf_mapping import model_config_from_hf

_TOKENIZER_KEYS = (
    *("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space"),
    *("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"),
)
"""What of tokenizer_config.json goes into an export; a key such as auto_map would make others run code."""
_CODE_KEYS = ("auto_map", "custom_pipelines")
"""What of a foreign config.json names code or files of a hub."""
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


_LIBRARY = ("---", "library_name: transformers")
_PREDICTS, _DETECTS = (*_LIBRARY, "pipeline_tag: fill-mask"), _LIBRARY
_PREDICTED = (
    "```python",
    "from transformers import pipeline",
    'fill_mask = pipeline("fill-mask", model="path/to/this/folder")',
    'print(fill_mask(f"The function returns a new {fill_mask.tokenizer.mask_token}."))',
    "```",
    "",
    "Index 0 of the pair classifier, where there is one, means: b follows a (nsp), or a and b are in order (sop).",
)
_DETECTED = (
    "The discriminator, which tells replaced tokens (scores above 0); generator/ is the model of masked words.",
    "",
    "```python",
    "from transformers import AutoTokenizer, ElectraForPreTraining",
    'folder = "path/to/this/folder"',
    'tokens = AutoTokenizer.from_pretrained(folder)("The function returns a new banana.", return_tensors="pt")',
    "print(ElectraForPreTraining.from_pretrained(folder)(**tokens).logits > 0)",
    "```",
)
"""Lines of a model card."""


class HfModel(NamedTuple):
    """A Hugging Face folder as read: our model section, and its tensors under the names they have in the file."""

    config: EncoderConfig
    tensors: dict[str, Tensor]


def load_hf_folder(folder: Path, *, pad_vocab_size_to_multiple_of: int = 64) -> HfModel:
    """Read config.json and the weights, safetensors before pytorch_model.bin, each in one file or in several.

    Nothing is executed: a .bin file is unpickled with weights_only.

    Raises:
        ConfigError: config.json is missing, unreadable, or no encoder that this model can be.
        CheckpointError: the weights are missing, unreadable, or hold a value that is not finite.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} has no config.json: wanted the Hugging Face folder of an encoder")
    try:
        facts = read_json(folder / "config.json")
        config = model_config_from_hf(facts, pad_vocab_size_to_multiple_of=pad_vocab_size_to_multiple_of)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    found = [folder / name for name in _WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has no weights: wanted one of {', '.join(_WEIGHT_FILES)}")
    tensors: dict[str, Tensor] = {}
    for path in _weight_parts(found[0]):
        tensors.update(_read_tensors(path))
    refuse_broken_tensors(tensors, where=str(found[0]))
    return HfModel(config, tensors)


def refuse_broken_tensors(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise CheckpointError naming every tensor that is empty or holds NaN or infinity."""
    problems = [
        f"{name} is empty, shape {list(tensor.shape)}" for name, tensor in tensors.items() if not tensor.numel()
    ]
    problems += [
        f"{name} has {int((~torch.isfinite(tensor)).sum())} values that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if problems:
        raise CheckpointError(f"{where}: " + "; ".join(problems))


def write_hf_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: Path,
    model_card: str,
    max_length: int | None = None,
) -> None:
    """Write config.json, model.safetensors, the tokenizer's files and README.md into an existing folder.

    Args:
        folder: where to; see `replaced_export`.
        config: content of config.json, from `hf_config`.
        tensors: fp32, from `to_hf`.
        tokenizer: folder with tokenizer.json and tokenizer_config.json; of WordPiece with vocab.txt.
        model_card: text of README.md, from `model_card_text`.
        max_length: tokens, special ones included, that `truncation=True` cuts to; None is all that the model has
            positions for.

    Raises:
        CheckpointError: a tensor is empty or not finite.
        DataError: a file of the tokenizer is missing.
        OSError: a file cannot be written.
    """
    refuse_broken_tensors(tensors, where=f"export to {folder}")
    files = _tokenizer_files(tokenizer)
    if missing := [name for name in (*files, "tokenizer_config.json") if not (tokenizer / name).is_file()]:
        raise DataError(f"tokenizer folder {tokenizer} lacks {', '.join(missing)}")
    write_json(folder / "config.json", config)
    try:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # the tensors are sound: it is the disk
        raise OSError(f"model.safetensors: {error}") from None
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it for its owner alone
    for name in files:
        copy_member(tokenizer / name, folder / name)
    # Without these, transformers makes no [CLS] and [SEP], or lets 600 tokens run into an index error.
    facts = {
        "tokenizer_class": "BertTokenizer" if len(files) > 1 else "PreTrainedTokenizerFast",
        "model_max_length": max_length or model_config_from_hf(config).max_position_embeddings,
        "model_input_names": _input_names(config),
    }
    kept = harmless_tokenizer_facts(read_json(tokenizer / "tokenizer_config.json"))
    write_json(folder / "tokenizer_config.json", {**kept, **facts})
    (folder / "README.md").write_text(model_card, encoding="utf-8")


def harmless_tokenizer_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a tokenizer_config.json goes into an export: nothing by which others would run code."""
    return {name: found[name] for name in _TOKENIZER_KEYS if name in found}


def harmless_config(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the keys that name code: auto_map, custom_pipelines and all that begin with "_"."""
    return {name: value for name, value in found.items() if name not in _CODE_KEYS and not name.startswith("_")}


def special_ids(tokenizer: Path) -> dict[str, int]:
    """Return the ids of "pad", "cls" and "sep" of a tokenizer folder; DataError where it has none of them."""
    path, facts = tokenizer / _tokenizer_files(tokenizer)[-1], tokenizer / "tokenizer_config.json"
    if path.name == "vocab.txt":
        pieces = read_text(path, error=DataError).split("\n") if path.exists() else []
        ids = {piece: index for index, piece in reversed(list(enumerate(pieces)))}
    else:
        vocab = read_json(path)["model"].get("vocab") or {}
        ids = {row[0]: index for index, row in enumerate(vocab)} if isinstance(vocab, list) else vocab
    told = read_json(facts) if facts.is_file() else {}
    names = {name: str(told.get(f"{name}_token", f"[{name.upper()}]")) for name in ("pad", "cls", "sep")}
    for piece in names.values():
        if piece not in ids:
            raise DataError(f"{path} has no piece {piece}: wanted the vocabulary of a tokenizer with special pieces")
    return {name: ids[piece] for name, piece in names.items()}


def model_card_text(name: str, config: EncoderConfig, facts: Mapping[str, object], *, detects: bool = False) -> str:
    """Return README.md: what the model is, how to load it, and the run's facts as a table.

    Args:
        name: of the run.
        config: of the encoder.
        facts: of the run, name to value.
        detects: it is a discriminator, with its generator beside it.
    """
    rows = [f"| {key} | {str(value).replace('|', '/').replace(chr(10), ' ')} |" for key, value in facts.items()]
    lines = [
        *(_DETECTS if detects else _PREDICTS),
        f"tags: [{config.family}{'' if detects else ', fill-mask'}]",
        "---",
        f"# {name}",
        "",
        f"A {config.TITLE} encoder pre-trained from scratch.",
        "",
        *(_DETECTED if detects else _PREDICTED),
        "",
        "| fact | value |",
        "|---|---|",
        *rows,
        "",
    ]
    return "\n".join(lines)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder; ConfigError when it is something else or lies elsewhere."""
    refuse_link_out(path, error=ConfigError)
    value = input_gate.read_json(path, error=ConfigError)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def copy_member(source: Path, target: Path) -> None:
    """Copy a file of a model folder; ConfigError where it is no regular file or lies elsewhere."""
    refuse_link_out(source, error=ConfigError)
    with open_regular(source, error=ConfigError) as content, target.open("wb") as copy:
        shutil.copyfileobj(content, copy)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file as the exports have them."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_files(tokenizer: Path) -> tuple[str, ...]:
    """Return the files of a vocabulary: WordPiece has it in vocab.txt too."""
    path = tokenizer / "tokenizer.json"
    model = read_json(path).get("model") if path.is_file() else None
    kind = model.get("type") if isinstance(model, dict) else None
    return ("tokenizer.json",) if kind in ("BPE", "Unigram") else ("tokenizer.json", "vocab.txt")


def _input_names(config: Mapping[str, Any]) -> list[str]:
    """Return what a tokenizer gives; without the last name it gives segments to a model that takes none."""
    segments = ["token_type_ids"] if model_config_from_hf(config).num_segments else []
    return ["input_ids", *segments, "attention_mask"]


def _weight_parts(path: Path) -> list[Path]:
    """Return the files that an index names, or the one file itself."""
    if path.suffix != ".json":
        return [path]
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names the file {name!r}, which is not in its folder")
    return [path.parent / name for name in names]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    refuse_link_out(path, error=CheckpointError)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
    tensors = load_tensor_file(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is not a table of tensors")
    return tensors
