"""Weights that a run starts from: another run of this project, or a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.model_folder import GENERATOR_FOLDER
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.encoder.hf_mapping import discriminator_from_hf, from_hf
from bert_ds.encoder.objectives.replaced_tokens import Halves, ReplacedTokens, joined
from bert_ds.encoder.pretraining_model import PretrainingModel

_OF_LAYER = re.compile(r"^bert\.layer\.(\d+)\.(\w+)\.")


def load_initial_weights(
    model: PretrainingModel, folder: Path, *, read_run: Callable[[Path], Mapping[str, Tensor]]
) -> None:
    """Copy the weights of `folder` into a new model.

    Args:
        model: on the CPU, not yet wrapped by DeepSpeed.
        folder: a run folder (its newest checkpoint is taken) or the Hugging Face folder of an encoder.
        read_run: returns the fp32 weights of a run folder, in this model's names.

    Raises:
        ConfigError: the folder is neither, or of an encoder that this model cannot be.
        CheckpointError: a tensor is missing, unknown, of another shape, or damaged.
    """
    if (folder / "checkpoints").is_dir():
        tensors = read_run(folder)
    else:
        source = load_hf_folder(folder, pad_vocab_size_to_multiple_of=model.config.pad_vocab_size_to_multiple_of)
        if model.has_pair_head and not any(model.config.PAIR_HEAD in name for name in source.tensors):
            raise CheckpointError(
                f"init_from {folder} has no head for sentence pairs: wanted sequences.sentence_pair=none"
            )
        replaced = next((one for one in model.objectives if isinstance(one, ReplacedTokens)), None)
        if replaced is None:
            tensors = from_hf(source.tensors, model.config, has_pair_head=model.has_pair_head)
        else:
            words = load_hf_folder(folder / GENERATOR_FOLDER)
            generator = from_hf(words.tensors, replaced.generator, has_pair_head=False)
            tensors = joined(Halves(discriminator_from_hf(source.tensors, model.config), generator))
    try:
        model.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise CheckpointError(f"init_from {folder} does not fit the recipe's model: {error}") from None


def start_at_unigram(model: PretrainingModel, counts: np.ndarray) -> None:
    """Let the bias of the word scores give every piece its frequency, so that training starts where a model ends that
    knows nothing of the context. Rows that only pad the vocabulary stay as they are; they never win.

    Args:
        model: on the CPU, not yet wrapped by DeepSpeed; its head has a bias.
        counts: int64 [vocab_size], of each piece in the training text; one is added to each.
    """
    bias_V, seen = model.predictions.bias, torch.from_numpy(counts + 1).double()
    assert bias_V is not None, "the recipe was not checked"
    with torch.no_grad():
        bias_V[: len(seen)] = (seen / seen.sum()).log()


def start_at_vectors(model: PretrainingModel, ids: np.ndarray, vectors: np.ndarray) -> None:
    """Let some pieces start from given vectors, as they are; the others stay as they are.

    Args:
        model: on the CPU, not yet wrapped by DeepSpeed.
        ids: int64 [n], of the pieces.
        vectors: fp32 [n, E] in the width of the word embedding.
    """
    with torch.no_grad():
        model.bert.embeddings.word_weight[torch.from_numpy(ids)] = torch.from_numpy(vectors)


def layers_alone(
    state_dict: Mapping[str, Tensor], config: EncoderConfig, layers: Sequence[int]
) -> tuple[dict[str, Tensor], EncoderConfig]:
    """Return the weights and the settings of the network of some layers of a model.

    Args:
        state_dict: of a pre-training model.
        config: of it.
        layers: counted from 0, one behind the other.

    Raises:
        ConfigError: there is no network of these layers.
    """
    try:
        smaller = config.with_layers(layers)
    except ValueError as error:
        raise ConfigError(f"--layers: {error}") from None
    kept: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if (found := _OF_LAYER.match(name)) is None:
            kept[name] = tensor
            continue
        number, part = int(found[1]), found[2]
        for place in [place for place, layer in enumerate(layers) if config.owner(layer, part) == number][:1]:
            kept[f"bert.layer.{place}.{part}.{name[found.end() :]}"] = tensor
    return kept, smaller


def start_from_layers(model: PretrainingModel, teacher: PretrainingModel, layers: Sequence[int]) -> None:
    """Copy a teacher's embeddings, heads and some of its layers into a new model of the same sizes.

    A pair head that the teacher does not have, or has for other pairs, stays as it is.

    Args:
        model: with len(layers) layers.
        teacher: of which they are.
        layers: the teacher's layer that each layer of the model starts from, counted from 0.
    """
    own, theirs = model.state_dict(), teacher.state_dict()

    def taken(found: re.Match) -> str:
        return f"bert.layer.{teacher.config.owner(layers[int(found[1])], found[2])}.{found[2]}."

    def source(name: str) -> str:
        return _OF_LAYER.sub(taken, name)

    found = {name: theirs.get(source(name), tensor) for name, tensor in own.items()}
    model.load_state_dict({name: found[name] if found[name].shape == own[name].shape else own[name] for name in own})
