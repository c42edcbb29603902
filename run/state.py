"""The saved states of a run: folders beside its LoRA files, written so that a crash leaves a whole one.

checkpoints/state-7/state.pt         everything that --resume needs
checkpoints/state-7/manifest.json    {file: SHA-256} of it, and of the LoRA files of that step
"""

import errno
import io
import json
import shutil
from pathlib import Path

import torch

from common.errors import UserError, warn
from common.files import sha256_of, sync_folder, write_atomically

STATE, MANIFEST = "state.pt", "manifest.json"


def find_states(folder: Path, prefix: str = "") -> list[Path]:
    """The folders {prefix}state-{number} in `folder`, the newest first."""
    known = {p: p.name.removeprefix(f"{prefix}state-") for p in folder.glob(f"{prefix}state-*")}
    return sorted((p for p, number in known.items() if number.isdecimal()), key=lambda p: int(known[p]), reverse=True)


def save_state(folder: Path, state: dict, files: dict[str, bytes]) -> Path:
    """Writes a state; returns its folder. `state` holds tensors, numbers, strings and containers of them; `files` are {name:
    content} of the LoRA files in `folder` that belong to it.

    It is written under another name, fsynced, read back together with `files`, and renamed; only then older states are removed:
    killed at any moment, this leaves a whole one. Raises OSError, also if it does not read back; the older state is then kept.
    """
    older = find_states(folder)
    numbered = f"state-{1 + int(older[0].name.rpartition('-')[2]) if older else 1}"
    buffer = io.BytesIO()
    torch.save(state, buffer)
    manifest = {STATE: sha256_of(buffer.getvalue())} | {name: sha256_of(content) for name, content in files.items()}
    aside, new = folder / f".{numbered}", folder / numbered
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write_atomically(aside / STATE, buffer.getvalue())
        write_atomically(aside / MANIFEST, json.dumps(manifest, indent=2).encode())
        read_state(aside)
        if wrong := [name for name in files if sha256_of((folder / name).read_bytes()) != manifest[name]]:
            raise OSError(errno.EIO, f"{wrong[0]} does not read back as it was written")
        aside.replace(new)
        sync_folder(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in (*older, *find_states(folder, ".")):
        shutil.rmtree(old, ignore_errors=True)
    return new


def read_state(path: Path) -> dict:
    """Tensors on the CPU. Raises OSError, and anything if the folder is no state of ours."""
    data, manifest = (path / STATE).read_bytes(), json.loads((path / MANIFEST).read_bytes())
    if sha256_of(data) != manifest[STATE]:
        raise OSError(errno.EIO, f"{STATE} is not what {MANIFEST} says")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def load_state(path: Path) -> dict:
    """Reads a state. Raises UserError if it is damaged, or not ours."""
    try:
        return read_state(path)
    except Exception as error:  # a damaged file makes the unpickler raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"--resume: {path} is not a readable state: {type(error).__name__}: {reason}") from None


def find_state(resume: str, folder: Path) -> tuple[Path, dict] | None:
    """--resume none | auto (the newest whole state in `folder`, if there is one) | a state, or the folder of a run: its newest.

    Raises UserError if a named path holds no whole state, or if `folder` holds states but no whole one.
    """
    if resume == "none":
        return None
    root = folder if resume == "auto" else Path(resume)
    if root.suffix == ".safetensors":
        raise UserError(f"--resume {resume} is a LoRA file, not a saved state: --init-lora {resume} goes on from it")
    found = [root] if (root / MANIFEST).exists() else find_states(root)
    for path in found:
        try:
            return path, load_state(path)
        except UserError as damaged:
            if resume != "auto":
                raise
            warn(f"passed over: {damaged}")
    if resume == "auto" and not found and not (folder / "state").exists():
        return None
    raise UserError(f"--resume {resume}: no state that can be used in {root}: --resume none starts anew")
