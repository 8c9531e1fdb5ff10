"""A small model, its tokenizer and its exported folder, for the tests of the export."""

from __future__ import annotations

from pathlib import Path

from encoder_cases import small_config, spread_weights
from torch import Tensor

from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer
from bert_ds.encoder.hf_folder import model_card_text, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [*SPECIAL_PIECES, *LETTERS, *(f"##{letter}" for letter in LETTERS), ".", ",", "中", "文", "the", "##ing"]
CONFIG = small_config(vocab_size=len(PIECES))


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer folder of PIECES and return it."""
    rules = TextRules(lowercase=True, strip_accents=True, tokenize_chinese_chars=True)
    WordPieceTokenizer(PIECES, rules).save(folder)
    return folder


def spread_state_dict(*, has_pair_head: bool = True) -> dict[str, Tensor]:
    """The small model's weights, none of them where it started."""
    model = PretrainingModel(CONFIG, has_pair_head=has_pair_head)
    spread_weights(model, CONFIG)
    return model.state_dict()


def export(folder: Path, tokenizer: Path, state_dict: dict[str, Tensor], sentence_pair: str = "nsp") -> None:
    """Write the folder as export_hf.py does, unchecked."""
    folder.mkdir(exist_ok=True)
    write_hf_folder(
        folder,
        config=hf_config(CONFIG, sentence_pair=sentence_pair, special_ids=special_ids(tokenizer)),
        tensors=to_hf(state_dict, CONFIG),
        tokenizer=tokenizer,
        model_card=model_card_text("small", CONFIG, {"steps": 3}),
    )
