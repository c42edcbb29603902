"""The header of a .safetensors file: where its tensors are, of which dtypes, and what a file is that has none."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common.errors import UserError

PICKLE = "is a pickle, and pickles, which can run code, are not read: convert it to .safetensors"
FOREIGN = {  # first bytes of a file that is no .safetensors file -> what it is
    b"PK": PICKLE,
    b"\x80": PICKLE,
    b"GGUF": "is a GGUF file of quantised weights, which are not read: use the .safetensors file that it was made of",
    b"version https://git-lfs": "is a pointer of Git LFS, not the file itself: run `git lfs pull`",
    b"<": "is a web page, not a .safetensors file: download the file itself",
}
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def why_no_safetensors(path: Path) -> str | None:
    """What a file is instead of a .safetensors file and what to do, to be read after its name; None if it seems to be one."""
    if not path.is_file():
        return "is no file" if path.exists() else None
    with path.open("rb") as file:
        start = file.read(24)
    if start[8:9] == b"{":  # after the length of the header
        return None
    unknown = None if path.suffix.lower() == ".safetensors" else "is not a readable .safetensors file"
    return next((what for first, what in FOREIGN.items() if start.startswith(first)), unknown)


def read_header(path: Path) -> tuple[int, dict]:
    """(byte at which the data begins, {key: {dtype, shape, data_offsets}}) of a .safetensors file. Raises UserError if it is
    none, or damaged.
    """
    try:
        if reason := why_no_safetensors(path):
            raise UserError(f"{path} {reason}")
        with safe_open(path, "pt"):  # checks every offset
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            return 8 + length, {key: entry for key, entry in header.items() if entry is not None}  # as metadata may be
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable .safetensors file: {error}") from None


def encode_header(header: dict) -> bytes:
    """The beginning of a .safetensors file, in the order of `header`: the library writes metadata in a random order."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_dtypes(path: Path, header: dict, exempt: str) -> None:
    """Raises UserError, which names the first, if a tensor is of integers or another dtype that holds no weights without the
    scales that its program keeps. `exempt`: how keys end that may be of any real dtype.
    """
    for key, entry in header.items():
        dtype = entry.get("dtype", "F32")
        if dtype not in WEIGHT_DTYPES and (dtype == "C64" or not key.endswith(exempt)):
            raise UserError(f"{path}: {key} is {dtype}, which holds no weights: {', '.join(WEIGHT_DTYPES)} do")
