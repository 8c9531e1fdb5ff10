"""Waits that are put into the sources of a running process, to see that they are found (`fake_steps`)."""

from __future__ import annotations
import __future__

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Plant(NamedTuple):
    """A statement that becomes the first of a function."""

    module: str
    function: str
    """`name` or `Class.name`."""
    statement: str
    operator: str
    """Of the wait that it is."""
    case: str
    """Whose step runs the function."""

    @property
    def name(self) -> str:
        return f"{self.statement} in {self.function}"


_READ = "_local_scalar_dense"
PLANTS = tuple(
    Plant(*row)
    for row in (
        (
            "bert_ds.training.loop.step_loss", "step_loss",
            "loss_sums_L.sum().item()", _READ, "pretrain bert",
        ),
        (
            "bert_ds.training.loop.step_loss", "poison_if_not_finite",
            "assert loss.isfinite()", _READ, "pretrain bert",
        ),
        (
            "bert_ds.training.loop.loss_guard", "LossGuard.judge",
            "sums.new_tensor([1.0])", "_to_copy", "pretrain bert",
        ),
        (
            "bert_ds.basics.micro_batch", "MicroBatch.to",
            "self.targets['masked_labels'].clone().to(device)", "_to_copy", "pretrain bert",
        ),
        (
            "bert_ds.encoder.blocks", "first_rows",
            "cu_seqlens.nonzero()", "nonzero", "pretrain bert",
        ),
        (
            "bert_ds.encoder.bert_layers", "BertLayer.forward",
            "hidden_TD[hidden_TD > 0]", "index", "pretrain bert",
        ),
        (
            "bert_ds.encoder.families.bert", "BertPooler.forward",
            "hidden_TD + torch.zeros(hidden_TD.shape)", "add", "pretrain bert",
        ),
        (
            "bert_kernels.layer_norm", "layer_norm",
            "torch.ones(3).cuda()", "_to_copy", "pretrain bert, pre-norm",
        ),
        (
            "bert_kernels.attention", "_check_shapes",
            "cu_seqlens.tolist()", _READ, "pretrain modernbert",
        ),
        (
            "bert_kernels.bias_gelu", "bias_gelu_backward",
            "dy.max().cpu()", "_to_copy", "pretrain bert, recompute",
        ),
        (
            "bert_ds.training.optimizers.lamb", "trust_ratios",
            "torch.equal(sums_R2, sums_R2)", "equal", "stage 0 bert, lamb",
        ),
        (
            "bert_ds.training.optimizers.newton_schulz", "orthogonalise",
            "update_MN.unique()", "_unique2", "stage 0 bert, muon",
        ),
        (
            "bert_ds.encoder.objectives.distillation", "angle_loss",
            "hidden_TD[0, 0].item()", _READ, "pretrain bert, distillation",
        ),
        (
            "bert_ds.downstream.kinds.span_head", "softmax_parts",
            "torch.repeat_interleave(starts)", "repeat_interleave", "task bert, question_answering",
        ),
    )
)  # fmt: skip


@contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Let a function begin with another statement inside the block; its lines keep their file."""
    module = importlib.import_module(plant.module)
    *owners, name = plant.function.split(".")
    owner: Any = module if not owners else getattr(module, owners[0])
    original = getattr(owner, name)
    lines, first = inspect.getsourcelines(original)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    function.body[1:1] = ast.parse(plant.statement).body
    ast.fix_missing_locations(tree)
    ast.increment_lineno(tree, first - 1)
    found: dict[str, Any] = {}
    code = compile(tree, str(module.__file__), "exec", flags=__future__.annotations.compiler_flag)
    exec(code, module.__dict__, found)
    before = original.__code__  # the code is replaced, not the name, of which other modules have copies
    original.__code__ = found[name].__code__
    try:
        yield
    finally:
        original.__code__ = before
