"""Text sections of a recipe: where documents come from, how they become examples, what is masked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_ds.configuration.reading.config_section import PositiveInt, Probability, Section

IGNORE_INDEX = -100
"""Label of a position or sequence that has no target."""


class ShardSource(Section):
    """One folder of token shards, made by build_shards.py."""

    path: Annotated[str, Field(min_length=1)]
    """Folder with manifest.json. A relative path is taken from the recipe's own folder."""
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """How many times the source's examples are seen in one epoch; 2.5 means two and a half times."""


class EmbeddedCorpus(Section):
    """The text every machine already has: docstrings of the installed packages and the standard library."""

    type: Literal["embedded"] = "embedded"
    tokenizer_kind: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    """Kind of the tokenizer trained on this text; roberta wants "bpe" or "unigram", the other families "wordpiece"."""
    vocab_size: Annotated[int, Field(ge=8, le=2**24)]
    """Pieces of the tokenizer trained on this text; equals model.vocab_size."""
    lowercase: bool = True
    """Uncased tokenizer; false with any other kind than "wordpiece"."""
    max_bytes: PositiveInt = 20_000_000
    """Upper bound on the text that is read, in bytes of UTF-8."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.02
    """Share of the documents held out for validation."""

    @model_validator(mode="after")
    def _check(self) -> EmbeddedCorpus:
        if self.lowercase and self.tokenizer_kind != "wordpiece":
            raise ValueError(f'lowercase is true, but "{self.tokenizer_kind}" keeps capitals: wanted false')
        return self


class ShardCorpus(Section):
    """Token shards, one or several weighted folders."""

    type: Literal["shards"] = "shards"
    sources: Annotated[tuple[ShardSource, ...], Field(min_length=1)]
    """The shard folders."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """Tokenizer folder; its fingerprint must be the one stored in every manifest."""
    temperature: Annotated[float, Field(ge=1.0, le=100.0)] = 1.0
    """Sources are drawn from in proportion to (weight x tokens) ^ (1 / temperature): above 1 small ones more often."""

    @model_validator(mode="after")
    def _check(self) -> ShardCorpus:
        paths = [source.path for source in self.sources]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise ValueError(f"sources names {twice} twice: name it once and give it a weight")
        return self


ExportedPairName = Literal["nsp", "sop", "none"]
SentencePairName = Literal["nsp", "sop", "structure", "none"]


class SequenceConfig(Section):
    """How documents become examples."""

    max_seq_length: Annotated[int, Field(ge=8, le=2**20)] = 128
    """Longest example in tokens, [CLS] and [SEP] included."""
    sentence_pair: SentencePairName = "nsp"
    """nsp: next sentence or a random one (BERT). sop: two segments in order or swapped (ALBERT). structure: next,
    previous or of another document (StructBERT). none: no pair."""
    short_seq_prob: Probability = 0.1
    """Share of examples whose target length is drawn from 2..max_seq_length instead of being the maximum."""
    cross_documents: bool = False
    """With sentence_pair "none": fill an example from several documents, separated by [SEP]."""
    whole_sentences: bool = True
    """An example holds sentences that fit; false, with sentence_pair "none", cuts a document wherever one is full."""

    @property
    def pair_classes(self) -> int:
        """How many kinds of pairs the head for pairs tells apart; 0 without pairs."""
        return {"none": 0, "structure": 3}.get(self.sentence_pair, 2)

    @property
    def exported_pair(self) -> ExportedPairName:
        """What an export has a head for: of "structure" what of it is "sop", for transformers' head has two classes."""
        return "sop" if self.sentence_pair == "structure" else self.sentence_pair

    @model_validator(mode="after")
    def _check(self) -> SequenceConfig:
        if self.cross_documents and self.sentence_pair != "none":
            raise ValueError(f'cross_documents needs sentence_pair "none", not "{self.sentence_pair}"')
        if not self.whole_sentences and (self.sentence_pair != "none" or self.short_seq_prob):
            raise ValueError(
                'whole_sentences false needs sentence_pair "none" and short_seq_prob 0, not '
                f'"{self.sentence_pair}" and {self.short_seq_prob:g}'
            )
        return self


class MaskingConfig(Section):
    """The masked language modelling objective."""

    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the tokens that are predicted."""
    mask_token_fraction: Probability = 0.8
    """Share of the predicted tokens replaced by [MASK]."""
    random_token_fraction: Probability = 0.1
    """Share of the predicted tokens replaced by a random piece; the rest stays as it is."""
    whole_word_mask: bool = False
    """Mask all pieces of a word together."""
    span_mask: bool = False
    """Mask runs of whole words (SpanBERT): their number geometric with p 0.2, at most 10; wants whole_word_mask."""
    word_segmenter: Literal["wordpiece", "jieba", "word_list"] = "wordpiece"
    """What a word is: by the tokenizer, Chinese words by jieba (extra "zh"), or the longest match in word_list."""
    word_list: Annotated[str, Field(min_length=1)] | None = None
    """Text file with one word per line, for word_segmenter "word_list"."""
    max_predictions_per_seq: PositiveInt | None = None
    """Upper bound on predicted tokens per example; null means no bound."""

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        total = self.mask_token_fraction + self.random_token_fraction
        if total > 1.0 + 1e-9:
            raise ValueError(
                f"mask_token_fraction {self.mask_token_fraction} + random_token_fraction "
                f"{self.random_token_fraction} is {total}, more than 1"
            )
        if self.span_mask and not self.whole_word_mask:
            raise ValueError("span_mask takes whole words: wanted whole_word_mask true")
        if (self.word_segmenter == "word_list") != (self.word_list is not None):
            raise ValueError(f'word_list is for word_segmenter "word_list", which is "{self.word_segmenter}" here')
        if self.word_segmenter != "wordpiece" and not self.whole_word_mask:
            raise ValueError(f'word_segmenter "{self.word_segmenter}" needs whole_word_mask: true')
        return self
