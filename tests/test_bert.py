from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from encoder_cases import encoder_inputs, packed_inputs, small_config, spread_weights

from bert_ds.basics.ranks import CheckpointError
from bert_ds.encoder.bert_layers import BertLayer, initialise_weights
from bert_ds.encoder.families.embeddings import sinusoids
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.hf_mapping import from_hf, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_kernels.dropout_mask import ATTENTION, HIDDEN, keep_mask_reference

SEED = torch.tensor([1234567])


def _gradients(model: PretrainingModel, batch: dict, seed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, dropout_seed=seed)[0].sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_sequence_is_encoded_the_same_alone_and_packed_between_others() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    spread_weights(model, config)
    together = packed_inputs(config, [5, 7, 1, 9])
    alone = {name: together[name][5:12] for name in ("input_ids_T", "token_type_ids_T", "position_ids_T")}
    with torch.no_grad():
        hidden_TD = model.bert(**encoder_inputs(together))
        hidden_SD = model.bert(**alone, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32), max_seqlen=7)
    torch.testing.assert_close(hidden_TD[5:12], hidden_SD, atol=1e-6, rtol=1e-5)


def test_empty_sequences_change_nothing() -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    spread_weights(model, config)
    with torch.no_grad():
        plain = model.bert(**encoder_inputs(packed_inputs(config, [4, 6])))
        holed = model.bert(**encoder_inputs(packed_inputs(config, [0, 4, 0, 0, 6, 0])))
    torch.testing.assert_close(plain, holed, atol=0.0, rtol=0.0)


def test_initial_weights_are_as_published() -> None:
    config = small_config(hidden_size=96, vocab_size=500, initializer_range=0.05)
    model = PretrainingModel(config, kernels="torch")
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm_weight"):
            assert (parameter == 1.0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 0.0).all(), name
        elif parameter.numel() > 1000:
            real = parameter[: config.vocab_size] if name.endswith("word_weight") else parameter
            assert real.std().item() == pytest.approx(0.05, rel=0.1), name
    assert (model.bert.embeddings.word_weight[500:] == 0.0).all()
    assert (model.bert.embeddings.word_weight[0] != 0.0).any()


def test_initial_weights_depend_on_the_seed_only() -> None:
    config = small_config()
    torch.manual_seed(1)
    first = PretrainingModel(config, init_seed=7).state_dict()
    torch.manual_seed(2)
    second = PretrainingModel(config, init_seed=7).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = PretrainingModel(config, init_seed=8).state_dict()
    assert not torch.equal(first["bert.embeddings.word_weight"], other["bert.embeddings.word_weight"])


def test_partitioned_parameters_are_not_initialised_in_vain() -> None:
    model = PretrainingModel(small_config())
    model.predictions.bias.ds_id = 0
    with pytest.raises(ValueError, match=r"built under deepspeed.zero.Init"):
        initialise_weights(model, small_config(), seed=0)


def test_the_pair_head_does_not_change_the_initial_encoder() -> None:
    config = small_config()
    with_pair = PretrainingModel(config, has_pair_head=True).state_dict()
    without = PretrainingModel(config, has_pair_head=False).state_dict()
    name = "bert.layer.1.feed_forward.output_weight"
    assert torch.equal(with_pair[name], without[name])


def test_no_global_random_state_is_used() -> None:
    config = small_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = PretrainingModel(config, kernels="torch").train()
    model(**packed_inputs(config, [5, 9]), dropout_seed=SEED)[0].sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_is_off_in_evaluation_mode() -> None:
    config = small_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model = PretrainingModel(config, kernels="torch").eval()
    batch = encoder_inputs(packed_inputs(config, [5, 9]))
    with torch.no_grad():
        assert torch.equal(model.bert(**batch), model.bert(**batch, dropout_seed=SEED))


def test_training_with_dropout_and_no_seed_is_refused() -> None:
    config = small_config(hidden_dropout_prob=0.1)
    model = PretrainingModel(config, kernels="torch").train()
    with pytest.raises(ValueError, match="dropout_seed is None"):
        model(**packed_inputs(config, [5, 9]))


def test_dropout_depends_on_the_seed_only() -> None:
    config = small_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    model = PretrainingModel(config, kernels="torch").train()
    batch = encoder_inputs(packed_inputs(config, [5, 9]))
    with torch.no_grad():
        first, second = model.bert(**batch, dropout_seed=SEED), model.bert(**batch, dropout_seed=SEED)
        other = model.bert(**batch, dropout_seed=SEED + 1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_layer_drops_where_the_paper_does() -> None:
    config = small_config(num_hidden_layers=1, hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    layer = BertLayer(config, fused_ops("torch"), layer=0).double().train()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    x = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    rows = torch.arange(6)

    def keep(site: int, width: int, p: float, heads: torch.Tensor | None = None) -> torch.Tensor:
        layout = HIDDEN if heads is None else ATTENTION
        mask = keep_mask_reference(rows, width, dropout_p=p, dropout_seed=SEED, site=site, heads=heads, layout=layout)
        return mask.double() / (1.0 - p)

    attention, feed_forward = layer.attention, layer.feed_forward
    q, k, v = F.linear(x, attention.qkv_weight, attention.qkv_bias).view(6, 3, 4, 6).permute(1, 2, 0, 3)
    probs = torch.softmax(q @ k.transpose(1, 2) / 6**0.5, dim=-1)
    probs = probs * torch.stack([keep(1, 6, 0.5, torch.tensor(head)) for head in range(4)])
    context = (probs @ v).transpose(0, 1).reshape(6, 24)
    y = F.linear(context, attention.output_weight, attention.output_bias) * keep(2, 24, 0.25) + x
    y = F.layer_norm(y, (24,), attention.layer_norm_weight, attention.layer_norm_bias, 1e-12)
    z = F.gelu(F.linear(y, feed_forward.intermediate_weight, feed_forward.intermediate_bias))
    z = F.linear(z, feed_forward.output_weight, feed_forward.output_bias) * keep(3, 24, 0.25) + y
    z = F.layer_norm(z, (24,), feed_forward.layer_norm_weight, feed_forward.layer_norm_bias, 1e-12)
    found = layer(x, torch.tensor([0, 6], dtype=torch.int32), 6, SEED)
    # The softmax of the operation is fp32 also for fp64 inputs.
    torch.testing.assert_close(found, z, atol=1e-6, rtol=1e-6)


def test_activation_checkpointing_gives_the_same_gradients_with_dropout() -> None:
    config = small_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    batch = packed_inputs(config, [5, 1, 9])
    plain = PretrainingModel(config, kernels="torch").train()
    saving = PretrainingModel(config, kernels="torch", activation_checkpointing=True).train()
    wanted, found = _gradients(plain, batch, SEED), _gradients(saving, batch, SEED)
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []


def test_activation_checkpointing_keeps_fewer_tensors() -> None:
    config = small_config(num_hidden_layers=4)
    batch = packed_inputs(config, [5, 9])

    def saved_bytes(activation_checkpointing: bool) -> int:
        model = PretrainingModel(config, kernels="torch", activation_checkpointing=activation_checkpointing).train()
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
        with hooks:
            model.bert(**encoder_inputs(batch))
        return sum(sizes)

    assert saved_bytes(True) < saved_bytes(False) / 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_give_low_precision_hidden_states_near_fp32(dtype: torch.dtype) -> None:
    config = small_config()
    model = PretrainingModel(config, kernels="torch").eval()
    batch = encoder_inputs(packed_inputs(config, [5, 9]))
    with torch.no_grad():
        truth = model.bert(**batch)
        found = model.to(dtype).bert(**batch)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), truth, atol=0.06, rtol=0.05)


def test_an_unknown_kernel_choice_is_refused() -> None:
    with pytest.raises(ValueError, match='kernels is "cuda", wanted "auto", "triton" or "torch"'):
        fused_ops("cuda")


def test_sinusoids_are_the_published_positions_no_weights_and_the_table_of_an_export() -> None:
    table = sinusoids(50, 24)
    assert table[0].tolist() == [0.0, 1.0] * 12
    assert table[7, 5].item() == pytest.approx(math.cos(7 / 10_000 ** (4 / 24)), rel=1e-6)
    config = small_config(positions="sinusoid")
    model = PretrainingModel(config, kernels="torch")
    assert "bert.embeddings.position_weight" not in model.state_dict()
    tensors = to_hf(model.state_dict(), config)
    name = "bert.embeddings.position_embeddings.weight"
    assert torch.equal(tensors[name], sinusoids(config.max_position_embeddings, config.hidden_size))
    assert from_hf(tensors, config, has_pair_head=True).keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match="position_weight is not the table that the settings of the model fix"):
        from_hf({**tensors, name: tensors[name] + 1.0}, config, has_pair_head=True)
