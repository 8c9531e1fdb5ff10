"""What one release of transformers makes of folders, and folders that it makes: run by the interpreter that has it.

    PYTHON tests/family_peer.py FOLDER

Nothing of this project is imported. FOLDER/orders.json lists orders, FOLDER/inputs.safetensors holds a padded batch,
[N, S]. "open" loads a folder and refuses anything missing, unexpected or misshapen; "save" makes a model of random
weights, none of them 0 or 1, from those settings that this release knows, and saves it. Of both, the scores of the
batch and the gradients of a loss that weighs every score, fp64, go to FOLDER/NAME.safetensors, what else there is to
say to FOLDER/NAME.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor


def main() -> None:
    """Carry out the orders."""
    folder = Path(sys.argv[1])
    padded = load_file(folder / "inputs.safetensors")
    (folder / "release.json").write_text(json.dumps(transformers.__version__))
    for order in json.loads((folder / "orders.json").read_text()):
        said: dict[str, Any] = {}
        try:
            model = opened(order) if order["what"] == "open" else saved(order)
            save_file(answer(model.double().eval(), order["role"], padded), folder / f"{order['name']}.safetensors")
            if order["what"] == "open":
                tokenizer = transformers.AutoTokenizer.from_pretrained(order["folder"])
                said["ids"] = [tokenizer(text)["input_ids"] for text in order["texts"]]
                said["model_max_length"] = tokenizer.model_max_length
        except Exception as error:  # an order that cannot be carried out is a result
            said["error"] = f"{type(error).__name__}: {error}"
        (folder / f"{order['name']}.json").write_text(json.dumps(said))


def opened(order: dict[str, Any]) -> Any:
    """Return the model of a folder."""
    architecture = getattr(transformers, order["architecture"])
    model, report = architecture.from_pretrained(
        order["folder"], output_loading_info=True, dtype=torch.float32, **order["arguments"]
    )
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise ValueError(f"it reports {problems}")
    return model


def saved(order: dict[str, Any]) -> Any:
    """Return a model of random weights after saving it."""
    make = transformers.CONFIG_MAPPING[order["settings"]["model_type"]]
    known = set(make().to_dict()) - {"model_type", "architectures", "dtype", "transformers_version"}
    config = make(**{name: value for name, value in order["settings"].items() if name in known})
    config._attn_implementation = order["arguments"]["attn_implementation"]
    others = {name: value for name, value in order["arguments"].items() if name != "attn_implementation"}
    torch.manual_seed(1)
    model = getattr(transformers, order["architecture"])(config, **others)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else 0.15) * torch.randn(parameter.shape)
    model.save_pretrained(order["folder"])
    return model


def answer(model: Any, role: str, padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores and, as grad.NAME, the gradients."""
    scores = scores_of(model, role, padded)
    weigh(scores).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    found = {**scores, **{f"grad.{name}": gradient for name, gradient in gradients.items()}}
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def scores_of(model: Any, role: str, padded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a role's class computes: one row per sequence, or one per token that is not padding."""
    mask_NS = padded["attention_mask"].bool()
    if role == "multiple choice":
        return {"scores": model(**{name: tensor[:, None] for name, tensor in padded.items()}).logits}
    found = model(**padded)
    if role == "encoder":
        return {"scores": (found.last_hidden_state * mask_NS[..., None]).sum(1) / mask_NS.sum(1, keepdim=True)}
    if role == "question answering":
        return {"scores": torch.stack([found.start_logits, found.end_logits], dim=-1)[mask_NS]}
    if role == "pre-training":
        pair = next(found[name] for name in ("seq_relationship_logits", "sop_logits") if name in found)
        return {"scores": found.prediction_logits[mask_NS], "pair": pair}
    return {"scores": found.logits if role == "sequence classification" else found.logits[mask_NS]}


def weigh(scores: dict[str, Tensor]) -> Tensor:
    """Return the loss: every score times a fixed random number."""
    generator = torch.Generator().manual_seed(7)
    return sum(
        (tensor.flatten() * torch.randn(tensor.numel(), generator=generator, dtype=torch.float64)).sum()
        for tensor in scores.values()
    )  # type: ignore[return-value]


if __name__ == "__main__":
    main()
