"""Every check of a fine-tuning that needs the task, the DeepSpeed file and the shape of the model together."""

from __future__ import annotations

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_config import DsConfig, pair_problems
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.run_checks import schedule_problems, spread_problems
from bert_ds.configuration.task.task_config import TrainedTask


def checked_split(run: TrainedTask, ds: DsConfig, world_size: int, *, knows_steps: bool = True) -> BatchSplit:
    """Return how the global batch of a task is cut, after every check that needs both files and the model.

    Args:
        run: the task and its model.
        ds: the DeepSpeed file.
        world_size: number of ranks.
        knows_steps: whether the number of steps is that of the training; False leaves out what depends on it.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    task, model = run.task, run.model
    in_task = spread_problems(run, stage=ds.zero_stage, offloaded=ds.offload_optimizer != "none")
    in_task += schedule_problems(run.schedule, run.training.steps) if knows_steps else []
    if task.max_seq_length > model.max_position_embeddings:
        text = f"{task.max_seq_length} is more than the model's max_position_embeddings {model.max_position_embeddings}"
        in_task.append(Problem("max_seq_length", text))
    if task.freeze.layers > model.num_hidden_layers:
        text = f"{task.freeze.layers} is more than the model's num_hidden_layers {model.num_hidden_layers}"
        in_task.append(Problem("freeze.layers", text))
    if (longest := max(task.embedding.matryoshka, default=0)) > model.hidden_size:
        text = f"{longest} is more than the model's hidden_size {model.hidden_size}"
        in_task.append(Problem("sentence_embedding.matryoshka", text))
    if task.embedding.pooling == "last_layers" and task.embedding.pooled_layers > model.num_hidden_layers:
        text = f"{task.embedding.pooled_layers} is more than the model's num_hidden_layers {model.num_hidden_layers}"
        in_task.append(Problem("sentence_embedding.pooled_layers", text))
    if model.shares_layers and task.freeze.layers:
        text = f"{task.freeze.layers} of this model's layers cannot be frozen alone, they share weights: wanted 0"
        in_task.append(Problem("freeze.layers", text))
    if model.shares_layers and task.layerwise_lr_decay != 1.0:
        text = f"{task.layerwise_lr_decay} wants layers with weights of their own, this model's share them: wanted 1.0"
        in_task.append(Problem("layerwise_lr_decay", text))
    in_ds = [one for one in pair_problems(run, ds) if knows_steps or not one.path.startswith("scheduler")]
    split = ds.split_batch(run, world_size)
    in_ds += [split] if isinstance(split, Problem) else []
    lines = [problem.line(ds.recipe_name) for problem in in_task] + [problem.line(ds.name) for problem in in_ds]
    if lines:
        raise ConfigError("\n".join(lines))
    assert isinstance(split, BatchSplit)
    return split
