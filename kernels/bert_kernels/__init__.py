"""Fused operators of BERT training: each file holds one operator, its plain torch reference and its Triton kernels.

For every operator `<op>` the file `<op>.py` offers two functions of the same signature:
`<op>_reference` is plain torch, differentiable by autograd, on any device; `<op>` is the Triton operator, for CUDA
tensors (CPU tensors too when the environment says TRITON_INTERPRET=1). Neither falls back to the other: the caller
chooses. This package imports torch and triton only, `bert_kernels.hf` alone transformers; importing it costs nothing.
"""

__version__ = "0.1.0"
