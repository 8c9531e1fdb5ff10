"""unpad gives the numbers of the plain model: every class, every kind of mask, every kind of input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import unpad_cases as cases
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bert_kernels.hf import repad, unpad

FIRST_READ = (
    *("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction"),
    *("BertForPreTraining", "RobertaModel"),
)


def compare(name: str, mask: str, *, train: bool = True, **settings: Any) -> None:
    """Assert that a model and its unpadded copy agree in outputs, loss and every gradient."""
    plain, ours = (model.train(train) for model in cases.pair(name, **settings))
    batch = cases.make_batch(name, mask)
    theirs, mine = plain(**batch.inputs), ours(**batch.inputs)
    if train and name.endswith(("MaskedLM", "BertForPreTraining")):
        assert mine.get("logits") is None and mine.get("prediction_logits") is None
        kept = [key for key in theirs if key not in ("logits", "prediction_logits")]
        assert list(mine) == kept
        theirs = type(theirs)(**{key: theirs[key] for key in kept})
    cases.assert_same_outputs(mine, theirs, batch.keep)
    cases.total(theirs, batch.keep).backward()
    cases.total(mine, batch.keep).backward()
    cases.assert_same_gradients(ours, plain)


@pytest.mark.parametrize("name", cases.CLASSES)
def test_every_class_gives_the_loss_and_the_gradients_of_the_plain_model(name: str) -> None:
    compare(name, "ragged")


@pytest.mark.parametrize("name", cases.CLASSES)
def test_every_class_gives_the_outputs_of_the_plain_model_in_evaluation(name: str) -> None:
    plain, ours = cases.pair(name)
    batch = cases.make_batch(name, "holes" if name.endswith(FIRST_READ) or name == "BertModel" else "left")
    with torch.no_grad():
        cases.assert_same_outputs(ours(**batch.inputs), plain(**batch.inputs), batch.keep)


@pytest.mark.parametrize("mask", [kind for kind in cases.MASKS if kind not in ("ragged", "nothing")])
@pytest.mark.parametrize("family", cases.SETTINGS)
def test_every_mask_gives_the_outputs_and_gradients_of_the_plain_model(family: str, mask: str) -> None:
    compare(f"{family}ForTokenClassification", mask)


@pytest.mark.parametrize("mask", ["left", "holes", "none"])
def test_words_are_learned_from_labels_wherever_the_mask_leaves_them(mask: str) -> None:
    compare("BertForMaskedLM", mask)


def test_modernbert_pools_over_the_mask_when_it_is_told_so() -> None:
    compare("ModernBertForSequenceClassification", "left", classifier_pooling="mean")


def test_modernbert_may_take_the_labelled_places_itself() -> None:
    plain, ours = cases.pair("ModernBertForMaskedLM", sparse_prediction=True)
    batch = cases.make_batch("ModernBertForMaskedLM")
    theirs, mine = plain.train()(**batch.inputs), ours.train()(**batch.inputs)
    cases.assert_same_outputs(mine, theirs, batch.keep)


@pytest.mark.parametrize("family", cases.SETTINGS)
def test_positions_segments_embeddings_and_hidden_states_go_through(family: str) -> None:
    plain, ours = cases.pair(f"{family}Model")
    batch = cases.make_batch(f"{family}Model", "holes")
    ids = batch.inputs.pop("input_ids")
    inputs = batch.inputs | {"position_ids": torch.randint(0, 40, ids.shape), "output_hidden_states": True}
    if family in ("Bert", "Roberta", "Electra"):
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape)
    embedded = {"inputs_embeds": plain.get_input_embeddings()(ids).detach()}
    for more in ({"input_ids": ids}, embedded, embedded | {"position_ids": None}):
        theirs, mine = plain(**inputs | more), ours(**inputs | more)
        assert len(theirs.hidden_states) > 2
        cases.assert_same_outputs(mine, theirs, batch.keep)
    one_for_all = inputs | {"input_ids": ids, "position_ids": torch.arange(12, 0, -1)[None]}
    cases.assert_same_outputs(ours(**one_for_all), plain(**one_for_all), batch.keep)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertForMaskedLM", "ModernBertForSequenceClassification"])
def test_tuples_hold_what_those_of_the_plain_model_hold(name: str) -> None:
    plain, ours = cases.pair(name)
    batch = cases.make_batch(name)
    inputs = list(batch.inputs.values())[:2]  # ids and mask, by position
    theirs, mine = (model(*inputs, return_dict=False, output_hidden_states=True) for model in (plain, ours))
    assert isinstance(mine, tuple) and len(mine) == len(theirs)
    torch.testing.assert_close(mine[-1][1][batch.keep], theirs[-1][1][batch.keep])
    trained = ours.train()(**batch.inputs, return_dict=False)
    assert isinstance(trained, tuple) and len(trained) == {"BertModel": 2}.get(
        name, 1 + name.endswith("Classification")
    )


def test_full_batches_give_the_bits_of_the_plain_model() -> None:
    plain, ours = cases.pair("ModernBertModel")
    for mask in ("full", "none"):
        inputs = cases.make_batch("ModernBertModel", mask).inputs
        assert torch.equal(ours(**inputs)[0], plain(**inputs)[0])


def test_rows_at_padding_are_zero() -> None:
    _, ours = cases.pair("BertModel")
    batch = cases.make_batch("BertModel")
    last = ours(**batch.inputs).last_hidden_state
    assert not last[~batch.keep].any() and last[batch.keep].all()


class Moves(TorchDispatchMode):
    """Counts the operators that take rows of a batch out and put them back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        moves_rows = name in ("index_select", "index_copy") and args[0].is_floating_point()
        moves_ids = name == "index_select" and args[0].shape[:1] == (cases.ROWS * cases.LENGTH,)
        if moves_rows or moves_ids:
            self.seen.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["BertModel", "ModernBertForTokenClassification"])
def test_padding_goes_out_once_before_the_embeddings_and_comes_back_once_after_the_last_layer(name: str) -> None:
    _, ours = cases.pair(name)
    batch = cases.make_batch(name, labels=False)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for path, module in ours.named_modules():
        if path.rpartition(".")[2] in ("embeddings", "0", "1", "2", "final_norm", "pooler", "classifier"):
            module.register_forward_hook(
                lambda module, args, output, path=path: shapes.append(
                    (path.rpartition(".")[2], tuple(output.shape[:2]))
                )
            )
    with Moves() as moves:
        ours(**batch.inputs)
    assert moves.seen == ["index_select", "index_copy"]
    tokens = (1, int(batch.keep.sum()))
    after = [("pooler", (4, 32))] if name == "BertModel" else [("final_norm", tokens), ("classifier", (4, 12))]
    layers = ("embeddings", "0", "1") if name == "BertModel" else ("embeddings", "0", "1", "2")
    assert shapes == [(layer, tokens) for layer in layers] + after


def test_the_word_head_sees_labelled_tokens_alone_in_training() -> None:
    _, ours = cases.pair("RobertaForMaskedLM")
    batch = cases.make_batch("RobertaForMaskedLM")
    seen: list[int] = []
    ours.lm_head.decoder.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    ours.train()(**batch.inputs)
    ours.eval()(**batch.inputs)
    assert seen == [int((batch.inputs["labels"] != -100).sum()), 48]


def packed_by_caller(batch: cases.Batch) -> dict[str, Tensor]:
    """The batch as a flattening collator makes it."""
    mask = batch.inputs["attention_mask"]
    lengths = mask.sum(1)
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    positions = torch.arange(12).expand(4, 12)[batch.keep][None]
    ids = batch.inputs["input_ids"][batch.keep][None]
    longest = int(lengths.max())
    return {
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_a_flattened_batch_gives_what_the_padded_one_gives(name: str) -> None:
    plain, ours = cases.pair(name)
    batch = cases.make_batch(name)
    theirs = plain.train()(**batch.inputs)
    inputs = packed_by_caller(batch) | {"labels": batch.inputs["labels"][batch.keep][None]}
    torch.testing.assert_close(ours.train()(**inputs).loss, theirs.loss)
    torch.testing.assert_close(ours.eval()(**inputs).logits[0], theirs.logits[batch.keep])


@pytest.mark.parametrize("family", list(cases.SETTINGS))
def test_answers_at_real_tokens_have_the_loss_and_gradients_of_rows_without_padding(family: str) -> None:
    plain = cases.make_model(f"{family}ForQuestionAnswering").train()
    ours = unpad(copy.deepcopy(plain), answers_at_real_tokens=True)
    inputs = cases.make_batch(f"{family}ForQuestionAnswering").inputs
    answers = {"start_positions": torch.tensor([1, 9, 0, 2]), "end_positions": torch.tensor([[4], [11], [0], [3]])}
    losses = []
    for row, length in enumerate((5, 12, 1, 5)):
        own = {name: x[row : row + 1, :length] for name, x in inputs.items()}
        losses.append(plain(**own, **{name: x[row : row + 1] for name, x in answers.items()}).loss)
    expected = torch.stack(losses).mean()
    found = ours(**inputs, **answers)
    assert list(found) == ["loss", "start_logits", "end_logits"]
    loss, *logits = ours(**inputs, **answers, return_dict=False)
    torch.testing.assert_close([found.loss, loss], [expected, expected])
    assert [each.shape for each in logits] == [(4, 12), (4, 12)]
    expected.backward()
    found.loss.backward()
    cases.assert_same_gradients(ours, plain)


def test_an_answer_after_the_end_of_the_batch_counts_for_nothing() -> None:
    ours = unpad(cases.make_model("BertForQuestionAnswering"), answers_at_real_tokens=True)
    inputs = cases.make_batch("BertForQuestionAnswering").inputs
    ends = torch.tensor([4, 11, 0, 3])
    without = {name: x[:3] for name, x in inputs.items()} | {"end_positions": ends[:3]}
    fewer = ours(**without, start_positions=torch.tensor([1, 9, 0])).loss
    more = ours(**inputs, start_positions=torch.tensor([1, 9, 0, 12]), end_positions=torch.tensor([4, 11, 0, 500])).loss
    torch.testing.assert_close(more, fewer)


def test_a_model_made_of_the_config_of_an_unpadded_one_still_minds_its_mask() -> None:
    plain, ours = cases.pair("ModernBertModel")
    heir = type(plain)(ours.config).double().eval()
    heir.load_state_dict(plain.state_dict())
    for mask in ("ragged", "none"):
        batch = cases.make_batch("ModernBertModel", mask)
        theirs, mine = plain(**batch.inputs)[0], heir(**batch.inputs)[0]
        torch.testing.assert_close(mine[batch.keep], theirs[batch.keep])


def test_two_encoders_may_share_a_config() -> None:
    first = cases.make_model("BertModel")
    pair = nn.ModuleList([first, type(first)(first.config).double()])
    repad(unpad(pair))
    assert first.config._attn_implementation == "sdpa"


def test_two_encoders_in_one_module_of_a_person_are_both_unpadded() -> None:
    plain = nn.ModuleDict({"questions": cases.make_model("BertModel"), "texts": cases.make_model("DistilBertModel")})
    ours = unpad(copy.deepcopy(plain))
    for name in plain:
        batch = cases.make_batch("BertModel")
        mine, theirs = ours[name](**batch.inputs), plain[name](**batch.inputs)
        cases.assert_same_outputs(mine, theirs, batch.keep)
        assert not mine[0][~batch.keep].any()
