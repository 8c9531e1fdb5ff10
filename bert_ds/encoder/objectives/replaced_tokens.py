"""Replaced tokens (ELECTRA, Clark et al. 2020, arXiv 2003.10555): a generator of masked words fills the masked places
with pieces that it draws, and the encoder, then called the discriminator, tells of every token whether it was replaced.

    mlm       cross-entropy of the generator, summed over the P masked tokens
    replaced  binary cross-entropy of the detector, summed over all T tokens, [CLS] and [SEP] among them: the published
              code and transformers leave out padding alone

A piece that is drawn and happens to be the right one is no replaced token. Drawing passes no gradient. Both halves
share the embeddings, one tensor each, which sum the gradients of the two.

A piece is the one at which the generator's probabilities, summed in the order of the vocabulary, pass a number that is
a Philox function of (seed of the micro-batch, row of the token), as dropout masks are. In an evaluation the number is
one of what the sequence holds and the place in it: batch size, ranks and seed change nothing. Letters as in
`encoder/families/bert.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import FusedOps, fused_ops, uniform_draws
from bert_ds.encoder.objectives.masked_words import MaskedWords, tied_decoder
from bert_ds.encoder.objectives.objective import Seen, Sums
from bert_ds.encoder.word_head import Decoder

_ROWS_AT_ONCE = 512
"""Masked tokens whose (rows, V) probabilities exist at a time."""
_OWN, _SHARED, _PROJECTION = "generator.", "bert.embeddings.", "bert.embeddings.projection_"


class ReplacedTokens(MaskedWords):
    """Masked words of a generator, and which tokens it has replaced.

    Args:
        generator: its settings.
        words_weight: of the generator's loss.
        weight: of the detector's.
    """

    def __init__(self, generator: EncoderConfig, words_weight: float, *, weight: float) -> None:
        super().__init__(words_weight)
        self.generator = generator
        metrics: dict[str, Any] = {"metric": "replaced_correct", "shares": ("replaced_found",)}
        self.terms += (LossTerm("replaced", count="tokens", weight=weight, **metrics),)

    def heads(self, config: EncoderConfig, ops: FusedOps) -> dict[str, nn.Module]:
        """Return the generator with its masked-word head, and the detector."""
        family = family_of(config)
        assert family.make_generator is not None and family.detector is not None, "refused where the recipe is read"
        words = super().heads(self.generator, ops)
        generator, detector = family.make_generator(self.generator, ops), family.detector(config, ops)
        return {"generator": generator, **words, "detector": detector}

    def tokens_read(self, model: Any, seen: Seen) -> Tensor | None:
        """See `Objective.tokens_read`: none, both halves see streams of their own."""
        return seen.targets["masked_positions"][:0]

    def sums(self, model: Any, seen: Seen) -> Sums:
        """See `Objective.sums`."""
        positions_P, labels_P = (seen.targets[f"masked_{name}"] for name in ("positions", "labels"))
        hidden_TD = _generated(model, seen.stream, positions_P)
        draws_P = _draws(model, seen.stream, seen.real_words(positions_P))

        def also(decoder: Decoder) -> Tensor:
            real = decoder._replace(transformed_PD=seen.real_words(decoder.transformed_PD))
            return drawn_pieces(real, draws_P, vocab_size=model.config.vocab_size)

        loss, num_correct, pieces_P = model.predictions(
            hidden_TD.index_select(0, positions_P),
            labels_P,
            tied_decoder(model),
            kind_counts=seen.kind_counts,
            also=also,
        )
        positions_P, labels_P = seen.real_words(positions_P), seen.real_words(labels_P)
        ids_T = seen.stream["input_ids_T"].index_copy(0, positions_P, pieces_P)
        scores_T = model.detector(model.bert(**{**seen.stream, "input_ids_T": ids_T}))
        scores_T = scores_T.to(torch.promote_types(scores_T.dtype, torch.float32))
        replaced_T = torch.zeros_like(scores_T).index_copy(0, positions_P, (pieces_P != labels_P).to(scores_T.dtype))
        scores_T, replaced_T = seen.real_tokens(scores_T), seen.real_tokens(replaced_T)
        told_T = (scores_T.detach() > 0).to(scores_T.dtype)
        return Sums(
            {"mlm": loss, "replaced": F.binary_cross_entropy_with_logits(scores_T, replaced_T, reduction="sum")},
            {
                "mlm_correct": num_correct,
                "replaced_correct": (told_T == replaced_T).sum().float(),
                "replaced_found": (told_T * replaced_T).sum().float(),
                "replaced_found_of": replaced_T.sum().float(),
            },
        )


@torch.no_grad()
def drawn_pieces(decoder: Decoder, draws_P: Tensor, *, vocab_size: int) -> Tensor:
    """Return a piece for each masked token, drawn by the softmax of its scores; int64 [P].

    Args:
        decoder: rows of weight and bias from vocab_size on are padding and are never drawn.
        draws_P: fp32 in (0, 1).
        vocab_size: pieces of the vocabulary.
    """
    pieces = [torch.zeros_like(draws_P[:0], dtype=torch.int64)]
    weight_VD, bias_V = decoder.weight_VD[:vocab_size], decoder.bias_V[:vocab_size]
    for rows_RD, draws_R in zip(decoder.transformed_PD.split(_ROWS_AT_ONCE), draws_P.split(_ROWS_AT_ONCE), strict=True):
        up_to_RV = F.linear(rows_RD, weight_VD, bias_V).softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
        aims_R1 = draws_R[:, None] * up_to_RV[:, -1:]
        # Scores that are not finite find no piece; the step is dropped for them, but not before the encoder has run.
        pieces.append(torch.searchsorted(up_to_RV, aims_R1)[:, 0].clamp(max=vocab_size - 1))
    return torch.cat(pieces)


def _generated(model: Any, stream: Mapping[str, Any], positions_P: Tensor) -> Tensor:
    """Return hidden_TD of the generator, of the masked tokens at least."""
    seed = stream["dropout_seed"]
    seed = None if seed is None else ~seed  # another number: no mask is one of the discriminator's
    branches = stream.get("branches")
    branches = None if branches is None else branches._replace(seed=~branches.seed)
    names = ("input_ids_T", "token_type_ids_T", "position_ids_T")
    embedded_TE = model.bert.embeddings(*(stream[name] for name in names), seed, is_projected=False)
    read_R = positions_P if 0 < len(positions_P) < len(embedded_TE) else None
    own = {"input_ids_T": embedded_TE, "dropout_seed": seed, "branches": branches, "read_R": read_R}
    return model.generator(**{**stream, **own})


def _draws(model: Any, stream: Mapping[str, Any], positions_P: Tensor) -> Tensor:
    """Return the numbers in (0, 1) that pieces are drawn by."""
    site, seed = family_of(model.config).first_free_site(model.config), stream["dropout_seed"]
    if seed is not None:
        return uniform_draws(seed, (torch.zeros_like(positions_P), positions_P), site=site)
    if model.training:
        raise ValueError("dropout_seed is None, but in training tokens are replaced by it")
    ids_T, places_T, lengths_N = stream["input_ids_T"], stream["position_ids_T"], stream["cu_seqlens"].diff()
    numbers_N = torch.arange(len(lengths_N), device=ids_T.device)
    sequence_T = torch.repeat_interleave(numbers_N, lengths_N, output_size=len(ids_T))
    content_N = torch.zeros_like(numbers_N).index_add(0, sequence_T, (ids_T + 1) * (2 * places_T + 1))
    content_P = (content_N * 0x9E3779B1).index_select(0, sequence_T.index_select(0, positions_P)) & 0xFFFFFFFF
    counters = (places_T.index_select(0, positions_P), content_P)
    return uniform_draws(torch.zeros_like(positions_P.new_zeros(1)), counters, site=site)


class Discriminator(nn.Module):
    """The half that tasks start from, with its detector.

    Args:
        config: of the encoder.
        kernels: see `fused_ops`.
    """

    def __init__(self, config: EncoderConfig, *, kernels: str = "auto") -> None:
        super().__init__()
        ops, family = fused_ops(kernels), family_of(config)
        assert family.detector is not None, "the family detects no replaced tokens"
        self.config = config
        self.bert = family.make_encoder(config, ops, has_front=False)
        self.detector = family.detector(config, ops)

    def forward(self, **stream: Any) -> Tensor:
        """Return scores [T] of the arguments of `BertEncoder.forward`, above 0 where a token was replaced."""
        return self.detector(self.bert(**stream))


class Halves(NamedTuple):
    """The weights of a model that learned replaced tokens, as two models."""

    discriminator: dict[str, Tensor]
    """Names of `Discriminator`."""
    generator: dict[str, Tensor]
    """Names of a `PretrainingModel` of masked words with the generator's settings."""


def halves(state_dict: Mapping[str, Tensor]) -> Halves:
    """Return both halves; the shared embeddings are in each."""
    discriminator = {n: tensor for n, tensor in state_dict.items() if n.startswith(("bert.", "detector."))}
    words = {n: tensor for n, tensor in state_dict.items() if n.startswith("predictions.") or _is_shared(n)}
    own = {f"bert.{n.removeprefix(_OWN)}": tensor for n, tensor in state_dict.items() if n.startswith(_OWN)}
    return Halves(discriminator, {**words, **own})


def joined(of: Halves) -> dict[str, Tensor]:
    """Return the weights of both halves under one model's names.

    Raises:
        CheckpointError: the two do not share their embeddings.
    """
    result = dict(of.discriminator)
    for name, tensor in of.generator.items():
        if _is_shared(name):
            if not torch.equal(tensor, of.discriminator[name]):
                raise CheckpointError(f"generator and discriminator differ in {name}: wanted a pair that shares it")
        else:
            result[name if name.startswith("predictions.") else _OWN + name.removeprefix("bert.")] = tensor
    return result


def _is_shared(name: str) -> bool:
    return name.startswith(_SHARED) and not name.startswith(_PROJECTION)
