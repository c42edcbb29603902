"""What has to be so before diffusers is imported, which imports xFormers: the package's __init__ calls `prepare`."""

import ctypes
import importlib.util
import logging
import os
from pathlib import Path

import torch


def prepare() -> None:
    load_cuda12_runtime()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # at import it warns of parts that SDXL does not use
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation; hardly any gaps
    for library in ("xformers", "bitsandbytes"):  # at import they warn that there is no CUDA
        logging.getLogger(library).setLevel(logging.ERROR)


def load_cuda12_runtime() -> None:
    """xFormers' wheel is linked against CUDA 12; beside a CUDA-13 PyTorch its library must be in the process beforehand."""
    package = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    folders = package.submodule_search_locations if package and torch.cuda.is_available() else None
    for folder in folders or ():
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
