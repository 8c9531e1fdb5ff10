"""Fill some masks with an exported model, through plain transformers code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# A folder is all that is needed; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import pipeline
from transformers.utils import logging

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.hf_folder import read_json
from bert_ds.encoder.hf_mapping import model_config_from_hf
from bert_ds.launch.command_line import make_parser, run_main

TEXTS = (
    "Return a new [MASK] with the same elements.",
    "If the file does not [MASK], an error is raised.",
    "This function returns the [MASK] of the array.",
    "The default value [MASK] None.",
)


def main() -> None:
    parser = make_parser("Print the likeliest words for the [MASK] of some sentences.")
    parser.add_argument("--model", type=Path, required=True, help="exported Hugging Face folder")
    parser.add_argument("--text", action="append", help="sentence with one [MASK]; may be repeated")
    parser.add_argument("--top_k", type=int, default=5, help="words per sentence")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise ConfigError(f"{args.model} has no config.json: wanted an exported folder, see export_hf.py")
    try:
        model_config_from_hf(read_json(args.model / "config.json"))
    except ConfigError as error:
        raise ConfigError(f"{args.model}: {error}") from None
    texts = args.text or list(TEXTS)
    for text in texts:
        if text.count("[MASK]") != 1:
            raise ConfigError(f"--text {text!r} has {text.count('[MASK]')} [MASK], wanted one")
    logging.disable_progress_bar()
    fill_mask: Any = pipeline(
        "fill-mask",
        model=str(args.model),
        top_k=args.top_k,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True},  # from this folder only: see HF_HUB_OFFLINE above
    )
    for text in texts:
        answers = fill_mask(text.replace("[MASK]", fill_mask.tokenizer.mask_token))
        words = ", ".join(f"{answer['token_str']} {answer['score']:.2f}" for answer in answers)
        print(f"{text}\n    {words}")


if __name__ == "__main__":
    run_main(main)
