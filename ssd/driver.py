"""The NVIDIA driver of this machine. Where it is too old for torch's CUDA, torch says only that there is no GPU."""

import os
import subprocess

import torch

# Oldest driver by CUDA's major version: docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
OLDEST = {"11": 450, "12": 525, "13": 580}
VERSION = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def check() -> None:
    """ValueError where this machine has a GPU that torch cannot use because the driver is too old.

    Without it a step would train on the CPU in silence. A person who wants that hides the GPU.
    """
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or is_hidden or torch.cuda.is_available():
        return
    version, oldest = _version(), OLDEST.get(torch.version.cuda.partition(".")[0], 0)
    if version and int(version.partition(".")[0]) < oldest:
        raise ValueError(
            f"NVIDIA driver {version} is too old for torch {torch.__version__} with CUDA {torch.version.cuda}, which "
            f"needs driver {oldest} or later; update the driver, or set CUDA_VISIBLE_DEVICES=-1 to use the CPU"
        )


def _version() -> str:
    """Version of the driver, such as 570.124.06; empty where no GPU is there."""
    try:
        found = subprocess.run(VERSION, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return found.stdout.partition("\n")[0].strip() if found.returncode == 0 else ""
