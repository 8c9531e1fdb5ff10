"""An unpadded model stays what it was to everybody else: names, parameters, copies, files, threads; and repad."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import unpad_cases as cases
from torch import nn
from transformers.models.bert.modeling_bert import BertLayer

from bert_kernels.hf import describe, repad, unpad
from bert_kernels.hf.operators import attention_over_tokens, operators_for
from bert_kernels.hf.packing import pack_bounds, pack_rows


def facts(model: nn.Module) -> dict[str, Any]:
    return {
        "classes": [str(type(module)) for module in model.modules()],
        "names": [name for name, _ in model.named_parameters()],
        "state": list(model.state_dict()),
        "signature": str(inspect.signature(model.forward)),
        "instances": [
            isinstance(model, transformers.PreTrainedModel),
            isinstance(model, transformers.BertForMaskedLM),
        ],
        "config": model.config.to_dict(),
    }


def test_names_parameters_signature_and_config_stay() -> None:
    plain, ours = cases.pair("BertForMaskedLM")
    assert facts(ours) == facts(plain)
    assert unpad(model := cases.make_model("BertModel")) is model


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForSequenceClassification", "BertModel"])
def test_repad_gives_back_the_plain_model_and_its_bits(name: str) -> None:
    plain, ours = cases.pair(name)
    assert repad(ours) is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in plain.modules()]
    assert [sorted(module.__dict__) for module in ours.modules()] == [
        sorted(module.__dict__) for module in plain.modules()
    ]
    assert ours.config._attn_implementation == "sdpa"
    inputs = cases.make_batch(name).inputs
    assert torch.equal(ours.train()(**inputs)[0], plain.train()(**inputs)[0])
    assert "computes without padding" in describe(unpad(ours))


def test_repad_gives_back_the_attention_that_was_set() -> None:
    model = cases.make_model("BertModel")
    model.set_attn_implementation("eager")
    assert repad(unpad(model)).config._attn_implementation == "eager"


def test_repad_gives_a_model_of_an_unpadded_one_s_config_an_attention_of_transformers() -> None:
    heir = transformers.BertModel(unpad(cases.make_model("BertModel")).config)
    assert repad(unpad(heir)).config._attn_implementation == "sdpa"


def test_a_head_and_a_layer_whose_forward_is_a_person_s_own_are_left_alone() -> None:
    class Head(transformers.BertForMaskedLM):
        def forward(self, **inputs: Any) -> Any:
            return super().forward(**inputs)

    class Layer(BertLayer):
        def forward(self, *args: Any, **options: Any) -> Any:
            return super().forward(*args, **options)

    model = Head(cases.make_model("BertForMaskedLM").config)
    model.bert.encoder.layer[0].__class__ = Layer
    said = describe(unpad(model, kernels="torch"))
    assert "1 layers fused by" in said and "labelled tokens" not in said
    assert type(model) is Head and type(model.bert.encoder.layer[0]) is Layer


def test_words_without_the_label_of_their_pair_have_no_loss_and_all_their_logits() -> None:
    plain, ours = cases.pair("BertForPreTraining")
    inputs = {name: x for name, x in cases.make_batch("BertForPreTraining").inputs.items() if "next" not in name}
    mine, theirs = ours.train()(**inputs), plain.train()(**inputs)
    assert mine.loss is None and theirs.loss is None
    assert mine.prediction_logits.shape == theirs.prediction_logits.shape


def test_rows_of_equal_length_lie_side_by_side_the_longest_first() -> None:
    lengths = torch.tensor([3, 5, 0, 3, 5])
    packing = pack_rows(torch.arange(6) < lengths[:, None], even_if_full=False)
    assert packing is not None and (packing.lengths, packing.groups) == ([5, 5, 3, 3], [(2, 5), (2, 3)])
    assert packing.places(torch.tensor([6, 4, 0, 29])).tolist() == [0, -1, 10, -1]


def test_only_a_sequence_that_is_longer_than_the_window_reaches_over_a_hole() -> None:
    keep = torch.tensor([[True, True, False, True], [True, False, False, False]])
    packing = pack_rows(keep, even_if_full=False)
    assert packing is not None
    assert [packing.reaches_over_hole(window) for window in (2, 3)] == [True, False]


def is_unpadded(model: Any) -> bool:
    batch = cases.make_batch("BertModel", labels=False)
    hidden = model(**batch.inputs, output_hidden_states=True).hidden_states[-1]
    return not hidden[~batch.keep].any() and bool(hidden[batch.keep].all())


def test_copies_and_pickles_are_unpadded_and_the_original_lives_on() -> None:
    ours = unpad(cases.make_model("BertForMaskedLM"))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(ours), torch.load(buffer, weights_only=False)]
    copies += [pickle.loads(pickle.dumps(ours, protocol=0))]
    inputs = cases.make_batch("BertForMaskedLM").inputs
    for each in copies:
        assert is_unpadded(each) and each.train()(**inputs).get("logits") is None
        assert torch.equal(each.train()(**inputs).loss, ours.train()(**inputs).loss)
        assert not is_unpadded(repad(each.eval()))
    assert is_unpadded(ours.eval())


def test_a_saved_folder_is_that_of_a_plain_model_and_loads_as_one(tmp_path: Path) -> None:
    plain, ours = cases.pair("BertForMaskedLM")
    for model, folder in ((plain, tmp_path / "plain"), (ours, tmp_path / "ours")):
        model.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == files
    assert json.loads(files["config.json"])["architectures"] == ["BertForMaskedLM"]
    for made in (transformers.AutoModelForMaskedLM, type(ours)):
        loaded = made.from_pretrained(tmp_path / "ours")
        assert loaded.config._attn_implementation == "sdpa" and not is_unpadded(loaded)
        assert is_unpadded(unpad(loaded))


def test_a_model_of_a_unpadded_class_that_nobody_unpadded_is_plain() -> None:
    ours = unpad(cases.make_model("BertForMaskedLM"))
    heir = type(ours)(cases.make_model("BertForMaskedLM").config).train()
    assert heir(**cases.make_batch("BertForMaskedLM").inputs).logits.shape == (4, 12, 67)


def test_threads_may_share_a_model() -> None:
    plain, ours = cases.pair("BertForSequenceClassification")
    batches = [
        cases.make_batch("BertForSequenceClassification", mask, seed=i) for i, mask in enumerate(cases.MASKS[:4])
    ]
    batches = [batch for batch in batches if batch.keep[:, 0].all()]
    wrong: list[str] = []

    def work(batch: cases.Batch) -> None:
        with torch.no_grad():
            wanted = plain(**batch.inputs).logits
            for _ in range(10):
                if not torch.allclose(ours(**batch.inputs).logits, wanted, atol=1e-9):
                    wrong.append("another thread's rows")

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(batches) == 3 and wrong == []


def test_the_same_seed_gives_the_same_bits_with_dropout() -> None:
    ours = unpad(cases.make_model("ModernBertForMaskedLM", attention_dropout=0.2, mlp_dropout=0.2)).train()
    batch = cases.make_batch("ModernBertForMaskedLM")
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(ours(**batch.inputs).loss)
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("kernels", [None, "torch"])
def test_the_attention_function_minds_the_scale_and_the_window_that_it_is_given(kernels: Any) -> None:
    packing = pack_bounds(torch.tensor([0, 5, 12]), 12)
    packing.operators = None if kernels is None else operators_for(kernels, torch.device("cpu"))
    query, key, value = torch.randn(3, 1, 2, 12, 4, dtype=torch.float64).unbind()
    found, _ = attention_over_tokens(
        nn.Module(), query, key, value, None, scaling=0.3, sliding_window=3, bert_kernels_packing=packing
    )
    row = torch.arange(12)
    seen = ((row[:, None] - row).abs() <= 2) & ((row[:, None] < 5) == (row < 5))
    scores = (query @ key.transpose(-1, -2) * 0.3).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(found, (scores.softmax(-1) @ value).transpose(1, 2))


def test_dropout_of_attention_is_that_of_torch() -> None:
    """A row alone in its batch draws the masks that the plain model draws for it."""
    plain, ours = cases.pair("BertModel", attention_probs_dropout_prob=0.5)
    ids = torch.arange(1, 13)[None]
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.tensor([[1] * 12 + [0] * 4])
    torch.manual_seed(3)
    wanted = plain.train()(ids).last_hidden_state
    torch.manual_seed(3)
    found = ours.train()(padded, attention_mask=mask).last_hidden_state[:, :12]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "DistilBertForMaskedLM"])
def test_recomputed_layers_give_the_same_gradients(name: str, reentrant: bool) -> None:
    dropout = {"BertForMaskedLM": {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.2}}.get(name, {})
    kept = unpad(cases.make_model(name, **dropout)).train()
    again = copy.deepcopy(kept)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    inputs = cases.make_batch(name).inputs
    calls: list[int] = []
    next(m for m in again.modules() if type(m).__name__.endswith("Attention")).register_forward_hook(
        lambda *args: calls.append(1)
    )
    for model in (kept, again):
        torch.manual_seed(5)
        model(**inputs).loss.backward()
    assert len(calls) == 2
    cases.assert_same_gradients(again, kept)
