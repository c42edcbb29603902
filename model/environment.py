"""Prepares the process for importing diffusers, which imports xFormers. `prepare` is called by the package's __init__."""

import ctypes
import gc
import importlib.util
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch


def prepare() -> None:
    load_cuda12_runtime()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its import warns about parts that SDXL does not use
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation; less fragmentation
    for library in ("xformers", "bitsandbytes"):  # their imports warn if CUDA is missing
        logging.getLogger(library).setLevel(logging.ERROR)
    import_libraries()


def import_libraries() -> None:
    """Imports what takes seconds, in two thirds of the time.

    bitsandbytes, which diffusers imports, comes without PyTorch's compilers: it decorates functions with torch.compile that it
    has for devices without kernels of its own. And Python does not search a million new objects for garbage again and again.
    """
    gc.disable()
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)  # type: ignore[assignment]
    try:
        with suppress(ImportError):
            import bitsandbytes  # noqa: F401
    finally:
        torch.compile = compiler
    from diffusers import StableDiffusionXLPipeline  # noqa: F401  # imports the rest of it

    gc.freeze()
    gc.enable()


def load_cuda12_runtime() -> None:
    """Loads libcudart.so.12 if it is installed: xFormers' wheel is linked against it, and a PyTorch for CUDA 13 does not load
    it.
    """
    package = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    folders = package.submodule_search_locations if package and torch.cuda.is_available() else None
    for folder in folders or ():
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
