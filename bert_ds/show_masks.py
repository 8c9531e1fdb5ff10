"""Fill some masks with an exported model, through plain transformers code."""

from __future__ import annotations

import os
from typing import Any

from bert_ds.launch.command_line import answer_early, run_main
from bert_ds.launch.verb_arguments import show_masks_arguments

if __name__ == "__main__":
    answer_early(show_masks_arguments)

# A folder is all that is needed; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import pipeline
from transformers.utils import logging

from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.hf_folder import read_json
from bert_ds.encoder.hf_mapping import model_config_from_hf

TEXTS = (
    "Return a new [MASK] with the same elements.",
    "If the file does not [MASK], an error is raised.",
    "This function returns the [MASK] of the array.",
    "The default value [MASK] None.",
)


def main() -> None:
    args = show_masks_arguments()
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
