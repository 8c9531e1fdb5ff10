"""An ONNX file of a Hugging Face folder, proven by running it in onnxruntime beside transformers.

torch's own exporter writes the graph of transformers' model, with batch and length as free axes. Tokenizer and
config.json are copied beside it, so that the folder is all a server needs.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.families.family import RoleName
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.hf_folder import (
    copy_member,
    harmless_config,
    harmless_tokenizer_facts,
    load_hf_folder,
    read_json,
    write_json,
)
from bert_ds.encoder.hf_mapping import model_config_from_hf, modern_names
from bert_ds.folders.replaced_folders import write_export_manifest

MAX_RELATIVE_DIFFERENCE = 1e-4
ONNX_FILE = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_COPIED_FILES = (
    *("tokenizer.json", "vocab.txt", "special_tokens_map.json"),
    *("1_Pooling/config.json", "1_WeightedLayerPooling/config.json", "config_sentence_transformers.json"),
)
_NOT_TRACED: tuple[RoleName, ...] = ("multiple choice",)
"""Its inputs have one more dimension, the number of choices."""


class OnnxCheck(NamedTuple):
    """The largest difference of any output between onnxruntime and transformers, and the largest output."""

    max_difference: float
    scale: float


def write_onnx(folder: Path, output: Path) -> OnnxCheck:
    """Write model.onnx, config.json, tokenizer and pooling of a Hugging Face folder into an existing folder.

    Args:
        folder: with config.json, weights and tokenizer.
        output: where to; see `replaced_export`.

    Returns:
        What comparing both on random batches, from one token to the longest probe of the family, has shown.

    Raises:
        ConfigError: a package of the extra "onnx" is missing, or config.json names another architecture than
            transformers' BERTs.
        CheckpointError: the folder cannot be loaded, or onnxruntime gives other scores.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} not installed: --onnx wants pip install {' '.join(_PACKAGES)}")
    model = load_to_trace(folder)
    _export(model, output / ONNX_FILE)
    check = verify_onnx(model, output / ONNX_FILE, longest=_longest_probe(folder))
    for name in _COPIED_FILES:
        if (folder / name).exists():
            (output / name).parent.mkdir(exist_ok=True)
            copy_member(folder / name, output / name)
    if (folder / "tokenizer_config.json").exists():
        found = read_json(folder / "tokenizer_config.json")
        kept = ("tokenizer_class", "model_max_length", "model_input_names")
        own = {name: found[name] for name in found if name in kept}
        write_json(output / "tokenizer_config.json", {**harmless_tokenizer_facts(found), **own})
    facts = {"file": ONNX_FILE, "max_difference": check.max_difference}
    write_json(output / "config.json", {**harmless_config(read_json(folder / "config.json")), "onnx": facts})
    write_export_manifest(output)
    return check


def quantise(path: Path) -> None:
    """Replace an ONNX file by one whose matrices and embeddings are int8; what they are multiplied with is scaled as it
    comes, by the largest value in the whole batch (onnxruntime's dynamic quantisation)."""
    from onnxruntime.quantization import quantize_dynamic

    small = path.with_name(f"{path.stem}.int8.onnx")
    root, before = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)  # it recommends a step for convolutions
    try:
        quantize_dynamic(path, small)
    finally:
        root.setLevel(before)
    small.replace(path)


def load_to_trace(folder: Path) -> Any:
    """Return transformers' model of the folder, in fp32, with a pooler only where there are weights of one.

    Raises:
        ConfigError: config.json is missing or names another architecture than transformers' BERTs.
        CheckpointError: a weight is missing or has another shape.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: wanted an exported or fine-tuned Hugging Face folder")
    architectures = read_json(folder / "config.json").get("architectures") or ["missing"]
    config = model_config_from_hf(harmless_config(read_json(folder / "config.json")))
    roles = family_of(config).roles(config)
    known = {role.architecture: name for name, role in roles.items() if name not in _NOT_TRACED}
    if architectures[0] not in known:
        raise ConfigError(f"{folder}/config.json: architectures is {architectures}, wanted one of {', '.join(known)}")
    model_class = getattr(transformers, architectures[0])
    options = roles[known[architectures[0]]].without_front
    if options and _has_front(folder):
        options = {}
    model, report = model_class.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype=torch.float32, **options
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        raise CheckpointError(f"{folder}: transformers finds no weights for {report['missing_keys']}")
    return model.eval()


def verify_onnx(model: Any, path: Path, *, longest: int) -> OnnxCheck:
    """Run a transformers model and an ONNX file on the same batches; CheckpointError when they differ.

    Args:
        model: in evaluation mode.
        path: of the file.
        longest: tokens of the longest sequence.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    differences, scales = [], []
    for batch_size, length in ((1, 1), (1, longest), (3, -(-longest // 2))):
        inputs = _random_inputs(model, batch_size, length)
        with torch.no_grad():
            wanted = model(**inputs)
        found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        mask_NS = inputs["attention_mask"].bool()
        for name, array in zip(names, found, strict=True):
            kept = mask_NS if wanted[name].shape[:2] == mask_NS.shape else slice(None)
            differences.append((torch.from_numpy(array) - wanted[name])[kept].abs().max().item())
            scales.append(wanted[name][kept].abs().max().item())
    check = OnnxCheck(max(differences), max(scales))
    if not check.max_difference <= MAX_RELATIVE_DIFFERENCE * check.scale:
        raise CheckpointError(
            f"{path}: onnxruntime's scores differ from transformers' by {check.max_difference:.3e}, "
            f"wanted at most {MAX_RELATIVE_DIFFERENCE} of the largest score {check.scale:.3e}"
        )
    return check


def _longest_probe(folder: Path) -> int:
    """Return how long the longest sequence is that is tried; thousands of tokens would take the memory of a server."""
    config = model_config_from_hf(harmless_config(read_json(folder / "config.json")))
    return min(config.max_position_embeddings, config.longest_probe)


def _has_front(folder: Path) -> bool:
    """Whether there are weights of a pooler; sentence embeddings have none, and transformers would make up noise."""
    source = load_hf_folder(folder)
    family, tensors = family_of(source.config), modern_names(source.tensors, source.config)
    without = {row.name for row in family.encoder_rows(source.config, has_front=False)}
    front = [row for row in family.encoder_rows(source.config, has_front=True) if row.name not in without]
    return any(name in tensors for row in front for name in row.hf_names)


def _export(model: Any, path: Path) -> None:
    longest = _settings(model).max_position_embeddings
    inputs = _random_inputs(model, 2, min(8, longest))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Outputs(model),
            (),
            kwargs=inputs,
            dynamic_shapes=dict.fromkeys(inputs, free),
            input_names=list(inputs),
            output_names=list(model(**inputs).keys()),
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "the exporter returns a program unless it is given a file"
    program.save(path)


class _Outputs(nn.Module):
    """A transformers model that returns a plain tuple, as the exporter wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return tuple(self.model(input_ids=input_ids, attention_mask=attention_mask, **segments).values())


def _settings(model: Any) -> EncoderConfig:
    """Return the settings of a transformers model as ours."""
    return model_config_from_hf(harmless_config(model.config.to_dict()))


def _random_inputs(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Return ids, mask and segments, where there are any, of sequences of which all but the first are padded."""
    generator = torch.Generator().manual_seed(batch_size)
    lengths_N = torch.tensor([max(1, length - 3 * index) for index in range(batch_size)])
    shape = (batch_size, length)
    inputs = {
        "input_ids": torch.randint(model.config.vocab_size, shape, generator=generator),
        "attention_mask": (torch.arange(length) < lengths_N[:, None]).long(),
    }
    if num_segments := _settings(model).num_segments:
        inputs["token_type_ids"] = torch.randint(num_segments, shape, generator=generator)
    return inputs
