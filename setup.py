"""Packaging. Top-level ops/, configs/ and tools/ install below simipu3d (simipu3d.ops, simipu3d.configs, simipu3d.tools)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "simipu3d/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="simipu3d",
    version=VERSION,
    description="Self-supervised pre-training of image and point-cloud backbones from calibrated camera + lidar drives",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=[
        *find_packages(include=["simipu3d", "simipu3d.*"]),
        "simipu3d.ops",
        "simipu3d.tools",
        "simipu3d.configs",
    ],
    package_dir={"simipu3d.ops": "ops", "simipu3d.tools": "tools", "simipu3d.configs": "configs"},
    package_data={"simipu3d": ["py.typed"], "simipu3d.configs": ["**/*.yaml"]},
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "timm>=1.0.20,<1.1",
        "lightning>=2.6,<3",
        "numpy>=1.26",
        "scipy>=1.11",
        "numba>=0.60",
        "pydantic>=2.7",
        "pyyaml>=6",
        "tensorboard>=2.15",
        "rich>=13",
        "pillow>=10.1",
        "matplotlib>=3.8",
        "safetensors>=0.4",
        "pyarrow>=15",
        "protobuf>=4.25",
        "google-crc32c>=1.5",
        "fsspec>=2024.2",
    ],
    extras_require={
        "cpu": ["spconv>=2.3.8"],
        "cu120": ['spconv-cu120>=2.3.6; python_version < "3.12"'],
        "cu126": ["spconv-cu126>=2.3.8"],
        "scatter": ["torch-scatter>=2.1.2"],
        "dev": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9", "mypy>=2.4,<2.5", "shapely>=2", "webdataset>=0.2.90"],
    },
    entry_points={"console_scripts": ["simipu3d = simipu3d.tools.main:main"]},
)
