"""Files that are there whole or not at all, and the state of a run: `state.pt` beside the LoRA files."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

from errors import UserError

STATE = "state/state.pt"


def write_atomically(path: Path, data: bytes, check: Callable[[Path], None] = lambda written: None) -> None:
    """Temporary file, fsync, rename, fsync of the folder: a crash leaves the old file or the new one, never half of one.

    `check` looks at the temporary file; what it raises leaves the old file in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def check_writable(flag: str, folder: Path) -> None:
    """Creates the folder. Raises UserError naming `flag` if a file cannot be written there."""
    try:
        write_atomically(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written: {error.strerror}") from None


def save_state(folder: Path, state: dict) -> None:
    """`state` holds tensors, numbers, strings and containers of them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / STATE, buffer.getvalue())


def find_state(resume: str, folder: Path) -> Path | None:
    """--resume none | auto (the state in `folder`, if there is one) | a state file or the folder of a run.

    Raises UserError if a named path holds no state.
    """
    if resume == "none":
        return None
    path = folder / STATE if resume == "auto" else Path(resume)
    path = path / STATE if path.is_dir() else path
    if path.is_file():
        return path
    if resume == "auto":
        return None
    raise UserError(f"--resume {resume}: no state there ({path} does not exist)")


def load_state(path: Path) -> dict:
    """Tensors on the CPU. Raises UserError if the file is no state of ours."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise UserError(f"--resume {path} is not a readable state: {type(error).__name__}: {error}") from None
