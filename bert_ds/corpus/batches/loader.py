"""Shard folders in, micro-batches out: the one object through which training sees the corpus.

Everything is a pure function of (seed, step): worker processes only compute ahead, and a run that resumes at step s
reads what the uninterrupted run read at step s. Every rank plans the whole global batch, which costs microseconds per
example, and reads tokens only for its own part.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bert_ds.basics.input_gate import read_bytes
from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.basics.processes import held_back_stop_signals
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, SequenceConfig
from bert_ds.corpus.batches.batch_examples import BatchExamples
from bert_ds.corpus.batches.batch_order import Mixture, balance, deal, global_batch
from bert_ds.corpus.batches.batch_stages import DataSettings, OpenStage, open_stages, stage_facts
from bert_ds.corpus.batches.collate import collate
from bert_ds.corpus.batches.evaluation_masks import EvaluationMasker, split_key
from bert_ds.corpus.batches.few_shapes import filled
from bert_ds.corpus.batches.mlm_masking import MaskedExample, Masker
from bert_ds.corpus.batches.sequences import ExampleTable, build_examples, content_hash
from bert_ds.corpus.batches.unigram import piece_counts, unigram_cross_entropy
from bert_ds.corpus.shards.shard_folder import ShardSplit, open_shards
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer

_ORDER_FORMAT = 1
_EVALUATION_SEED = 0x5EED
_PREFETCHED_STEPS = 3
_SAMPLED_STEPS = 4
_END_OF_STEPS = 1 << 60


class Source(NamedTuple):
    """A shard folder of the mixture."""

    folder: Path
    name: str
    weight: float = 1.0


class SourceCount(NamedTuple):
    """What was seen of a source."""

    examples: int
    tokens: int


class PretrainingData:
    """The examples of a run, their order and their masks."""

    def __init__(
        self, sources: Sequence[Source], tokenizer: Path, *, settings: DataSettings, cache_dir: Path | None = None
    ) -> None:
        """Open the shards and find their examples, which takes seconds for the first time and is cached.

        Args:
            sources: at least one; names differ.
            tokenizer: folder of the tokenizer that all shards were built with.
            settings: of the recipe.
            cache_dir: where tables of examples go when a shard folder is read-only.

        Raises:
            DataError: shards are damaged, unfinished or of another tokenizer, or hold too little text.
            ValueError: the masking settings cannot be carried out.
        """
        self.names = [source.name for source in sources]
        if len(set(self.names)) != len(self.names) or not sources:
            raise ValueError(f"sources are named {self.names}: wanted at least one, and every name once")
        self._sources = list(sources)
        self._settings = settings
        self._cache_dir = cache_dir
        self._tokenizer = load_tokenizer(tokenizer)
        wanted = self._tokenizer.fingerprint
        self._splits = [open_shards(source.folder, "train", fingerprint=wanted) for source in sources]
        self._stages = open_stages(
            settings,
            tuple(source.weight for source in sources),
            tables_of=lambda sequences: [self._table(split, sequences, settings.seed) for split in self._splits],
            masker_of=lambda masking: Masker(self._tokenizer, masking, seed=settings.seed),
        )
        self.mixture = self._stages[-1].mixture

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 of everything that must be equal for a resumed run to go on with the same batches."""
        settings = self._settings
        unsaid = {"whole_sentences": True, "span_mask": False}.items()  # as it was before there were these keys
        dumped = (part.model_dump(mode="json") for part in (settings.sequences, settings.masking))
        sequences, masking = (dict(part.items() - unsaid) for part in dumped)
        if settings.masking.word_list is not None:
            masking["word_list"] = hashlib.sha256(read_bytes(settings.masking.word_list, error=DataError)).hexdigest()
        if settings.masking.word_segmenter == "jieba":
            masking["word_segmenter"] = f"jieba {version('jieba')}"
        content = {
            "format": _ORDER_FORMAT,
            "sources": [[content_hash(split) for split in self._splits], self.mixture.weights],
            "sequences": sequences,
            "masking": masking,
            "seed": settings.seed,
            "train_batch_size": settings.train_batch_size,
            **({"stages": stages} if (stages := stage_facts(settings)) else {}),  # before stages there was no such key
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def facts(self, *, num_parts: int = 1) -> dict[str, object]:
        """Describe the data for the log, lengths and balance from the first steps; of stages the last.

        Args:
            num_parts: ranks x micro-steps that a global batch is dealt to.
        """
        steps = _sampled_lengths(self._stages[-1])
        mean_length = float(np.concatenate(steps).mean())
        fullest = max(balance(lengths, deal(lengths, num_parts=num_parts)) for lengths in steps)
        return {
            "examples_per_epoch": self.mixture.epoch_size,
            "examples_per_epoch_by_source": dict(zip(self.names, self.mixture.draws_per_epoch, strict=True)),
            "tokens_per_epoch": round(mean_length * self.mixture.epoch_size),
            "mean_length": mean_length,
            "padding_avoided_fraction": 1.0 - mean_length / self._settings.sequences.max_seq_length,
            "tokens_max_over_mean": fullest,
            **({"mean_length_by_stage": self.mean_lengths()} if len(self._stages) > 1 else {}),
        }

    def mean_lengths(self) -> list[float]:
        """Tokens of an example in each stage of the run, from the stage's first steps."""
        return [float(np.concatenate(_sampled_lengths(stage)).mean()) for stage in self._stages]

    def step_batches(
        self, start_step: int, *, rank: int, split: BatchSplit, num_workers: int
    ) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of this rank, one list per optimizer step, without end.

        Args:
            start_step: first step, from 0.
            rank: of this process, 0 to split.world_size - 1.
            split: of the recipe's own global batch; what a stage sees instead is cut into as many parts.
            num_workers: processes that compute ahead; 0 computes in this one.

        Returns:
            An iterator of lists of split.accumulation batches.
        """
        if split.train_batch_size != self._settings.train_batch_size:
            raise ValueError(f"{split} is not one of train_batch_size {self._settings.train_batch_size}")
        loader = DataLoader(
            _Steps(self, rank, split),
            batch_size=None,
            sampler=range(start_step, _END_OF_STEPS),
            num_workers=num_workers,
            collate_fn=_unchanged,
            prefetch_factor=_PREFETCHED_STEPS if num_workers else None,
            multiprocessing_context="fork" if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            # The default would draw from torch's global generator, which is the run's own.
            generator=torch.Generator(),
        )
        # Whoever ends a launch signals all its processes, and DeepSpeed's launcher those that its ranks have started
        # once more. A rank that is about to save needs its loader processes for a step yet: they never hear of it.
        with held_back_stop_signals():
            batches = iter(loader)
        if num_workers:
            atexit.register(_end_loader_processes)
        return batches

    def evaluation_batches(
        self, num_examples: int, *, batch_size: int, rank: int, world_size: int, source: str | None = None
    ) -> Iterator[MicroBatch]:
        """Yield this rank's share of held-out examples, of a named source alone, with the masks of `evaluation_masks`.

        Every rank gets the same number of batches and none is empty; their sizes differ by one at most. The examples
        are the same for any seed and any number of ranks, but with a batch_size of 1 those beyond a multiple of
        world_size are left out.

        Raises:
            DataError: there are fewer validation examples than ranks.
        """
        tables = [table for name, table in self._validation_tables if source in (None, name)]
        count = min(num_examples, sum(table.num_examples for table in tables))
        num_batches = min(-(-count // (batch_size * world_size)), count // world_size)
        if not num_batches:
            raise DataError(f"{count} validation examples are too few for {world_size} ranks: wanted one for each")
        mixture = Mixture(tuple(table.num_examples for table in tables), (1.0,) * len(tables))
        count = min(count, num_batches * world_size * batch_size)
        examples = BatchExamples(
            tables,
            global_batch(0, seed=_EVALUATION_SEED, mixture=mixture, train_batch_size=count),
            seed=_EVALUATION_SEED,
        )
        parts = deal(examples.lengths, num_parts=num_batches * world_size)
        special = self._tokenizer.special_ids
        masker = EvaluationMasker(vocab_size=self._tokenizer.vocab_size, special_ids=special, mask_id=special.mask)
        keys = np.array([split_key(table.split) for table in tables], dtype=np.uint64)
        own = range(rank * num_batches, (rank + 1) * num_batches)
        return (self._shaped(examples.pack_held_out(np.flatnonzero(parts == part), masker, keys=keys)) for part in own)

    def unigram_cross_entropy(self, num_examples: int, *, batch_size: int, world_size: int) -> float:
        """Cross-entropy in nats of all ranks' evaluated targets at [MASK] under the training text's frequencies."""
        batches = (
            batch
            for rank in range(world_size)
            for batch in self.evaluation_batches(num_examples, batch_size=batch_size, rank=rank, world_size=world_size)
        )
        return unigram_cross_entropy(self.piece_counts, batches)

    @cached_property
    def piece_counts(self) -> np.ndarray:
        """How often each piece is in the training text, see `unigram.piece_counts`."""
        return piece_counts(self._splits)

    def longest_batch(self, micro_batch_size: int, *, stage: int = -1) -> MicroBatch:
        """The largest micro-batch that can come in a stage: full sequences with as many targets as allowed."""
        length, masker = self._stages[stage].settings.sequences.max_seq_length, self._stages[stage].masker
        num_masked = min(int(masker.max_predictions(np.array([length]))[0]), length - 2)
        special = self._tokenizer.special_ids
        input_ids = np.full(length, special.mask, dtype=np.int32)
        input_ids[[0, -1]] = special.cls, special.sep
        example = MaskedExample(
            input_ids=input_ids,
            token_type_ids=np.zeros(length, dtype=np.int8),
            pair_label=IGNORE_INDEX if self._settings.sequences.sentence_pair == "none" else 0,
            positions=np.arange(1, 1 + num_masked),
            labels=np.full(num_masked, special.unk, dtype=np.int32),
            key=(0, 0, 0),
        )
        return self._shaped(collate([example] * micro_batch_size))

    def source_counts(self, first_step: int, last_step: int) -> dict[str, SourceCount]:
        """Examples and tokens of each source in steps first_step to last_step - 1, over all ranks."""
        totals = np.zeros((len(self.names), 2), dtype=np.int64)
        for step in range(first_step, last_step):
            for source, chosen in self._stage_of(step).examples(step).by_source.items():
                totals[source] += len(chosen.lengths), chosen.lengths.sum()
        return {name: SourceCount(*row) for name, row in zip(self.names, totals.tolist(), strict=True)}

    def rank_batches(self, step: int, *, rank: int, split: BatchSplit) -> list[MicroBatch]:
        """The micro-batches of one rank in one step."""
        stage = self._stage_of(step)
        examples = stage.examples(step)
        parts = deal(examples.lengths, num_parts=split.num_parts)
        return [
            self._shaped(examples.pack(np.flatnonzero(parts == part), stage.masker)) for part in split.parts_of(rank)
        ]

    def _shaped(self, batch: MicroBatch) -> MicroBatch:
        return filled(batch) if self._settings.few_shapes else batch

    def _stage_of(self, step: int) -> OpenStage:
        return next(stage for stage in reversed(self._stages) if stage.settings.first_step <= step)

    @cached_property
    def _validation_tables(self) -> list[tuple[str, ExampleTable]]:
        splits = [(source.name, open_shards(source.folder, "validation")) for source in self._sources]
        sequences = self._settings.sequences
        return [(name, self._table(split, sequences, _EVALUATION_SEED)) for name, split in splits if split.num_tokens]

    def _table(self, split: ShardSplit, sequences: SequenceConfig, seed: int) -> ExampleTable:
        cache_dirs = (split.folder,) if self._cache_dir is None else (split.folder, self._cache_dir)
        return build_examples(split, sequences, seed=seed, cache_dirs=cache_dirs)


class _Steps(Dataset[list[MicroBatch]]):
    """The batches of one rank, by step."""

    def __init__(self, data: PretrainingData, rank: int, split: BatchSplit) -> None:
        self._data, self._rank, self._split = data, rank, split

    def __getitem__(self, step: int) -> list[MicroBatch]:
        return self._data.rank_batches(step, rank=self._rank, split=self._split)


def _sampled_lengths(stage: OpenStage) -> list[np.ndarray]:
    first = stage.settings.first_step
    return [stage.examples(step).lengths for step in range(first, first + _SAMPLED_STEPS)]


def _end_loader_processes() -> None:
    """End loader processes that an error has left behind: multiprocessing would send SIGTERM and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error where a loader process is killed
    for process in multiprocessing.active_children():
        process.kill()


def _unchanged(batches: list[MicroBatch]) -> list[MicroBatch]:
    return batches
