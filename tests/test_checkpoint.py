import os

import pytest
import torch

from checkpoint import STATE, check_writable, find_state, load_state, save_state, write_atomically
from errors import UserError


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder/file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new, longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"step": 3, "lora": torch.randn(5), "optimizer": {"state": {0: {"m": torch.arange(3, dtype=torch.uint8)}}}}
    save_state(tmp_path, state)
    back = load_state(tmp_path / STATE)
    assert back["step"] == 3
    assert torch.equal(back["lora"], state["lora"])
    assert torch.equal(back["optimizer"]["state"][0]["m"], state["optimizer"]["state"][0]["m"])


def test_find_state(tmp_path):
    assert find_state("auto", tmp_path) is None
    with pytest.raises(UserError, match="no state there"):
        find_state(str(tmp_path), tmp_path)
    save_state(tmp_path, {"step": 1})
    assert find_state("none", tmp_path) is None
    for resume in ("auto", str(tmp_path), str(tmp_path / STATE)):
        assert find_state(resume, tmp_path) == tmp_path / STATE


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 half a zip"])
def test_a_damaged_state_is_refused(tmp_path, content):
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match="not a readable state"):
        load_state(tmp_path / "state.pt")


def test_a_state_never_runs_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"step": Attack()}, tmp_path / "state.pt")
    with pytest.raises(UserError, match="not a readable state"):
        load_state(tmp_path / "state.pt")
    assert not (tmp_path / "attacked").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/x cannot be written"):
        check_writable("--out", tmp_path / "file/x")
    check_writable("--out", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
