"""Folders with a masked-word head, ours and any other family's, behind one face: pieces, marks, sums over targets.

What is of a family of this project and has a tokenizer of its kinds runs in this project's model. The others
transformers opens: local files alone, no code of the folder's, and a fast tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bert_ds.basics.loss_term import metric_names
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.families.table import HF_FAMILIES
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.text.sentences import split_sentences
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer, model_type
from bert_ds.encoder.hf_folder import read_json
from bert_ds.encoder.pretrained import check_tokenizer, load_masked_lm

_LOGITS_AT_ONCE = 1 << 28
"""Scores of all pieces at all tokens of a forward pass: 1 GiB in fp32. This project's head scores targets alone."""


class MaskedLm(NamedTuple):
    """A pre-trained folder that predicts masked words."""

    name: str
    """What opened it."""
    encode: Callable[[str], np.ndarray]
    """Text of a document -> int32 [n] pieces, without marks; "[MASK]" in a text is text."""
    fingerprint: str | None
    """Of a tokenizer that shards can belong to."""
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int
    before: tuple[int, ...]
    """Marks before the pieces of a sequence."""
    after: tuple[int, ...]
    """Marks behind them."""
    max_length: int
    """Tokens of the longest sequence that it has positions for."""
    max_tokens: int
    """Tokens of a forward pass at most."""
    kind_sums: Callable[[MicroBatch], Tensor]
    """Sequences of one length -> fp64 [2 K] on the CPU: losses in nats, then right predictions, of each kind."""


def open_masked_lm(folder: Path, *, kernels: str, device: str) -> MaskedLm:
    """Open a folder.

    Raises:
        ConfigError: the folder is none, or of no family with masked words.
        CheckpointError: weights are missing or damaged.
        DataError: its tokenizer is damaged or another model's.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json: wanted a Hugging Face folder")
    if read_json(folder / "config.json").get("model_type") in HF_FAMILIES and _has_our_pieces(folder):
        return _ours(folder, kernels=kernels, device=device)
    return open_with_transformers(folder, device=device)


def _has_our_pieces(folder: Path) -> bool:
    """Whether its tokenizer is WordPiece, whose faults are ours to name, or another that this project has."""
    whole = folder / "tokenizer.json"
    if not whole.is_file() or model_type(read_json(whole)) == "WordPiece":
        return True
    try:
        load_tokenizer(folder)
    except DataError:
        return False
    return True


def _ours(folder: Path, *, kernels: str, device: str) -> MaskedLm:
    tokenizer = load_tokenizer(folder)
    check_tokenizer(folder, **tokenizer.identity)
    model = load_masked_lm(folder, kernels=kernels).to(device)
    special = tokenizer.special_ids

    def encode(text: str) -> np.ndarray:
        pieces = b"".join(tokenizer.encode_document(split_sentences(text)))
        return np.frombuffer(pieces, dtype=tokenizer.dtype).astype(np.int32)

    @torch.no_grad()
    def kind_sums(batch: MicroBatch) -> Tensor:
        _, metric_sums_M = model(**batch.to(device).model_inputs())
        return metric_sums_M[len(metric_names(model.terms)) :].double().cpu()

    return MaskedLm(
        name=f"this project's {model.config.family}",
        encode=encode,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        special_ids=tuple(special),
        mask_id=special.mask,
        before=(special.cls,),
        after=(special.sep,),
        max_length=model.config.max_position_embeddings,
        max_tokens=1 << 14,
        kind_sums=kind_sums,
    )


def open_with_transformers(folder: Path, *, device: str) -> MaskedLm:
    """As `open_masked_lm`, for any family."""
    tokenizer, model = _load(folder)
    model.to(device)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    bare = backend.encode("a", add_special_tokens=False).ids
    marked = backend.encode("a").ids
    first = next((at for at in range(len(marked)) if marked[at : at + len(bare)] == bare), None)
    if not bare or first is None:
        raise DataError(
            f"{folder}: its tokenizer makes {marked} of 'a' with marks and {bare} without: wanted marks around"
        )

    @torch.no_grad()
    def kind_sums(batch: MicroBatch) -> Tensor:
        ids_NS = batch.input_ids_T.view(batch.num_sequences, batch.max_seqlen).to(device)
        logits_TV = model(input_ids=ids_NS).logits.flatten(0, 1)
        logits_PV = logits_TV[batch.targets["masked_positions"].to(device)].float()
        return _sums(logits_PV, batch.targets["masked_labels"].to(device), tuple(batch.kind_counts.values()))

    return MaskedLm(
        name=f"transformers' {type(model).__name__}",
        encode=lambda text: np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32),
        fingerprint=None,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        mask_id=tokenizer.mask_token_id,
        before=tuple(marked[:first]),
        after=tuple(marked[first + len(bare) :]),
        max_length=min(tokenizer.model_max_length, _num_positions(model)),
        max_tokens=max(1, _LOGITS_AT_ONCE // model.config.vocab_size),
        kind_sums=kind_sums,
    )


def _load(folder: Path) -> tuple[Any, Any]:
    """Return tokenizer and model in fp32, in evaluation mode."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model, loaded = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{folder}: transformers opens no masked language model: {_first_line(error)}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{folder}: the weights are damaged: {error}") from None
    missing = sorted({*loaded["missing_keys"], *(str(one[0]) for one in loaded["mismatched_keys"])})
    if missing:
        raise CheckpointError(f"{folder} has no masked-word head or not all of its model: {', '.join(missing[:5])}")
    if not tokenizer.is_fast or tokenizer.mask_token_id is None:
        raise ConfigError(f"{folder}: wanted a fast tokenizer with a mask token, found {type(tokenizer).__name__}")
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(f"{folder}: the tokenizer has {len(tokenizer)} pieces, the model {model.config.vocab_size}")
    return tokenizer, model.eval()


def _num_positions(model: Any) -> int:
    """Return for how long a sequence there are positions; RoBERTa and its like begin behind the padding's."""
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 20
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and one.num_embeddings == positions]
    offsets = [one.padding_idx + 1 for one in tables if one.padding_idx is not None]
    return positions - max(offsets, default=0)


def _sums(logits_PV: Tensor, labels_P: Tensor, kind_counts: tuple[int, ...]) -> Tensor:
    """Return losses, then right predictions of each kind; as in `mlm_cross_entropy`, a tie is not a right guess."""
    loss_P = nn.functional.cross_entropy(logits_PV, labels_P, reduction="none").double()
    label_P1 = logits_PV.gather(1, labels_P[:, None])
    right_P = ((logits_PV >= label_P1).sum(dim=1) == 1).double()
    return torch.stack([run.sum() for sums in (loss_P, right_P) for run in sums.split(kind_counts)]).cpu()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
