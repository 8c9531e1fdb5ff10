from __future__ import annotations

import os
from fnmatch import fnmatchcase

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
import transformers
from encoder_cases import encoder_inputs, packed_inputs, padded_inputs, small_config, spread_weights
from ranks_harness import run_ranks

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

CASES: list[tuple[dict, list[int], bool]] = [
    ({}, [5, 1, 9, 2], True),
    ({}, [5, 1, 9, 2], False),
    ({"num_hidden_layers": 1, "hidden_size": 15, "num_attention_heads": 3, "hidden_act": "gelu_new"}, [37], True),
    ({"num_hidden_layers": 3, "num_attention_heads": 1, "vocab_size": 128}, [7, 7, 7], True),
    ({"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 33, "type_vocab_size": 3}, [1, 1, 1], True),
    ({"hidden_size": 40, "num_attention_heads": 8, "layer_norm_eps": 1e-5, "vocab_size": 1009}, [31, 3, 36], False),
    ({"num_hidden_layers": 4, "pad_vocab_size_to_multiple_of": 1, "intermediate_size": 7}, [2, 13, 29, 1, 30], True),
]

BY_TORCH = [(*case, "torch") for case in CASES]
BY_TRITON = [
    pytest.param(*case, "triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs CPU"))
    for case in CASES[1:6]
]
"""The other side of `fused_ops`: without a GPU Triton's interpreter runs the kernels."""


def _pair_of_models(
    config: BertConfig, has_pair_head: bool, kernels: str
) -> tuple[PretrainingModel, transformers.PreTrainedModel]:
    ours = PretrainingModel(config, kernels=kernels, has_pair_head=has_pair_head).eval()
    spread_weights(ours, config)
    facts = hf_config(config, sentence_pair="nsp" if has_pair_head else "none", special_ids={"pad": 0})
    kind = getattr(transformers, facts["architectures"][0])
    theirs = kind._from_config(transformers.BertConfig(**facts), attn_implementation="eager").eval()
    left = theirs.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    assert not left.unexpected_keys
    assert set(left.missing_keys) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    return ours, theirs


@pytest.mark.parametrize(("changes", "lengths", "has_pair_head", "kernels"), [*BY_TORCH, *BY_TRITON[:2]])
def test_logits_equal_those_of_transformers(
    changes: dict, lengths: list[int], has_pair_head: bool, kernels: str
) -> None:
    config = small_config(**changes)
    ours, theirs = _pair_of_models(config, has_pair_head, kernels)
    batch = packed_inputs(config, lengths)
    padded = padded_inputs(batch)
    inputs = {name: padded[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    found = ours.logits(**encoder_inputs(batch), masked_positions_P=torch.arange(sum(lengths)))
    with torch.no_grad():
        wanted = theirs(**inputs)
    scores = wanted.prediction_logits if has_pair_head else wanted.logits
    torch.testing.assert_close(found.mlm_PV, scores[inputs["attention_mask"].bool()], atol=1e-5, rtol=0.0)
    if has_pair_head:
        torch.testing.assert_close(found.pair_N2, wanted.seq_relationship_logits, atol=1e-5, rtol=0.0)
    else:
        assert found.pair_N2 is None


@pytest.mark.parametrize(("changes", "lengths", "has_pair_head", "kernels"), [*BY_TORCH, *BY_TRITON])
def test_losses_and_gradients_equal_those_of_transformers(
    changes: dict, lengths: list[int], has_pair_head: bool, kernels: str
) -> None:
    config = small_config(**changes)
    ours, theirs = _pair_of_models(config, has_pair_head, kernels)
    batch = packed_inputs(config, lengths)
    padded = padded_inputs(batch)
    if not has_pair_head:
        del padded["next_sentence_label"]
    wanted = theirs(**padded).loss
    wanted.backward()
    loss_sums, _ = ours(**batch)
    counts = (len(batch["targets"]["masked_labels"]), len(lengths))[: 1 + has_pair_head]
    found = sum(total / count for total, count in zip(loss_sums, counts, strict=True))
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    gradients = to_hf({name: parameter.grad for name, parameter in ours.named_parameters()}, config)
    references = {name: theirs.get_parameter(name).grad for name in gradients}
    # Some gradients are zero in exact arithmetic (every key bias), so what rounding may do is a share of the largest.
    atol = 1e-6 * max(reference.abs().max().item() for reference in references.values())
    for name, reference in references.items():
        torch.testing.assert_close(gradients[name], reference, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_without_masked_words_the_word_loss_is_zero_and_every_gradient_exists() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").train()
    loss_sums, metric_sums = model(**packed_inputs(config, [4, 6], masked=0))
    loss_sums.sum().backward()
    assert loss_sums[0].item() == 0.0
    assert metric_sums[0].item() == 0.0
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_without_pair_head_there_is_no_pair_term_and_no_weight_of_it() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    loss_sums, metric_sums = model(**packed_inputs(config, [4, 6]))
    assert (len(loss_sums), len(metric_sums)) == (1, 1)
    assert [term.name for term in model.terms] == ["mlm"]
    assert not [name for name in model.state_dict() if "pooler" in name or "seq_relationship" in name]


def test_ignored_labels_count_for_nothing() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    batch = packed_inputs(config, [4, 6, 3], masked=4)
    batch["targets"]["masked_labels"][1] = -100
    batch["targets"]["pair_labels"][2] = -100
    kept = torch.tensor([0, 2, 3])
    words = {name: batch["targets"][name][kept] for name in ("masked_positions", "masked_labels")}
    fewer = {**batch, "targets": {**batch["targets"], **words}}
    torch.testing.assert_close(model(**batch)[0][0], model(**fewer)[0][0])
    batch["targets"]["pair_labels"][:] = -100
    loss_sums, metric_sums = model(**batch)
    assert loss_sums[1].item() == 0.0
    assert metric_sums[1].item() == 0.0


def test_metrics_count_the_right_predictions() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    spread_weights(model, config)
    batch = packed_inputs(config, [4, 6, 3], masked=5)
    scores = model.logits(**encoder_inputs(batch), masked_positions_P=batch["targets"]["masked_positions"])
    best_P, best_N = scores.mlm_PV.argmax(dim=-1), scores.pair_N2.argmax(dim=-1)
    batch["targets"]["masked_labels"] = torch.where(torch.arange(5) < 2, best_P, (best_P + 1) % 101)
    batch["targets"]["pair_labels"] = torch.where(torch.arange(3) < 1, best_N, 1 - best_N)
    assert model(**batch)[1].tolist() == [2.0, 1.0]


def test_the_sums_of_every_kind_of_target_are_those_of_its_targets_alone() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    spread_weights(model, config)
    batch = packed_inputs(config, [37, 30, 20], masked=50)
    scores = model.logits(**encoder_inputs(batch), masked_positions_P=batch["targets"]["masked_positions"])
    batch["targets"]["masked_labels"][::3] = scores.mlm_PV.argmax(dim=-1)[::3]
    loss_sums, metric_sums = model(**batch)
    judged_losses, judged = model(**batch, kind_counts=(30, 0, 20))
    torch.testing.assert_close(judged_losses, loss_sums)
    torch.testing.assert_close(judged[:2], metric_sums)
    for kind, own in enumerate((slice(0, 30), slice(30, 30), slice(30, 50))):
        words = {name: batch["targets"][name][own] for name in ("masked_positions", "masked_labels")}
        losses, right = model(**{**batch, "targets": {**batch["targets"], **words}})
        torch.testing.assert_close(judged[2 + kind], losses[0])
        assert judged[5 + kind] == right[0]


def test_padding_rows_of_the_vocabulary_are_never_predicted_and_get_no_gradient() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").train()
    with torch.no_grad():
        model.predictions.bias[101:] = 1000.0
    loss_sums, _ = model(**packed_inputs(config, [4, 6]))
    loss_sums.sum().backward()
    assert loss_sums[0].item() < 3 * 10
    assert (model.bert.embeddings.word_weight.grad[101:] == 0.0).all()
    assert (model.predictions.bias.grad[101:] == 0.0).all()


def test_the_no_decay_patterns_are_the_biases_and_layer_norms() -> None:
    model = PretrainingModel(small_config())
    for name, parameter in model.named_parameters():
        matched = any(fnmatchcase(name, pattern) for pattern in weight_patterns(BertConfig())[0])
        assert matched == (parameter.dim() == 1), name


def _train_at_stages(rank: int, world_size: int) -> list[dict]:
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    config = small_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    batch = packed_inputs(config, [4, 0, 6, 1], masked=5 * rank, seed=rank)
    results = []
    for stage, activation_checkpointing in ((0, False), (3, False), (3, True)):
        model = PretrainingModel(config, kernels="torch", activation_checkpointing=activation_checkpointing)
        spread_weights(model, config)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        losses, gradients = [], {}
        for step in range(2):
            loss = engine(**batch, dropout_seed=torch.tensor([10 * step + rank]))[0].sum()
            losses.append(loss.item())
            engine.backward(loss)
            for name, parameter in model.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).clone().numpy()
            engine.step()
        external = [name for name, module in model.named_modules() if getattr(module, "_external_params", None)]
        results.append({"losses": losses, "gradients": gradients, "external": external})
    return results


def test_zero_3_gives_the_losses_and_gradients_of_stage_0_with_and_without_checkpointing() -> None:
    for stage_0, *stages_3 in run_ranks(_train_at_stages, 2):
        for stage_3 in stages_3:
            assert stage_3["losses"] == pytest.approx(stage_0["losses"], rel=1e-6)
            for name, gradient in stage_0["gradients"].items():
                np.testing.assert_allclose(stage_3["gradients"][name], gradient, atol=1e-6, rtol=1e-5, err_msg=name)
            # The tied decoder is the only parameter that is read outside its module.
            assert stage_3["external"] == ["predictions"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_fp32_sums_near_the_fp32_model(dtype: torch.dtype) -> None:
    config = small_config()
    batch = packed_inputs(config, [5, 9, 1])
    model = PretrainingModel(config, kernels="torch").train()
    truth, _ = model(**batch)
    loss_sums, metric_sums = model.to(dtype)(**batch)
    loss_sums.sum().backward()
    assert loss_sums.dtype == metric_sums.dtype == torch.float32
    torch.testing.assert_close(loss_sums, truth, atol=0.0, rtol=0.02)
    assert model.predictions.bias.grad.dtype == dtype
