import errno
import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

from common.errors import UserError
from common.files import TolerantWriter, check_writable, lock_folder, sha256_of, write_atomically
from lora_files.read import read_metadata
from run.state import MANIFEST, STATE, find_state, load_state, read_state, save_state


def test_a_file_is_complete_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "folder/file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new, longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(("size", "needed"), [(123_456_789, "123.5"), (0, "0.0")])
def test_a_full_disk_says_how_much_is_needed(tmp_path, monkeypatch, size, needed):
    disk_full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=disk_full))
    monkeypatch.setattr("common.files.shutil.disk_usage", Mock(return_value=Mock(free=2_000_000)))
    with pytest.raises(OSError, match=f"No space left on device: {needed} MB are needed, 2.0 MB are free"):
        write_atomically(tmp_path / "file", bytes(size))
    assert not os.listdir(tmp_path)


def test_a_state_loads_as_it_was_saved(tmp_path):
    state = {"step": 3, "lora": torch.randn(5), "optimizer": {"state": {0: {"m": torch.arange(3, dtype=torch.uint8)}}}}
    loaded = load_state(save_state(tmp_path, state, {}))
    assert loaded["step"] == 3
    assert torch.equal(loaded["lora"], state["lora"])
    assert torch.equal(loaded["optimizer"]["state"][0]["m"], state["optimizer"]["state"][0]["m"])


def test_find_state(tmp_path):
    assert find_state("auto", tmp_path) is None
    with pytest.raises(UserError, match="no state that can be used"):
        find_state(str(tmp_path), tmp_path)
    for step in range(11):  # state-10 is newer than state-9
        path = save_state(tmp_path, {"step": step}, {})
    assert os.listdir(tmp_path) == [path.name]
    assert find_state("none", tmp_path) is None
    for resume in ("auto", str(tmp_path), str(path)):
        assert find_state(resume, tmp_path) == (path, {"step": 10})


def test_a_state_of_the_old_format_is_an_error(tmp_path):
    (tmp_path / "state").mkdir()
    with pytest.raises(UserError, match="--resume none starts anew"):
        find_state("auto", tmp_path)


def test_auto_takes_the_newest_complete_state(tmp_path, capfd):
    first = save_state(tmp_path, {"step": 1}, {})
    for number, spoil in ((2, lambda p: (p / STATE).write_bytes(b"")), (3, lambda p: (p / MANIFEST).unlink())):
        spoil(shutil.copytree(first, tmp_path / f"state-{number}"))
    torn = shutil.copytree(first, tmp_path / "state-4") / STATE
    torn.write_bytes(torn.read_bytes()[:-1] + b"x")
    shutil.copytree(first, tmp_path / ".state-5")  # a save killed before its last rename
    assert find_state("auto", tmp_path) == (first, {"step": 1})
    warnings = capfd.readouterr().err.splitlines()
    assert all(f"state-{n} is not a readable state" in line for n, line in zip((4, 3, 2), warnings, strict=True))
    with pytest.raises(UserError, match=r"state-4 is not a readable state: .*state.pt is not what manifest.json says"):
        find_state(str(tmp_path), tmp_path)
    assert save_state(tmp_path, {"step": 2}, {}).name == "state-5"
    assert os.listdir(tmp_path) == ["state-5"]
    (tmp_path / "state-5" / STATE).unlink()
    with pytest.raises(UserError, match="--resume none starts anew"):
        find_state("auto", tmp_path)


def test_the_last_state_is_kept_until_the_new_one_was_read_back(tmp_path):
    first = save_state(tmp_path, {"step": 1}, {})
    (tmp_path / "lora").write_bytes(b"another")
    with pytest.raises(OSError, match="lora does not read back"):
        save_state(tmp_path, {"step": 2}, {"lora": b"lora"})
    assert find_state("auto", tmp_path) == (first, {"step": 1})
    (tmp_path / "lora").write_bytes(b"lora")
    save_state(tmp_path, {"step": 2}, {"lora": b"lora"})
    assert find_state("auto", tmp_path)[1] == {"step": 2}


def test_a_save_killed_at_any_write_leaves_a_complete_state(tmp_path, monkeypatch):
    """Kills one save at its first call that changes the disk, the next at its second, and so on until a save gets through."""

    class Killed(BaseException):  # not an Exception: as with SIGKILL, no handler runs
        pass

    changing = [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"), (os, "rmdir")]
    found, countdown = {0}, 0

    def with_countdown(call):
        def wrapped(*arguments, **options):
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise Killed
            return call(*arguments, **options)

        return wrapped

    save_state(tmp_path, {"step": 0}, {})
    for module, name in changing:
        monkeypatch.setattr(module, name, with_countdown(getattr(module, name)))
    for step in range(1, 100):
        countdown = step
        try:
            save_state(tmp_path, {"step": step}, {})
        except Killed:
            found.add(find_state("auto", tmp_path)[1]["step"])
            continue
        break
    assert 10 < step < 99
    assert find_state("auto", tmp_path)[1] == {"step": step}
    assert found > {0}  # killed while it removed the old state: the new one was complete
    assert len(os.listdir(tmp_path)) == 1


def test_a_state_never_runs_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    first = save_state(tmp_path, {"step": 1}, {})
    with pytest.raises(pickle.UnpicklingError):
        save_state(tmp_path, {"step": Attack()}, {})
    assert os.listdir(tmp_path) == [first.name]
    torch.save({"step": Attack()}, first / STATE)
    (first / MANIFEST).write_text(json.dumps({STATE: sha256_of((first / STATE).read_bytes())}))
    with pytest.raises(UserError, match="not a readable state: UnpicklingError"):
        find_state(str(tmp_path), tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_a_write_error_is_reported_once(tmp_path, capfd):
    writer = TolerantWriter()
    for _ in range(2):
        assert writer("the file", (tmp_path / "no/file").touch) is None
    assert writer.failed
    assert writer("the file", lambda: 3) == 3
    assert not writer.failed
    assert capfd.readouterr().err.count("the file could not be written") == 1


def test_a_folder_that_vanishes_while_it_is_read_back_is_a_write_error(tmp_path, monkeypatch, capfd):
    def without_folder(read):
        return lambda path: (shutil.rmtree(tmp_path), read(path))

    monkeypatch.setattr("run.state.read_state", without_folder(read_state))
    assert TolerantWriter()("the state", lambda: save_state(tmp_path, {"step": 1}, {})) is None
    lora = tmp_path / "lora.safetensors"
    for read in (read_metadata, lambda path: torch.UntypedStorage.from_file(str(path), nbytes=1)):  # a RuntimeError
        assert TolerantWriter()("the file", lambda read=read: write_atomically(lora, b"", without_folder(read))) is None
    assert capfd.readouterr().err.count("could not be written ([Errno 2] No such file") == 3
    with pytest.raises(UserError, match="is not a readable"):
        TolerantWriter()("the file", lambda: write_atomically(lora, b"rubbish", read_metadata))


LOCKING = """
import os, sys, time
from pathlib import Path
from common.files import lock_folder
lock = lock_folder("--out", Path(sys.argv[1]))
worker = os.fork()
if worker:  # both live on
    print(worker, flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process_and_not_with_its_workers(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOCKING, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=rf"--out {tmp_path}: another run is writing there"):
                lock_folder("--out", tmp_path)
        process.kill()
        process.wait()
        os.kill(worker, 0)
        lock_folder("--out", tmp_path).close()
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capfd):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock_folder("--out", tmp_path).close()
    assert "cannot be locked (No locks available)" in capfd.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/x cannot be written"):
        check_writable("--out", tmp_path / "file/x")
    check_writable("--out", tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []
