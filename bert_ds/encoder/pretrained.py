"""The encoder of a pre-trained folder, as a start for a task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.families.encoder_config import EncoderConfig, other_marks_text
from bert_ds.configuration.families.marks import Marks
from bert_ds.configuration.families.table import described
from bert_ds.configuration.model_folder import GENERATOR_FOLDER, has_generator
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.hf_folder import load_hf_folder, read_json
from bert_ds.encoder.hf_mapping import encoder_from_hf, from_hf, modern_names
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.encoder.tensor_rows import TensorRow


class Pretrained(NamedTuple):
    """What a task starts from."""

    config: EncoderConfig
    tensors: dict[str, Tensor]
    """Our names, all of them under "bert."; with the pooler where the folder has one."""
    unused: tuple[str, ...]
    """Names of the heads in the folder, which a task has no use for."""


def load_pretrained(folder: Path) -> Pretrained:
    """Read the encoder of a Hugging Face folder; its heads are left aside and listed.

    Raises:
        ConfigError: config.json is missing, unreadable, or no encoder that this model can be.
        CheckpointError: the weights are missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    source = load_hf_folder(folder)
    tensors, unused = encoder_from_hf(source.tensors, source.config)
    return Pretrained(source.config, tensors, unused)


def load_masked_lm(folder: Path, *, kernels: str = "auto", pad_vocab_size_to_multiple_of: int = 64) -> PretrainingModel:
    """Return the model of a Hugging Face folder with its masked-word head, in evaluation mode on the CPU.

    Raises:
        ConfigError: config.json is missing, unreadable, or no encoder that this model can be.
        CheckpointError: the folder has no masked-word head, as a fine-tuned one has not, or a tensor is missing,
            damaged, unknown or of another shape.
    """
    source = load_hf_folder(folder, pad_vocab_size_to_multiple_of=pad_vocab_size_to_multiple_of)
    tensors, family = modern_names(source.tensors, source.config), family_of(source.config)
    if not _holds(tensors, family.word_head_rows(source.config)):
        wanted = "wanted a pre-trained model, no fine-tuned one and no discriminator"
        if has_generator(folder):
            wanted += f"; its generator predicts words: {folder / GENERATOR_FOLDER}"
        raise CheckpointError(f"{folder} has no masked-word head: {wanted}")
    has_pair_head = _holds(tensors, family.pair_head_rows(source.config))
    model = PretrainingModel(source.config, kernels=kernels, has_pair_head=has_pair_head)
    model.load_state_dict(from_hf(tensors, source.config, has_pair_head=has_pair_head))
    return model.eval()


def _holds(tensors: Mapping[str, Tensor], rows: Iterable[TensorRow]) -> bool:
    """Whether any tensor of a table is there."""
    return any(name in tensors for row in rows for name in row.hf_names)


def make_encoder(
    config: EncoderConfig, tensors: Mapping[str, Tensor] | None, *, kernels: str = "auto", init_seed: int = 0
) -> nn.Module:
    """Return an encoder without its front, in evaluation mode on the CPU.

    Args:
        config: its shape.
        tensors: of `Pretrained`; None for random weights.
        kernels: see `fused_ops`.
        init_seed: of the random weights.
    """
    family = family_of(config)
    encoder = family.make_encoder(config, fused_ops(kernels), has_front=False)
    if tensors is None:
        family.initialise(encoder, config, seed=init_seed)
    else:
        own = encoder.state_dict()
        encoder.load_state_dict({name: tensors[f"bert.{name}"] for name in own})
    return encoder.eval()


def check_tokenizer(folder: Path, *, vocab_size: int, fingerprint: str, marks: Marks | None = None) -> None:
    """Check that a tokenizer is the one that the model of a folder was made with.

    Args:
        folder: of the model; its config.json holds the fingerprint where this project wrote it.
        vocab_size: pieces of the tokenizer.
        fingerprint: of the tokenizer.
        marks: its special pieces, where the tokenizer is the folder's own.

    Raises:
        DataError: the model has another number of pieces, wants other special ones, or was trained with another
            tokenizer.
    """
    facts = read_json(folder / "config.json")
    family = described(facts)
    if family is not None and marks not in (None, family.config.MARKS):
        assert marks is not None
        raise DataError(f"{folder}: {other_marks_text(family.config, marks.pieces)}")
    if facts.get("vocab_size") != vocab_size:
        raise DataError(
            f"{folder}: the tokenizer has {vocab_size} pieces, the model {facts.get('vocab_size')}: wanted the "
            "tokenizer that the model was trained with"
        )
    wanted = facts.get("tokenizer_fingerprint")
    if wanted not in (None, fingerprint):
        raise DataError(
            f"{folder}: the model was trained with the tokenizer {wanted}, the folder holds {fingerprint}: two "
            "tokenizers are mixed up"
        )


def start_from(model: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy pre-trained tensors into a model and return the names of its weights that keep their initial values.

    A front (a pooler) that the model does not have is left out.

    Raises:
        CheckpointError: a weight of the encoder other than its front's has no tensor.
    """
    own = model.state_dict()
    used = {name: tensor for name, tensor in tensors.items() if name in own}
    fresh = [name for name in own if name not in used]
    family = family_of(model.config)
    needed = {row.name for row in family.encoder_rows(model.config, has_front=False)}
    missing = [name for name in fresh if name in needed]
    if missing:
        raise CheckpointError(f"the pre-trained folder has no {', '.join(missing)}")
    model.load_state_dict({**own, **used})
    return fresh
