"""Prove that an exported folder is the model it was made of.

"It loads" proves nothing: transformers fills a missing tensor with noise and says so in a warning. So the folder is
loaded again by transformers, and its tensors, its settings, its scores and its tokenizer are compared with ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.families.family import Role, RoleName
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.hf_folder import read_json, refuse_broken_tensors
from bert_ds.encoder.hf_mapping import discriminator_from_hf, from_hf, model_config_from_hf, role_of
from bert_ds.encoder.objectives.replaced_tokens import Discriminator
from bert_ds.encoder.pretraining_model import PretrainingModel

MAX_RELATIVE_DIFFERENCE = 1e-4
_PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog, again and again.",
    "naïve café, Zürich, ΑΒΓ αβγ, Привет мир, İstanbul",
    "中文分詞測試，東京タワー 한국어 العربية",
    "don't\tsplit\u00a0me — “quoted” 3.14 x_y #tag user@host 🙂 \u200bzero\u0301",
    "[CLS] already [SEP] special [MASK] [PAD] [UNK]",
    "",
)


class ExportCheck(NamedTuple):
    """What `verify_export` measured: the largest difference of any score, and the largest score."""

    max_difference: float
    scale: float


def verify_export(
    folder: Path, config: EncoderConfig, *, state_dict: Mapping[str, Tensor], tokenizer: Path | None = None
) -> ExportCheck:
    """Load the folder with transformers, offline, and compare it with the model it was made of.

    Args:
        folder: the exported folder.
        config: the model section of the recipe.
        state_dict: of our `PretrainingModel`, or of one of the `Halves` where there are two; fp32.
        tokenizer: folder of the tokenizer the model was trained with; None leaves the tokenizer unchecked.

    Raises:
        CheckpointError: the settings, a tensor, a score or a token id differs, or transformers had to improvise.
    """
    facts = read_json(folder / "config.json")
    exported = model_config_from_hf(facts, pad_vocab_size_to_multiple_of=config.pad_vocab_size_to_multiple_of)
    found, wanted = exported.spelled_out(), config.exported()
    if found != wanted:
        different = [key for key, value in wanted.model_dump().items() if getattr(found, key, None) != value]
        raise CheckpointError(f"{folder}/config.json differs from the run in {', '.join(different)}")
    name = role_of(state_dict)
    role = family_of(config).roles(config)[name]
    theirs = load_with_transformers(folder, role)
    refuse_broken_tensors(theirs.state_dict(), where=f"{folder}, as transformers loads it")
    ours, loaded = _made_anew(theirs.state_dict(), config, name)
    changed = [name for name, tensor in state_dict.items() if not torch.equal(loaded[name], tensor.float().cpu())]
    if changed:
        raise CheckpointError(f"{folder}: transformers loads other values for {', '.join(changed)}")
    ours.load_state_dict(state_dict)
    check = _compare_scores(ours.eval(), theirs, role)
    if not check.max_difference <= MAX_RELATIVE_DIFFERENCE * check.scale:
        raise CheckpointError(
            f"{folder}: scores differ from transformers' by {check.max_difference:.3e}, "
            f"wanted at most {MAX_RELATIVE_DIFFERENCE} of the largest score {check.scale:.3e}"
        )
    if tokenizer is not None:
        verify_tokenizer(folder, config, tokenizer)
    return check


def _made_anew(
    tensors: Mapping[str, Tensor], config: EncoderConfig, role: RoleName
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model of ours of that role, and what transformers' tensors are under its names."""
    if role == "replaced tokens":
        return Discriminator(config, kernels="torch"), discriminator_from_hf(tensors, config)
    has_pair_head = role == "pre-training"
    model = PretrainingModel(config, kernels="torch", has_pair_head=has_pair_head)
    return model, from_hf(tensors, config, has_pair_head=has_pair_head)


def load_with_transformers(folder: Path, role: Role) -> Any:
    """Return transformers' model of a folder, offline; anything missing, unexpected or misshapen is refused.

    Raises:
        CheckpointError: the folder is of another architecture, or transformers had to improvise.
    """
    # Importing transformers takes seconds, which only an export should pay.
    import transformers

    architectures = read_json(folder / "config.json").get("architectures")
    if architectures != [role.architecture]:
        raise CheckpointError(f"{folder}/config.json: architectures is {architectures}, wanted {[role.architecture]}")
    try:
        model, report = getattr(transformers, role.architecture).from_pretrained(
            folder,
            output_loading_info=True,
            local_files_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            **role.without_front,
        )
    except (RuntimeError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {error}") from error
    problems = [f"{kind}: {', '.join(map(str, names))}" for kind, names in report.items() if names]
    if problems:
        raise CheckpointError(f"{folder}: transformers reports " + "; ".join(problems))
    return model.eval()


class ProbeSequences(NamedTuple):
    """Random sequences from one token to the longest possible, segments included, in both forms."""

    padded: dict[str, Tensor]
    """Arguments of a model of transformers, [N, S]."""
    packed: dict[str, Any]
    """Arguments of our encoder, [T]."""


def probe_sequences(config: EncoderConfig) -> ProbeSequences:
    """Return the sequences on which scores are compared."""
    longest = min(config.max_position_embeddings, config.longest_probe)
    lengths = [longest, 1, -(-longest // 2), -(-longest // 3)]
    generator = torch.Generator().manual_seed(0)
    mask_NS = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ids_NS = torch.randint(config.vocab_size, mask_NS.shape, generator=generator)
    # No text holds the padding, whose tokens transformers gives no position of their own where positions go by it.
    ids_NS = ids_NS.where(ids_NS != getattr(config, "pad_token_id", -1), config.vocab_size - 1) * mask_NS
    types_NS = torch.randint(max(1, config.num_segments), mask_NS.shape, generator=generator) * mask_NS
    padded = {"input_ids": ids_NS, "token_type_ids": types_NS, "attention_mask": mask_NS.long()}
    if not config.num_segments:
        del padded["token_type_ids"]
    return ProbeSequences(
        padded,
        {
            "input_ids_T": ids_NS[mask_NS],
            "token_type_ids_T": types_NS[mask_NS],
            "position_ids_T": torch.arange(longest).expand_as(ids_NS)[mask_NS],
            "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
            "max_seqlen": longest,
        },
    )


@torch.no_grad()
def _compare_scores(ours: Any, theirs: Any, role: Role) -> ExportCheck:
    """Compare all scores on the probe sequences."""
    probe = probe_sequences(ours.config)
    mask_NS = probe.padded["attention_mask"].bool()
    wanted = theirs(**probe.padded)
    if isinstance(ours, Discriminator):
        scores_T, found_T = wanted.logits[mask_NS], ours(**probe.packed)
        return ExportCheck((found_T - scores_T).abs().max().item(), scores_T.abs().max().item())
    found = ours.logits(**probe.packed, masked_positions_P=torch.arange(int(mask_NS.sum())))
    pairs = [(found.mlm_PV, (wanted.logits if found.pair_N2 is None else wanted.prediction_logits)[mask_NS])]
    if found.pair_N2 is not None:
        pairs.append((found.pair_N2, getattr(wanted, role.pair_scores)))
    differences = [(a - b).abs().max().item() for a, b in pairs]
    return ExportCheck(max(differences), max(b.abs().max().item() for _, b in pairs))


def verify_tokenizer(folder: Path, config: EncoderConfig, tokenizer: Path, *, max_length: int | None = None) -> None:
    """Raise CheckpointError unless AutoTokenizer gives the ids of the training tokenizer and cuts to max_length.

    None is all that the model has positions for.
    """
    import transformers
    from tokenizers import Tokenizer

    trained = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    exported = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    problems = []
    wanted_length = max_length or config.max_position_embeddings
    if exported.model_max_length != wanted_length:
        problems.append(f"model_max_length is {exported.model_max_length}, wanted {wanted_length}")
    if len(exported) > config.vocab_size:
        problems.append(f"it has {len(exported)} pieces, the model {config.vocab_size}")
    if exported.mask_token is None:
        problems.append("it has no mask token")
    for text in _PROBE_TEXTS:
        wanted = trained.encode(text, add_special_tokens=False).ids
        # Not verbose: a probe may be longer than what the model is meant for.
        found = exported(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != wanted:
            problems.append(f"{text!r} gives {found}, wanted {wanted}")
        if exported(text, verbose=False)["input_ids"] != [exported.cls_token_id, *wanted, exported.sep_token_id]:
            problems.append(f"{text!r} is not wrapped in [CLS] and [SEP]")
    if problems:
        raise CheckpointError(f"{folder}: wrong tokenizer: " + "; ".join(problems))
