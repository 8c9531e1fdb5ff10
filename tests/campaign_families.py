"""Every form of every family beside two releases of transformers, both ways, for every role.

    python tests/campaign_families.py --peer PYTHON --work FOLDER

PYTHON is an interpreter that has transformers 4.57; the other release is the one installed here. Opened: a folder that
we export, as that release loads it, gives our scores, our gradients and our token ids. Imported: a folder that the
release makes of the settings it knows, and saves, gives its scores and gradients when we read it. A pattern of windows
that the release cannot say must be refused by it. fp64 on the same weights; sequences of 40, 23, 7 and 1 tokens,
windows of 7 and 8. Rows: tests/results/families.jsonl; a form that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from campaign_rows import add_row, read_rows
from downstream_cases import PIECES, tokenizer_of
from family_cases import FORMS, SPECIAL_IDS, disturbed, of_size, ragged
from family_peer import weigh
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.tuning.task_folder import (
    TaskFacts,
    _form_rows,
    make_task_model,
    read_task_folder,
    write_task_folder,
)
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.hf_folder import load_hf_folder, model_card_text, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import discriminator_from_hf, hf_config, modern_names, to_hf
from bert_ds.encoder.objectives.replaced_tokens import Discriminator
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.encoder.tensor_rows import rows_to_hf

RESULTS = Path(__file__).parent / "results/families.jsonl"
CASES: dict[str, EncoderConfig] = {
    **{name: form for name, form in FORMS.items() if form.exported() == form.spelled_out()},
    "modernbert, all biases, every third layer sees all": of_size(FORMS["modernbert, all biases"], layer_types=None),
    "modernbert, every layer sees all": of_size(FORMS["modernbert"], global_attn_every_n_layers=1),
}
TASKS = {
    "sequence classification": "classification",
    "token tags": "token_classification",
    "question answering": "question_answering",
    "multiple choice": "multiple_choice",
    "encoder": "sentence_embedding",
}
"""Role -> a kind whose model plays it."""
TEXTS = ("the film is very dull.", "we saw it in London and Paris, 3 times", "中文", "")
LABELS = {"label": ("a", "b", "c"), "tag": ("a", "b", "c")}


class Packed(NamedTuple):
    """The batch in both forms."""

    padded: dict[str, Tensor]
    packed: dict[str, Any]


def main() -> None:
    """Compare, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="an interpreter that has transformers 4.57")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for python in (args.peer, Path(sys.executable)):
        release = _output(python, "-c", "import transformers; print(transformers.__version__)")
        done = {row["form"] for row in read_rows(RESULTS) if row.get("transformers") == release}
        for name, form in CASES.items():
            if name not in done:
                config = of_size(form, vocab_size=len(PIECES))
                rows = list(compare(config, python, args.work / release / name.replace(", ", "_").replace(" ", "_")))
                for row in rows:
                    assert row.pop("holds"), row
                    add_row(RESULTS, {"transformers": release, "form": name, **row})


def compare(config: EncoderConfig, python: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each role and direction of one form."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer_of(config).save(folder / "tokenizer")
    batch, roles = Packed(*ragged(config)), family_of(config).roles(config)
    save_file({name: tensor.contiguous() for name, tensor in batch.padded.items()}, folder / "inputs.safetensors")
    is_eager = roles["encoder"].architecture.startswith(("Megatron", "Electra"))  # in 4.57 they have nothing else
    attention = {"attn_implementation": "eager" if is_eager else "sdpa"}
    orders, models = [], {}
    for name, role in roles.items():
        model = disturbed(model_of(config, name)).double().eval()
        order = {"role": name, "architecture": role.architecture, "arguments": {**attention, **role.without_front}}
        number, models[name] = name.replace(" ", "_"), model
        written = folder / f"ours_{number}"
        write(written, model, role=name, tokenizer=folder / "tokenizer")
        orders.append({**order, "what": "open", "name": f"open_{number}", "folder": str(written), "texts": TEXTS})
        settings = {**hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS), **_label_settings(name)}
        theirs = str(folder / f"theirs_{number}")
        orders.append({**order, "what": "save", "name": f"save_{number}", "folder": theirs, "settings": settings})
    (folder / "orders.json").write_text(json.dumps(orders))
    _output(python, str(Path(__file__).with_name("family_peer.py")), str(folder))
    for order in orders:
        said = json.loads((folder / f"{order['name']}.json").read_text())
        yield row_of(order, said, folder, config, models[order["role"]], batch)


def row_of(
    order: Mapping[str, Any], said: Mapping[str, Any], folder: Path, config: EncoderConfig, model: Any, batch: Packed
) -> dict[str, Any]:
    """Return what an order showed."""
    is_opened = order["what"] == "open"
    row: dict[str, Any] = {"role": order["role"], "what": "opened" if is_opened else "imported"}
    if "error" in said:
        return {**row, "refused": said["error"], "holds": not _can_be_said(config, folder)}
    if not is_opened:
        model = read(Path(order["folder"]), order["role"]).double().eval()
    scores, gradients = ours(model, order["role"], batch)
    found = load_file(folder / f"{order['name']}.safetensors")
    named = {name.removeprefix("grad."): tensor for name, tensor in found.items() if name.startswith("grad.")}
    wanted = modern_names(named, config)
    row["scores"] = max(_difference(scores[name], found[name]) for name in scores)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    distances = {
        name: float((gradients[name] - gradient).norm() / (gradient.norm() + 1e-6 * largest))
        for name, gradient in wanted.items()
        if name in gradients
    }
    row |= {"gradients": max(distances.values()), "tensors": len(distances)}
    holds = row["scores"] <= 1e-6 and row["gradients"] <= 1e-5 and set(wanted) == set(gradients)
    if is_opened:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
        row["ids_equal"] = said["ids"] == [tokenizer.encode(text).ids for text in TEXTS]
        holds = holds and row["ids_equal"] and said["model_max_length"] == config.max_position_embeddings
    return {**row, "holds": holds}


def model_of(config: EncoderConfig, role: str) -> Any:
    """Return a model of ours that plays the role."""
    if role in TASKS:
        return make_task_model(KINDS[TASKS[role]], config, LABELS, kernels="torch")
    if role == "replaced tokens":
        return Discriminator(config, kernels="torch")
    return PretrainingModel(config, kernels="torch", has_pair_head=role == "pre-training")


def write(folder: Path, model: Any, *, role: str, tokenizer: Path) -> None:
    """Export a model as the verbs do."""
    model.float()
    if isinstance(model, TaskModel):
        facts = TaskFacts("tiny", TASKS[role], LABELS, "none", model.config.max_position_embeddings, {})
        write_task_folder(folder, model, facts=facts, tokenizer=tokenizer)
    else:
        folder.mkdir()
        objective = "nsp" if role == "pre-training" else "none"
        write_hf_folder(
            folder,
            config=hf_config(
                model.config,
                sentence_pair=objective,
                special_ids=special_ids(tokenizer),
                has_detector=role == "replaced tokens",
            ),
            tensors=to_hf(model.state_dict(), model.config),
            tokenizer=tokenizer,
            model_card=model_card_text("tiny", model.config, {}),
        )
    model.double()


def read(folder: Path, role: str) -> Any:
    """Import a folder as the verbs do."""
    if role == "replaced tokens":
        source = load_hf_folder(folder)
        model = Discriminator(source.config, kernels="torch")
        model.load_state_dict(discriminator_from_hf(source.tensors, source.config))
        return model
    return read_task_folder(folder, KINDS[TASKS[role]], kernels="torch")[0] if role in TASKS else load_masked_lm(folder)


def ours(model: Any, role: str, batch: Packed) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores of the batch, and the gradients under the names of transformers."""
    scores = _scores(model, role, batch.packed)
    weigh(scores).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    if role in TASKS:
        return scores, rows_to_hf(gradients, _form_rows(KINDS[TASKS[role]].hf_forms[0], model))
    return scores, to_hf(gradients, model.config)


def _scores(model: Any, role: str, packed: dict[str, Any]) -> dict[str, Tensor]:
    if role in TASKS:
        *_, found = model(**packed, targets={}, with_scores=True)
        return {"scores": found[KINDS[TASKS[role]].hf_forms[0].scores]}
    if role == "replaced tokens":
        return {"scores": model(**packed)}
    hidden_TD = model.bert(**packed)
    decoder = model.predictions.decoder(hidden_TD, model.bert.embeddings.word_weight)
    scores = {"scores": F.linear(*decoder)[:, : model.config.vocab_size]}
    if model.has_pair_head:
        scores["pair"] = model.seq_relationship(model.bert.sequence_rows(hidden_TD, packed["cu_seqlens"]))
    return scores


def _label_settings(role: str) -> dict[str, Any]:
    number = {"sequence classification": 3, "token tags": 3, "question answering": 2, "multiple choice": 1}.get(role)
    return {} if number is None else {"id2label": {index: f"l{index}" for index in range(number)}}


def _can_be_said(config: EncoderConfig, folder: Path) -> bool:
    """Whether both releases have words for what the layers see."""
    written = json.loads((folder / "ours_masked_words/config.json").read_text())
    return config.family != "modernbert" or bool(written.get("global_attn_every_n_layers"))


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


if __name__ == "__main__":
    main()
