"""Models, batches and FLOPs of the whole training steps; letters are those of `bench_train_step`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from bench_harness import HALF_FULL_512, WIKIPEDIA_128, WIKIPEDIA_512, lengths_of
from torch import Tensor, nn

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.encoder.pretraining_model import PretrainingModel

MODELS = {
    "large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
    "base": BertConfig(),
}
TINY = BertConfig(
    vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32,
)  # fmt: skip
# In order of importance, as the models above.
BATCHES = {
    "half_full_512": lengths_of(HALF_FULL_512, 64),
    "full_512": lengths_of((512,), 64),
    "wikipedia_512": lengths_of(WIKIPEDIA_512, 64),
    "wikipedia_128": lengths_of(WIKIPEDIA_128, 256),
    "full_128": lengths_of((128,), 256),
}


@dataclass(frozen=True)
class Batch:
    """Sequences of given lengths, packed and padded, with the same words."""

    lengths: list[int]
    packed: dict[str, Any]
    padded: dict[str, Any]

    @property
    def num_masked(self) -> int:
        """Masked tokens."""
        return len(self.packed["targets"]["masked_labels"])


def make_batch(lengths: list[int], config: BertConfig, device: torch.device) -> Batch:
    """Return random words of a vocabulary, 15 % of them to be predicted."""
    longest, num_tokens = max(lengths), sum(lengths)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]
    words = torch.randint(config.vocab_size, (num_tokens,))
    positions = torch.arange(longest).expand(len(lengths), -1)[inside]
    types = (positions >= longest // 2).long()
    masked = torch.randperm(num_tokens)[: max(1, num_tokens * 15 // 100)].sort().values
    labels = torch.full((num_tokens,), IGNORE_INDEX)
    labels[masked] = words[masked]
    pairs = torch.randint(2, (len(lengths),))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed = {"input_ids_T": words, "token_type_ids_T": types, "position_ids_T": positions, "cu_seqlens": bounds}
    packed["dropout_seed"] = torch.tensor([7])

    def pad(values: Tensor, fill: int) -> Tensor:
        return torch.full((len(lengths), longest), fill).masked_scatter(inside, values)

    padded = {"input_ids": pad(words, 0), "token_type_ids": pad(types, 0), "labels": pad(labels, IGNORE_INDEX)}
    padded |= {"attention_mask": inside.long(), "next_sentence_label": pairs}
    if bool(inside.all()):
        del padded["attention_mask"]
    targets = {"masked_positions": masked, "masked_labels": words[masked], "pair_labels": pairs}
    on_device = [{name: tensor.to(device) for name, tensor in part.items()} for part in (packed, padded, targets)]
    return Batch(lengths, on_device[0] | {"max_seqlen": longest, "targets": on_device[2]}, on_device[1])


def make_model(provider: str, config: BertConfig, device: torch.device) -> nn.Module:
    """Return the model of a provider in bf16, in training mode."""
    if provider.startswith("ours"):
        model: nn.Module = PretrainingModel(config, kernels="triton")
    else:
        import transformers

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        sizes: dict[str, Any] = {name: getattr(config, name) for name in (*names, "max_position_embeddings")}
        sizes |= {"vocab_size": config.padded_vocab_size, "attn_implementation": "sdpa"}
        theirs = transformers.BertConfig(**sizes)
        model = transformers.BertForPreTraining(theirs)
    return model.to(device, torch.bfloat16).train()


def flops_per_token(config: BertConfig, batch: Batch) -> float:
    """Return the FLOPs of forward and backward per token, by the formula above."""
    width, layers, num_tokens = config.hidden_size, config.num_hidden_layers, sum(batch.lengths)
    dense = 6.0 * layers * (4 * width**2 + 2 * width * config.intermediate_size)
    attention = 12.0 * layers * width * sum(length**2 for length in batch.lengths) / num_tokens
    head = 6.0 * (width**2 + config.padded_vocab_size * width) * batch.num_masked / num_tokens
    return dense + attention + head
