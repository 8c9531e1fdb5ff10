"""Secrets have no place in configuration: which names and values are taken for one, and where to put it instead."""

from __future__ import annotations

import re

_NAME = re.compile(
    r"(^|_)((api|access|private|secret|signing|auth|wandb|comet|hf|ssh)_?key|(auth|access|hf|api|bearer)?_?token"
    r"|password|passwd|pwd|passphrase|secret|credentials?|authorization|bearer)$"
)
_VALUE = re.compile(
    r"://[^/@\s]*:[^/@\s]*@"  # user and password in a URL
    r"|(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,})"
    r"|(?<![A-Za-z0-9])(AKIA[A-Z0-9]{16}(?![A-Za-z0-9])|xox[bp]-[A-Za-z0-9-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_VARIABLES = (("comet", "COMET_API_KEY"), ("wandb", "WANDB_API_KEY"), ("hf", "HF_TOKEN"), ("hugging", "HF_TOKEN"))


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name would hold a secret: api_key, hfToken, AWS-secret, ..."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return _NAME.search(re.sub(r"[^A-Za-z0-9]+", "_", words).lower().strip("_")) is not None


def is_secret_value(value: str) -> bool:
    """Whether a text holds what only a secret looks like: the password of a URL, a known kind of key."""
    return _VALUE.search(value) is not None


def secret_text(path: str) -> str:
    """Return what to say of a secret at this setting; its value is never shown."""
    named = next((variable for word, variable in _VARIABLES if word in path.lower()), None)
    return "looks like a secret; secrets are read from the environment, never from files: set " + (
        named or "WANDB_API_KEY, COMET_API_KEY or HF_TOKEN there"
    )
