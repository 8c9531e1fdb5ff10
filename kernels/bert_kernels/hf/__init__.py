"""transformers' BERT-class models without padding, in one line: `from bert_kernels.hf import unpad, repad, describe`.

The only part of bert_kernels that imports transformers.
"""

from bert_kernels.hf.unpadding import describe, repad, unpad

__all__ = ["describe", "repad", "unpad"]
