"""ModernBERT's layers written with our operators are transformers': halves, windows, rotary thetas, residuals."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_ds.encoder.fused_ops import FusedOps, fused_ops

# A window leaves some rows of a block without any key.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_of(local_attention: int) -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    config = ModernBertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"], local_attention=local_attention,
        pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = ModernBertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model.to(DEVICE)


def hidden_of(model: Any, ops: FusedOps, sequences: list[Tensor]) -> Tensor:
    """Return the model's output (T, D) of packed sequences, by its weights and our operators."""
    config, lengths = model.config, [len(sequence) for sequence in sequences]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
    embeddings, eps = model.embeddings, config.norm_eps
    stream_TD = ops.layer_norm(embeddings.tok_embeddings(torch.cat(sequences)), embeddings.norm.weight, None, eps)
    hidden_TD = stream_TD
    following = [layer.attn_norm for layer in model.layers[1:]] + [model.final_norm]
    for layer, norm in zip(model.layers, following, strict=True):
        qkv_T3HK = layer.attn.Wqkv(hidden_TD).view(len(positions), 3, config.num_attention_heads, -1)
        theta = config.rope_parameters[layer.attention_type]["rope_theta"]
        qkv_T3HK = ops.rotary(qkv_T3HK, positions, theta=theta)
        window = config.local_attention // 2 if layer.attention_type == "sliding_attention" else None
        out_THK = ops.attention(qkv_T3HK, bounds, max(lengths), window=window)
        attended_TD = layer.attn.Wo(out_THK.flatten(1))
        hidden_TD, stream_TD = ops.dropout_add_then_norm(attended_TD, stream_TD, layer.mlp_norm.weight, None, eps)
        fed_TD = layer.mlp.Wo(ops.geglu(layer.mlp.Wi(hidden_TD)))
        hidden_TD, stream_TD = ops.dropout_add_then_norm(fed_TD, stream_TD, norm.weight, None, eps)
    return hidden_TD


def with_gradients(model: Any, hidden_TD: Tensor) -> dict[str, Tensor]:
    dhidden = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(hidden_TD, parameters, dhidden)
    return {"hidden": hidden_TD.detach()} | dict(zip(names, gradients, strict=True))


@pytest.mark.parametrize(
    ("kernels", "local_attention", "lengths"),
    [("torch", 128, [140, 70]), ("auto", 8, [12, 3]), ("triton", 8, [12, 3])],
)
def test_two_layers_of_our_operators_are_transformers_modernbert(
    kernels: str, local_attention: int, lengths: list[int]
) -> None:
    model = model_of(local_attention)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(3, 50, (length,), generator=generator).to(DEVICE) for length in lengths]
    theirs = torch.cat([model(input_ids=sequence[None]).last_hidden_state[0] for sequence in sequences])
    expected = with_gradients(model, theirs)
    found = with_gradients(model, hidden_of(model, fused_ops(kernels), sequences))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_modernberts_windows_reach_half_of_local_attention_to_both_sides() -> None:
    from transformers import ModernBertConfig

    config = ModernBertConfig()
    assert (config.local_attention, config.sliding_window) == (128, 64)
