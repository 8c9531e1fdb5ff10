"""An unpadded model on the fused operators: equal to plain, and Triton's equal to the torch references with one key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import unpad_cases as cases
from torch import nn

from bert_kernels.attention import attention_reference
from bert_kernels.hf import describe, layers, unpad
from bert_kernels.hf.layers import is_plain
from bert_kernels.hf.operators import SITE, attention_over_tokens, operators_for
from bert_kernels.hf.packing import pack_bounds

FUSED = ("BertForMaskedLM", "RobertaForSequenceClassification", "ElectraForTokenClassification")
CALLED = ("DistilBertForMaskedLM", "ModernBertForTokenClassification")
DROPOUT = {"hidden_dropout_prob": 0.25, "attention_probs_dropout_prob": 0.25}


def trained(model: Any, batch: cases.Batch, *, seed: int = 7) -> Any:
    """Return the output of a training call, after its backward."""
    torch.manual_seed(seed)
    output = model.train()(**batch.inputs, output_hidden_states=True)
    output.loss.backward()
    return output


@pytest.mark.parametrize("mask", ["ragged", "full", "none", "holes"])
@pytest.mark.parametrize("name", [*FUSED, *CALLED])
def test_the_references_give_the_numbers_of_the_plain_model(name: str, mask: str) -> None:
    mask = "left" if (name[:6], mask) == ("Modern", "holes") else mask  # a hole is refused there
    plain, ours = cases.pair(name, kernels="torch")
    batch = cases.make_batch(name, mask)
    theirs, mine = trained(plain, batch), trained(ours, batch)
    torch.testing.assert_close(mine.loss, theirs.loss)
    for one, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(one[batch.keep], other[batch.keep])
    cases.assert_same_gradients(ours, plain)


def test_a_window_over_a_hole_is_refused_where_the_operator_counts_tokens() -> None:
    model = unpad(cases.make_model("ModernBertModel"), kernels="torch")
    with pytest.raises(ValueError, match="attention_mask has a hole"):
        model(**cases.make_batch("ModernBertModel", "holes").inputs)


def test_triton_draws_the_masks_of_the_references_and_repeats_its_bits() -> None:
    small = DROPOUT | {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 16}
    reference, triton = (
        unpad(cases.make_model("BertForMaskedLM", **small).float(), kernels=kernels) for kernels in ("torch", "triton")
    )
    again = copy.deepcopy(triton)
    batch = cases.make_batch("BertForMaskedLM")
    wanted, found = trained(reference, batch), trained(triton, batch)
    torch.testing.assert_close(found.loss, wanted.loss, atol=2e-5, rtol=2e-5)
    cases.assert_same_gradients(triton, reference, limit=2e-4)
    other = trained(copy.deepcopy(reference), batch, seed=8).loss.detach()
    assert abs(float(other - wanted.loss.detach())) > 1e-4
    with torch.no_grad():
        torch.manual_seed(7)
        assert torch.equal(again.train()(**batch.inputs).loss, found.loss)


def test_recomputed_layers_draw_the_same_masks() -> None:
    kept = unpad(cases.make_model("BertForMaskedLM", **DROPOUT), kernels="torch")
    again = copy.deepcopy(kept)
    # The masks come from the call's key, not from a state of the generator that a recomputation would restore.
    again.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for model in (kept, again):
        model.bert.embeddings.dropout.p = 0.0
    batch = cases.make_batch("BertForMaskedLM")
    assert torch.equal(trained(again, batch).loss, trained(kept, batch).loss)
    cases.assert_same_gradients(again, kept)


def test_each_layer_drops_by_a_mask_of_its_own() -> None:
    model = unpad(cases.make_model("DistilBertModel", attention_dropout=0.5), kernels="torch").train()
    sites = [getattr(each.attention, SITE) for each in model.transformer.layer]
    assert sites == [0, 3]


def test_the_attention_function_draws_by_the_site_of_its_module() -> None:
    packing = pack_bounds(torch.tensor([0, 5, 12]), 12)
    packing.operators = operators_for("torch", torch.device("cpu"))
    qkv_T3HK = torch.randn(12, 3, 2, 4)
    query, key, value = (x.transpose(0, 1)[None] for x in qkv_T3HK.unbind(1))
    module = nn.Module()
    for site in (3, 6):
        setattr(module, SITE, site)
        found, _ = attention_over_tokens(module, query, key, value, None, dropout=0.5, bert_kernels_packing=packing)
        wanted = attention_reference(
            qkv_T3HK, packing.cu_seqlens, 7, dropout_p=0.5, dropout_seed=packing.key(), site=site
        )
        torch.testing.assert_close(found[0], wanted)


def test_evaluation_draws_nothing() -> None:
    model = unpad(cases.make_model("BertModel", **DROPOUT), kernels="torch").eval()
    before = torch.get_rng_state()
    model(**cases.make_batch("BertModel").inputs)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_switched_on_alone_drops_in_evaluation_too() -> None:
    model = unpad(cases.make_model("BertModel", **DROPOUT), kernels="torch").eval()
    inputs = cases.make_batch("BertModel").inputs
    quiet = model(**inputs)[0]
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.allclose(model(**inputs)[0], quiet)


def count_calls(model: nn.Module, names: tuple[str, ...]) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)
    for path, module in model.named_modules():
        if (name := path.rpartition(".")[2]) in names and "layer." in path:

            def count(module: Any, args: Any, output: Any, name: str = name) -> None:
                calls[name] += 1

            module.register_forward_hook(count)
    return calls


def test_a_part_with_a_hook_or_another_class_is_called_and_the_numbers_stay() -> None:
    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * 1.5

    plain = cases.make_model("BertForTokenClassification")
    plain.bert.encoder.layer[0].attention.self.query = Adapter(plain.bert.encoder.layer[0].attention.self.query)
    ours = unpad(copy.deepcopy(plain), kernels="torch")
    names = ("key", "dense", "LayerNorm", "dropout")
    assert all(is_plain(module) for path, module in ours.named_modules() if path.rpartition(".")[2] in names)
    calls = count_calls(ours, names)
    batch = cases.make_batch("BertForTokenClassification")
    theirs, mine = trained(plain, batch), trained(ours, batch)
    torch.testing.assert_close(mine.loss, theirs.loss)
    cases.assert_same_gradients(ours, plain)
    # Two layers, each with two outputs (dense, dropout, LayerNorm), an intermediate dense, and a dropout of attention.
    assert calls == {"key": 2, "dense": 6, "LayerNorm": 4, "dropout": 4}


def test_scale_and_epsilon_are_those_of_the_layer() -> None:
    plain = cases.make_model("BertModel", layer_norm_eps=0.5)
    for layer in plain.encoder.layer:
        layer.attention.self.scaling = 0.9
    ours = unpad(copy.deepcopy(plain), kernels="torch")
    inputs = cases.make_batch("BertModel").inputs
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours(**inputs)[0][mask], plain(**inputs)[0][mask])


def test_both_outputs_of_a_layer_drop_by_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unpad(cases.make_model("BertModel", **DROPOUT), kernels="torch").train()
    reference, sites = layers._add_and_norm, []

    def watched(*args: Any, **options: Any) -> Any:
        sites.append(options["site"])
        return reference(*args, **options)

    monkeypatch.setattr(layers, "_add_and_norm", watched)
    model(**cases.make_batch("BertModel").inputs)
    assert sites == [1, 2, 4, 5]


@pytest.mark.parametrize("watch", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_module_whose_gradients_are_watched_is_called(watch: str) -> None:
    module = nn.Linear(2, 2)
    assert is_plain(module)
    getattr(module, watch)(lambda *args: None)
    assert not is_plain(module)


def test_plain_parts_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unpad(cases.make_model("BertModel"), kernels="torch")
    seen: list[Any] = []
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: seen.append(self) or nn.functional.linear(x, self.weight, self.bias)
    )
    model(**cases.make_batch("BertModel").inputs)
    assert seen == [model.pooler.dense]
    assert "2 layers fused by torch references" in describe(model)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FUSED, *CALLED])
def test_on_a_card_the_operators_give_the_numbers_of_the_plain_model(name: str) -> None:
    plain, ours = (model.float().cuda() for model in cases.pair(name))
    batch = cases.make_batch(name)
    inputs = {key: value.cuda() for key, value in batch.inputs.items()}
    theirs, mine = (model.train()(**inputs, output_hidden_states=True) for model in (plain, ours))
    for one, other in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(one.cpu()[batch.keep], other.cpu()[batch.keep], atol=2e-3, rtol=2e-3)
    theirs.loss.backward(), mine.loss.backward()
    cases.assert_same_gradients(ours, plain, limit=1e-2)
