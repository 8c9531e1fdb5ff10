"""What unpad cannot do is a sentence, at the call or when the model is given to it, never another number."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import unpad_cases as cases
from torch import nn

from bert_kernels.hf import describe, repad, unpad


class ForeignEncoder(transformers.BertModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def make(name: str, **settings: Any) -> Callable[[], Any]:
    return lambda: cases.make_model(name, **settings)


def foreign() -> nn.Module:
    return ForeignEncoder(cases.make_model("BertModel").config)


def other_forward() -> nn.Module:
    model = cases.make_model("BertModel")
    model.forward = lambda **kwargs: None
    return model


def engine(module: str) -> nn.Module:
    """A model as the engine of a library holds it."""
    found = type("Engine", (nn.Module,), {"__module__": module})()
    found.model = cases.make_model("BertModel")
    return found


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing to unpad": (
        lambda: nn.Linear(2, 2),
        "Linear holds no encoder of transformers that unpad knows: bert, rob",
    ),
    "another family": (
        lambda: transformers.MPNetModel(transformers.MPNetConfig(**cases.SETTINGS["Bert"])),
        "MPNetModel holds no encoder of transformers that unpad knows",
    ),
    "a second call": (lambda: unpad(cases.make_model("BertModel")), "BertModel is unpadded already"),
    "a second call on a part": (
        lambda: nn.Sequential(unpad(cases.make_model("BertModel"))),
        "Sequential is unpadded already",
    ),
    "a decoder": (make("BertForMaskedLM", is_decoder=True), "BertModel is a decoder (is_decoder)"),
    "cross-attention": (
        make("BertModel", is_decoder=True, add_cross_attention=True),
        "BertModel is a decoder (is_decoder)",
    ),
    "the head of a decoder": (make("RobertaForCausalLM"), "RobertaForCausalLM is the head of a decoder"),
    "the old head of a decoder": (make("BertLMHeadModel"), "BertLMHeadModel is the head of a decoder"),
    "a foreign class": (foreign, "ForeignEncoder has a forward of its own"),
    "a forward of its own": (other_forward, "BertModel has a forward of its own"),
    "parallel": (lambda: nn.DataParallel(cases.make_model("BertModel")), "DataParallel has wrapped the model"),
    "an engine": (lambda: engine("deepspeed.runtime.engine"), "Engine has wrapped the model: unpad and repad"),
    "compiled": (lambda: torch.compile(cases.make_model("BertModel")), "OptimizedModule has wrapped the model"),
    "cut feed-forward": (make("BertModel", chunk_size_feed_forward=4), "chunk_size_feed_forward cuts by length"),
    "a mean over padding": (make("ElectraForMultipleChoice", summary_type="mean"), "summary_type is 'mean'"),
    "positions that scale": (
        make(
            "ModernBertModel",
            rope_parameters={
                kind: {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
                for kind in ("full_attention", "sliding_attention")
            },
        ),
        "rope_type is ['dynamic', 'dynamic']",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_unpadded_is_refused_in_a_sentence_and_left_as_it_was(case: str) -> None:
    make_model, sentence = MODELS[case]
    model = make_model()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        unpad(model)
    assert [type(module) for module in model.modules()] == before


def test_relative_positions_are_refused() -> None:
    model = cases.make_model("BertModel")
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type is 'relative_key', wanted 'absolute'"):
        unpad(model)


def test_a_config_that_wants_probabilities_is_refused_before_and_after() -> None:
    model = cases.make_model("BertModel")
    ours = unpad(copy.deepcopy(model))
    for config in (model.config, ours.config):
        config.__dict__["_output_attentions"] = True
    with pytest.raises(ValueError, match="output_attentions is true"):
        unpad(model)
    with pytest.raises(ValueError, match="output_attentions is true"):
        ours(**cases.make_batch("BertModel").inputs)


def test_another_word_for_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels is 'cuda', wanted 'auto', 'triton' or 'torch'"):
        unpad(cases.make_model("BertModel"), kernels="cuda")  # type: ignore[arg-type]


def test_repad_wants_an_unpadded_model_that_nothing_has_wrapped() -> None:
    model = cases.make_model("BertModel")
    with pytest.raises(ValueError, match="BertModel is not unpadded"):
        repad(model)
    with pytest.raises(ValueError, match="DataParallel has wrapped the model"):
        repad(nn.DataParallel(unpad(model)))


MASK = torch.ones(4, 12, dtype=torch.long)
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "probabilities": ({"output_attentions": True}, "output_attentions: the probabilities of an unpadded encoder"),
    "cross-attention": ({"encoder_hidden_states": torch.zeros(4, 2, 32)}, "encoder_hidden_states: an unpadded encoder"),
    "cross-attention mask": ({"encoder_attention_mask": MASK}, "encoder_attention_mask: an unpadded encoder has no"),
    "cache": ({"past_key_values": ((),)}, "past_key_values: an unpadded encoder has no cache"),
    "use of a cache": ({"use_cache": True}, "use_cache: an unpadded encoder has no cache"),
    "causal": ({"is_causal": True}, "is_causal: an unpadded encoder sees to both sides"),
    "mask of 3 dimensions": ({"attention_mask": MASK[:, None].expand(4, 12, 12)}, "got [4, 12, 12]"),
    "mask of 4 dimensions": ({"attention_mask": torch.zeros(4, 1, 12, 12)}, "wanted shape [4, 12], a flag for every"),
    "mask by kind": ({"attention_mask": {"full_attention": None}}, "a flag for every token, got dict"),
    "mask of another length": ({"attention_mask": MASK[:, :9]}, "got [4, 9]"),
    "mask of nothing": ({"attention_mask": MASK * 0}, "attention_mask hides every token of the batch"),
    "first token": ({"attention_mask": cases.make_mask("left")}, "attention_mask hides the first token of a row"),
    "empty row": ({"attention_mask": cases.make_mask("empty")}, "attention_mask hides the first token of a row"),
    "positions of another length": (
        {"attention_mask": cases.make_mask("ragged"), "position_ids": torch.zeros(4, 11, dtype=torch.long)},
        "an input has shape [4, 11], wanted [4, 12]",
    ),
    "bounds of several rows": (
        {"cu_seq_lens_q": torch.tensor([0, 12])},
        "wanted one row without attention_mask, got 4",
    ),
    "bounds that end early": (
        {"input_ids": torch.ones(1, 8, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 3, 7])},
        "cu_seq_lens_q is [0, 3, 7], wanted bounds from 0 to 8",
    ),
    "sequences told by positions": (
        {"input_ids": torch.ones(1, 4, dtype=torch.long), "position_ids": torch.tensor([[0, 1, 0, 1]])},
        "position_ids fall within a row",
    ),
}


@pytest.fixture(scope="module")
def ours() -> Any:
    return unpad(cases.make_model("BertModel"))


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_cannot_be_computed_without_padding_is_refused_in_a_sentence(ours: Any, case: str) -> None:
    inputs, sentence = CALLS[case]
    ids = torch.ones(4, 12, dtype=torch.long)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ours(**{"input_ids": ids, **inputs})


def test_another_attention_set_afterwards_is_refused() -> None:
    model = unpad(cases.make_model("BertModel"))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"the attention was set to 'sdpa' after unpad\(model\)"):
        model(**cases.make_batch("BertModel").inputs)


@pytest.mark.parametrize(
    "name", ["ElectraForSequenceClassification", "ElectraForMultipleChoice", "DistilBertForSequenceClassification"]
)
def test_a_head_without_a_pooler_wants_the_first_token_too(name: str) -> None:
    model = unpad(cases.make_model(name))
    for mask in ("left", "empty"):
        with pytest.raises(ValueError, match="hides the first token of a row"):
            model(**cases.make_batch(name, mask).inputs)


def test_of_two_heads_the_stricter_decides_what_a_mask_may_hide() -> None:
    names = ("ModernBertForMultipleChoice", "ModernBertForSequenceClassification")
    models = unpad(torch.nn.ModuleDict({name: cases.make_model(name) for name in names}))
    with pytest.raises(ValueError, match="hides the first token of a row"):
        models[names[0]](**cases.make_batch(names[0], "left").inputs)


def test_choices_of_modernbert_are_read_at_their_first_token_wherever_it_stands() -> None:
    model = unpad(cases.make_model("ModernBertForMultipleChoice"))
    with pytest.raises(ValueError, match="hides a whole row"):
        model(**cases.make_batch("ModernBertForMultipleChoice", "empty").inputs)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "ModernBertForTokenClassification"])
def test_a_label_at_padding_is_refused(name: str, train: bool) -> None:
    model = unpad(cases.make_model(name)).train(train)
    batch = cases.make_batch(name)
    batch.inputs["labels"][0, 11] = 1
    with pytest.raises(ValueError, match="labels: a label other than -100 stands where attention_mask is 0"):
        model(**batch.inputs)


def test_flat_labels_at_padding_are_refused_and_too_few_are_the_error_of_the_plain_model() -> None:
    plain, ours = cases.pair("BertForMaskedLM")
    inputs = cases.make_batch("BertForMaskedLM").inputs
    flat = inputs | {"labels": inputs["labels"].flatten()}
    torch.testing.assert_close(ours.train()(**flat).loss, plain(**flat).loss)
    flat["labels"][11] = 1
    with pytest.raises(ValueError, match="labels: a label other than -100"):
        ours.eval()(**flat)
    short = inputs | {"labels": inputs["labels"][:, :11].contiguous()}
    for model in (plain, ours.train()):
        with pytest.raises(ValueError, match="batch_size"):
            model(**short)


def test_tracing_is_refused() -> None:
    model = unpad(cases.make_model("BertForTokenClassification", return_dict=False))
    ids, mask = (cases.make_batch("BertForTokenClassification").inputs[key] for key in ("input_ids", "attention_mask"))
    with pytest.raises(ValueError, match="cannot be traced or exported"):
        torch.jit.trace(model, (ids, mask), check_trace=False)


def test_positions_of_several_rows_may_be_given_once_and_fall() -> None:
    plain, ours = cases.pair("BertModel")
    inputs = {"input_ids": torch.ones(4, 12, dtype=torch.long), "position_ids": torch.arange(12, 0, -1)[None]}
    torch.testing.assert_close(ours(**inputs)[0], plain(**inputs)[0])


def test_the_loss_of_answers_is_refused_with_padding_and_equal_without() -> None:
    plain, ours = cases.pair("BertForQuestionAnswering")
    answers = {"start_positions": torch.tensor([1, 2, 0, 3]), "end_positions": torch.tensor([2, 3, 1, 4])}
    full = cases.make_batch("BertForQuestionAnswering", "full").inputs | answers
    torch.testing.assert_close(ours(**full).loss, plain(**full).loss)
    with pytest.raises(ValueError, match="the softmax of this loss runs over padding too"):
        ours(**cases.make_batch("BertForQuestionAnswering").inputs | answers)
    mask = torch.ones(4, cases.LENGTH, dtype=torch.long)
    mask[3, 9:] = 0
    with pytest.raises(ValueError, match="the softmax of this loss runs over padding too"):
        ours(**full | {"attention_mask": mask})
    ours = unpad(repad(ours), answers_at_real_tokens=True)
    assert describe(ours).startswith("model (BertForQuestionAnswering): its loss compares a place with the real tokens")
    with pytest.raises(ValueError, match="an answer begins or ends at padding"):
        ours(**cases.make_batch("BertForQuestionAnswering").inputs | answers)  # the third row has one token
    with pytest.raises(ValueError, match="num_items_in_batch"):
        ours(**cases.make_batch("BertForQuestionAnswering").inputs | answers, num_items_in_batch=4)


def test_describe_says_what_is_packed_fused_and_left_alone() -> None:
    model = cases.make_model("BertForMaskedLM")
    assert describe(model) == "bert (BertModel): as transformers made it"
    assert describe(unpad(model)).splitlines() == [
        "model (BertForMaskedLM): in training it sees labelled tokens alone and returns no logits",
        "bert (BertModel): computes without padding; 2 layers fused by Triton operators on CUDA, transformers' own "
        "layers and torch's attention on a CPU",
    ]
    modern = unpad(cases.make_model("ModernBertModel"), kernels="torch")
    assert describe(modern) == (
        "model (ModernBertModel): computes without padding; transformers' own layers, attention by torch references"
    )
    assert describe(nn.Linear(2, 2)).startswith("Linear holds no encoder that unpad knows")
