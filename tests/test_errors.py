"""What a script leaves on the terminal: when its reader is gone, when it is interrupted, where there is no terminal."""

import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
from conftest import ROOT

SCRIPT = """
import sys
from common.errors import UserError, one_line_errors, warn
with one_line_errors("a.py"):
    {body}
"""
LINES = "[print(i) for i in range({count})]"


def run(body: str, shell: str = "{}", **environment: str) -> tuple[str, str]:
    """(stdout with the exit statuses of the pipe in its last line, stderr) of a script, whose command is put into `shell`."""
    command = shell.format(f"'{sys.executable}' -c '{SCRIPT.format(body=body)}'") + "; echo ${PIPESTATUS[@]}"
    environment = os.environ | environment
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    return done.stdout, done.stderr


@pytest.mark.parametrize("count", [3, 100_000], ids=["within the buffer", "more than the pipe holds"])
@pytest.mark.parametrize("pipe", ["{} | true", "{} 2>&1 | true"])
def test_a_reader_that_is_gone_is_no_error(count, pipe):
    body = f"import time; {LINES.format(count=1)}; time.sleep(0.3); {LINES.format(count=count)}"
    assert run(body, pipe) == ("141 0\n", "")


def test_the_first_lines_reach_head():
    out, err = run(LINES.format(count=100_000), "{} | head -2")
    assert (out, err) == ("0\n1\n141 0\n", "")


def test_a_mistake_is_told_though_the_reader_is_gone():
    out, err = run("raise UserError(chr(120))", "{} | true")
    assert (out, err) == ("2 0\n", "a.py: x\n")


def test_another_broken_pipe_is_a_bug():
    out, err = run("import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')".replace("'", '"'))
    assert out == "1\n"
    assert "Traceback" in err
    assert "BrokenPipeError" in err


COMMANDS = {  # a command that each script takes
    "average_lora.py": ["a", "b", "--out", "c"],
    "train_lora.py": [], "infer.py": [], "cache_latents.py": ["a", "--out", "b"], "convert_lora.py": ["a", "b"],
    "evaluate.py": [], "extract_lora.py": ["a", "b", "--base", "c", "--rank", "1"], "inspect_lora.py": ["a"],
    "make_shards.py": ["a", "--out", "b"], "merge_lora.py": ["a", "b", "--lora", "c"], "show_data.py": [],
}  # fmt: skip


@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_while_a_script_imports_pytorch_leaves_no_traceback(tmp_path, script):
    """A module in its place sends the signal while it is imported."""
    for module in ("torch", "numpy"):
        (tmp_path / f"{module}.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    path = script if (ROOT / script).exists() else f"scripts/{script}"
    done = subprocess.run(
        [sys.executable, path, *COMMANDS[script]], cwd=ROOT, capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(("rank", "message"), [("", "a.py: interrupted\n"), ("0", "a.py: interrupted\n"), ("1", "")])
def test_one_process_says_that_it_was_interrupted(rank, message):
    _, err = run("raise KeyboardInterrupt", **({"RANK": rank} if rank else {}))
    assert err == message


BAR = "from common.progress import tqdm\nfor _ in tqdm(range(3), disable={}): pass\ntqdm.write('x')"


@pytest.mark.parametrize("disabled", [False, True])
def test_bars_are_for_terminals(disabled):
    command = [sys.executable, "-c", BAR.format(disabled)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("x\n", "")
    terminal, end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=end, timeout=60)
    os.close(end)
    os.set_blocking(terminal, False)
    shown = b""
    with suppress(OSError):  # nothing, or the end
        while part := os.read(terminal, 10_000):
            shown += part
    assert (b"3/3" in shown) != disabled
