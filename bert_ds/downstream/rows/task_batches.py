"""Which sequences a step of fine-tuning sees: the order of pre-training over the features of a task."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.corpus.batches.batch_order import Mixture, deal, global_batch
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack

CountTargets = Callable[[Sequence[Feature]], dict[str, float]]


def step_batches(
    features: Sequence[Feature],
    start_step: int,
    *,
    seed: int,
    rank: int,
    split: BatchSplit,
    count_targets: CountTargets,
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of every step, without end.

    An epoch is a permutation of all sequences; a global batch may straddle two. It does not depend on the number of
    ranks, and any step is entered at once.

    Args:
        features: of the training rows.
        start_step: first step, from 0.
        seed: of the run.
        rank: of this process.
        split: of the global batch.
        count_targets: of the kind.
    """
    lengths = np.array([len(feature.input_ids) for feature in features])
    mixture = Mixture((len(features),), (1.0,))
    step = start_step
    while True:
        triples = global_batch(step, seed=seed, mixture=mixture, train_batch_size=split.train_batch_size)
        chosen = triples[:, 2]
        part_of = deal(lengths[chosen], num_parts=split.num_parts)
        groups = [[features[index] for index in chosen[part_of == part]] for part in split.parts_of(rank)]
        yield [pack(group, counts=count_targets(group)) for group in groups]
        step += 1


def features_fingerprint(features: Sequence[Feature], *, settings: str) -> str:
    """Return the sha256 of all that must be equal for a resumed run to go on with the same batches.

    Args:
        features: of the training rows.
        settings: everything else that decides the batches, as text.
    """
    digest = hashlib.sha256(settings.encode())
    for feature in features:
        for array in (feature.input_ids, feature.token_type_ids, *feature.targets.values()):
            digest.update(array.tobytes())
    return digest.hexdigest()
