"""Pre-training of BERT-class encoders with DeepSpeed; the command is `bert-ds`."""

__version__ = "0.1.0"
