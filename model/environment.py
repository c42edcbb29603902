"""Prepares the process for importing diffusers, which imports xFormers. `prepare` is called by the package's __init__."""

import ctypes
import importlib.util
import logging
import os
from pathlib import Path

import torch


def prepare() -> None:
    load_cuda12_runtime()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns about parts that SDXL does not use
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation; less fragmentation
    for library in ("xformers", "bitsandbytes"):  # their imports warn if CUDA is missing
        logging.getLogger(library).setLevel(logging.ERROR)


def load_cuda12_runtime() -> None:
    """Loads libcudart.so.12 if it is installed: xFormers' wheel is linked against it, and a PyTorch for CUDA 13 does not load
    it.
    """
    package = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    folders = package.submodule_search_locations if package and torch.cuda.is_available() else None
    for folder in folders or ():
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
