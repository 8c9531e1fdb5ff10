"""Packaging of bert_ds and bert_kernels; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

SHIPPED = ("ds_configs", "slurm")
"""Top-level folders of JSON and shell files that a wheel carries as data of bert_ds._shipped."""


def shipped_packages() -> dict[str, str]:
    """Map each data package name to its folder."""
    mapping = {}
    for top in SHIPPED:
        for folder in [Path(top), *sorted(path for path in Path(top).rglob("*") if path.is_dir())]:
            if folder.is_dir() and "__pycache__" not in folder.parts:
                mapping["bert_ds._shipped." + ".".join(folder.parts)] = str(folder)
    return mapping


data_packages = shipped_packages()
source = Path("bert_ds/__init__.py").read_text(encoding="utf-8")
(version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)

setup(
    name="bert-ds",
    version=version,
    description="Pre-train BERT-class encoders with DeepSpeed ZeRO, exact LAMB and fused Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["bert_ds", "bert_ds.*"]),
        *find_packages("kernels", include=["bert_kernels", "bert_kernels.*"]),
        *data_packages,
    ],
    package_dir={"bert_kernels": "kernels/bert_kernels", **data_packages},
    package_data={
        **{name: ["*.json", "*.sh", "*.example", "*.md"] for name in data_packages},
        "bert_ds.configuration.deepspeed_file": ["*.json"],
    },
    # The tested ranges; constraints-cpu.txt and constraints-cuda.txt pin one tested set.
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "triton>=3.6; platform_system == 'Linux'",
        "tokenizers>=0.22,<0.24",
        "transformers>=5.3,<6",
        "safetensors>=0.5",
        "pydantic>=2.11,<3",
        "numpy>=1.26",
        "psutil>=5.9",
        "rich>=13",
    ],
    extras_require={
        "data": ["pyarrow>=15", "zstandard>=0.22"],
        "zh": ["jieba>=0.42"],
        "clean": ["rensa>=0.5,<0.6"],
        "plots": ["matplotlib>=3.8"],
        "downstream": ["scikit-learn>=1.4", "scipy>=1.11"],
        "tensorboard": ["tensorboard>=2.16"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22"],
        "retrieval": ["bm25s>=0.3,<0.4"],
        "embeddings": ["sentence-transformers>=5.1"],
        "docs": ["properdocs>=1.6.7,<1.7", "properdocs-theme-mkdocs>=1.6.7,<1.7"],
        "dev": [
            "pytest>=8",
            "setuptools>=77",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "import-linter>=2.0",
            "pip-audit>=2.7",
            "pyarrow>=15",
            "zstandard>=0.22",
            "rensa>=0.5,<0.6",
            "matplotlib>=3.8",
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "tensorboard>=2.16",
            "onnx>=1.18",
            "onnxscript>=0.5",
            "onnxruntime>=1.22",
            "sentence-transformers>=5.1",
            "bm25s>=0.3,<0.4",
            "seqeval==1.2.2",
            "accelerate>=1.10",
            "peft>=0.18",
            "properdocs>=1.6.7,<1.7",
            "properdocs-theme-mkdocs>=1.6.7,<1.7",
        ],
    },
    entry_points={"console_scripts": ["bert-ds = bert_ds.console:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Operating System :: POSIX :: Linux",
    ],
)
