"""Masked-word training as a loop of plain transformers does it, for so many minutes: the rival of `campaign_race.py`.

    python tests/plain_transformers.py --work FOLDER --output FOLDER --network modernbert --lr 2e-3 --muon_lr 4e-3 ...

FOLDER of work holds what the campaign has written: `train.npy`, the pieces of all training documents, concatenated and
cut here into sequences without padding; `held_out.npz`, the masked sequences that both sides are judged on; the
tokenizer. SDPA, head on masked positions only, autocast in bf16 where asked, fused AdamW; with --muon_lr
`torch.optim.Muon` for the matrices of the layers. The rate is warmed up over 5 % of the time and decays to 0 over the
time itself; evaluations are not counted as time. Writes the model and `result.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

WARMUP = 0.05
JUDGED_AT = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SIZES = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}


def main() -> None:
    """Train, judge, save."""
    args = _arguments()
    torch.manual_seed(args.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.work / "tokenizer")
    ids = torch.from_numpy(np.load(args.work / "train.npy")).long()
    model = make_model(args.network, tokenizer)
    if args.output_bias:
        counts = torch.bincount(ids, minlength=len(tokenizer)).double() + 1
        bias = model.cls.predictions.bias if args.network == "bert" else model.decoder.bias
        bias.data.copy_((counts / counts.sum()).log())
    held_out = np.load(args.work / "held_out.npz")
    result = train(model, ids, tokenizer, held_out=held_out, args=args)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "result.json").write_text(json.dumps(result))


def make_model(network: str, tokenizer: Any) -> Any:
    """Return a BERT or a ModernBERT of one size with transformers' own initialisation."""
    if network == "bert":
        dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertForMaskedLM(
            transformers.BertConfig(vocab_size=len(tokenizer), intermediate_size=1024, **SIZES, **dry)
        )
    special = {"pad": tokenizer.pad_token_id, "cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id}
    special |= {"bos": tokenizer.cls_token_id, "eos": tokenizer.sep_token_id}
    names = {f"{name}_token_id": number for name, number in special.items()}
    config = transformers.ModernBertConfig(vocab_size=len(tokenizer), intermediate_size=640, **SIZES, **names)
    config._attn_implementation = "sdpa"
    return transformers.ModernBertForMaskedLM(config)


def train(model: Any, ids: Tensor, tokenizer: Any, *, held_out: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Train until the minutes are up; return the curve of (minutes, tokens, loss, accuracy) and its ends."""
    optimizers = make_optimizers(model, args)
    body = args.length - 2
    rows = ids[: len(ids) // body * body].view(-1, body)
    draw, judged, curve = torch.Generator().manual_seed(args.seed), list(JUDGED_AT), []
    budget_s, not_counted_s, steps, begun = 60 * args.minutes, 0.0, 0, time.perf_counter()
    model.train()
    while (share := (time.perf_counter() - begun - not_counted_s) / budget_s) < 1:
        if judged and share > judged[0]:
            started = time.perf_counter()
            judged.pop(0)
            curve.append((share * args.minutes, steps * args.batch * args.length, *judge(model, held_out, args)))
            print(f"{curve[-1][0]:.2f} min, step {steps}: loss at [MASK] {curve[-1][2]:.3f}", flush=True)
            not_counted_s += time.perf_counter() - started
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(share / WARMUP, (1 - share) / (1 - WARMUP))
        inputs, labels = batch_of(rows[torch.randint(len(rows), (args.batch,), generator=draw)], tokenizer, draw, args)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            scores = head(model, encode(model, inputs)[labels >= 0])
        cross_entropy(scores.float(), labels[labels >= 0]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        steps += 1
    trained_s = time.perf_counter() - begun - not_counted_s
    tokens = steps * args.batch * args.length
    curve.append((trained_s / 60, tokens, *judge(model, held_out, args)))
    return {"steps": steps, "tokens": tokens, "seconds": trained_s, "curve": curve}


def make_optimizers(model: Any, args: argparse.Namespace) -> list[tuple[Any, float]]:
    """Return (optimizer, peak rate): AdamW, and Muon for the matrices of the layers where it is asked for."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layer" in name] if args.muon_lr else []
    taken = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    found: list[tuple[Any, float]] = [(torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True), args.lr)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        found.append((muon, args.muon_lr))
    return found


def batch_of(body: Tensor, tokenizer: Any, draw: torch.Generator, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return input pieces and labels, -1 where nothing is predicted; int64 [batch, length] both."""
    ends = [torch.full((len(body), 1), number) for number in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    inputs = torch.cat([ends[0], body, ends[1]], dim=1)
    chosen = torch.rand(inputs.shape, generator=draw) < args.masked
    chosen[:, [0, -1]] = False
    labels = torch.where(chosen, inputs, -1)
    fate = torch.rand(inputs.shape, generator=draw)
    to_mask = chosen & (fate < (1.0 if args.all_mask else 0.8))
    to_random = chosen & ~to_mask & (fate < 0.9)
    inputs = torch.where(to_mask, tokenizer.mask_token_id, inputs)
    return torch.where(to_random, torch.randint(5, len(tokenizer), inputs.shape, generator=draw), inputs), labels


def encode(model: Any, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the last hidden states."""
    return model.base_model(input_ids=inputs, attention_mask=mask).last_hidden_state


def head(model: Any, hidden: Tensor) -> Tensor:
    """Return the scores over the vocabulary."""
    return model.cls(hidden) if hasattr(model, "cls") else model.decoder(model.head(hidden))


@torch.no_grad()
def judge(model: Any, held_out: Any, args: argparse.Namespace) -> tuple[float, float]:
    """Return mean loss and accuracy at [MASK] of the held-out sequences."""
    model.eval()
    inputs, labels, lengths = (torch.from_numpy(held_out[name]).long() for name in ("inputs", "labels", "lengths"))
    mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    loss = right = 0.0
    for rows in torch.arange(len(inputs)).split(64):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            hidden = encode(model, inputs[rows], mask[rows].long())
            scores = head(model, hidden[labels[rows] >= 0]).float()
        wanted = labels[rows][labels[rows] >= 0]
        loss += cross_entropy(scores, wanted, reduction="sum").item()
        right += (scores.argmax(-1) == wanted).sum().item()
    model.train()
    number = int((labels >= 0).sum())
    return loss / number, right / number


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--network", choices=("bert", "modernbert"), required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--muon_lr", type=float)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--masked", type=float, default=0.15, help="share of the pieces that are predicted")
    parser.add_argument("--all_mask", action="store_true", help="[MASK] alone instead of 80/10/10")
    parser.add_argument("--output_bias", action="store_true", help="start the output bias at the log of the counts")
    parser.add_argument("--precision", choices=("fp32", "bf16"), required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
