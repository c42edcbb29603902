"""Windows and macOS: Linux without what they lack (tests/stripped.py)."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, photograph
from stripped import LOCALE
from test_layout import SOURCES

import memory
from common.errors import UserError
from options.training import MemoryConfig
from performance.optimizers import skipping

SCRIPTS = ["train_lora.py", "infer.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]


@pytest.fixture
def pictures(tmp_path):
    """Six pictures whose captions cp1252 cannot hold, in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        photograph(i, 140, 130 + 10 * i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a нindża ᾱ of {i}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_every_script_runs_without_what_linux_alone_has(system, pictures, tmp_path):
    out, shards, lora = tmp_path / "out", tmp_path / "shards", tmp_path / "out/pytorch_lora_weights_2.safetensors"
    config = tmp_path / "run.toml"
    config.write_text('author = "Ἀπελλῆς"\nprompts = ["a нindża ᾱ"]\n', encoding="utf-8")
    train = ["train_lora.py", "--config", config, "--data", pictures, "--bs", 1, "--steps", 2, "--out", out]
    train += ["--log-dir", tmp_path / "runs", "--data-cache", tmp_path / "cache"]
    commands = [
        train,
        [*train, "--steps", 3],
        ["infer.py", "--lora", lora, "--prompts", "a нindża", "--steps", 1, "--out", tmp_path / "images", "--compare"],
        ["infer.py", "--lora", lora, "--steps", 1, "--out", tmp_path / "images", "--save-merged", tmp_path / "merged"],
        ["scripts/make_shards.py", pictures, "--out", shards],
        ["scripts/make_shards.py", pictures, "--out", shards],
        ["scripts/show_data.py", shards, "--out", tmp_path / "data.png"],
        ["scripts/cache_latents.py", shards, "--out", tmp_path / "latents", "--model", "demo"],
        ["scripts/inspect_lora.py", lora, "--model", "demo"],
        ["scripts/convert_lora.py", lora, tmp_path / "converted.safetensors", "--model", "demo"],
        ["scripts/merge_lora.py", "assets/demo/model", tmp_path / "merged-too", "--lora", lora],
        ["scripts/share.py", out, "--out", tmp_path / "shared"],
        *([name, "--help"] for name in SCRIPTS),
    ]
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
    run = subprocess.run(
        [sys.executable, ROOT / "tests/stripped.py", system, tmp_path / "commands.json"],
        cwd=ROOT, env=os.environ | LOCALE, capture_output=True, encoding="cp1252", timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-5000:]
    assert lora.exists()
    assert (out / "pytorch_lora_weights_3.safetensors").exists()
    assert "?" in run.stdout  # of make_shards or infer.py: what cp1252 cannot print


UNGUARDED = {
    "windows": [
        "import fcntl", "import resource", "signal.SIGUSR1", "signal.SIGHUP", "signal.pthread_sigmask", "signal.sigwaitinfo",
        "os.sched_getaffinity(0)", "os.EX_OK", "os.sysconf('SC_PAGE_SIZE')", "os.fork()", "os.O_DIRECTORY", "os.killpg",
        "os.open('.', os.O_RDONLY)", "select.poll()", "ctypes.CDLL(None).prctl", "Path('x').write_text('ε')", "print('ε')",
        "multiprocessing.get_context('fork').Process().start()", "open('12:00', 'w')",
        "open('old', 'w').close(); open('new', 'w').close(); os.rename('old', 'new')",
        "file = open('held', 'w'); os.remove('held')", "file = open('held', 'w'); os.replace('held', 'other')",
    ],
    "macos": ["os.sched_getaffinity(0)", "signal.sigwaitinfo", "ctypes.CDLL(None).prctl", "print('ε')"],
}  # fmt: skip


@pytest.mark.parametrize("system", UNGUARDED)
def test_every_unguarded_use_is_found(system, tmp_path):
    uses = "\n".join(f"    {use!r}," for use in UNGUARDED[system])
    (tmp_path / "uses.py").write_text(
        f"import ctypes, multiprocessing, os, select, signal, stripped\nfrom pathlib import Path\nstripped.strip({system!r})\n"
        f"for use in [\n{uses}\n]:\n    try:\n        exec(use)\n    except Exception:\n        continue\n"
        "    raise SystemExit(use)\n",
        encoding="utf-8",
    )
    env = os.environ | LOCALE | {"PYTHONPATH": str(ROOT / "tests")}
    run = subprocess.run([sys.executable, "uses.py"], cwd=tmp_path, env=env, capture_output=True)
    assert run.returncode == 0, run.stderr


def test_a_folder_is_locked_on_windows(tmp_path):
    lock = "import stripped; stripped.strip('windows'); from pathlib import Path; from common.files import lock_folder\n"
    lock += "file = lock_folder('--out', Path('.')); print('held', flush=True); input()"
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}, "text": True}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", lock], **options, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        other = subprocess.run([sys.executable, "-c", lock], **options, input="\n", capture_output=True)
        assert "another run is writing there" in other.stderr
        holder.communicate("\n")
    assert subprocess.run([sys.executable, "-c", lock], **options, input="\n", capture_output=True).stdout == "held\n"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_name_their_encoding_and_renames_replace(path):
    """Windows reads and writes text in a code page, and does not rename onto a file that exists."""
    if {"dev", "demo_model"} & set(path.relative_to(ROOT).parts):
        return  # these run on Linux only
    for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
        name, text = getattr(call.func, "attr", getattr(call.func, "id", "")), ast.unparse(call)
        assert name != "rename", f"{text}: replace() instead"
        if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
            assert "utf-8" in text, text
        if name == "open" and isinstance(call.func, ast.Name):
            assert "utf-8" in text or "b'" in text, text


# A card that cannot be used.

TOO_OLD = """The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading and
installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"""


def no_cuda(monkeypatch, reason: str | None, build: str | None = "13.0", card: bool = True) -> None:
    """A PyTorch for CUDA `build` that cannot use the card, for `reason`."""

    def init() -> None:
        if reason:
            raise RuntimeError(reason)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(memory.shutil, "which", lambda name: f"/usr/bin/{name}" if card and name == "nvidia-smi" else None)
    monkeypatch.setattr(memory, "Path", lambda path: ROOT / "no such file")


@pytest.mark.parametrize(
    ("reason", "build", "said"),
    [
        (TOO_OLD, "13.0", ["driver on your system is too old (found version 11040): update NVIDIA's driver", "pytorch.org"]),
        ("No CUDA GPUs are available", "13.0", ["No CUDA GPUs are available"]),
        (None, "13.0", ["nvidia-smi"]),
        (None, None, ["a build without CUDA", "pytorch.org"]),
    ],
)
def test_auto_says_that_a_card_is_not_used(monkeypatch, capsys, reason, build, said):
    no_cuda(monkeypatch, reason, build)
    assert memory.resolve_device("auto").type == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ")
    assert all(part in line for part in [*said, "--device cpu"]), line


def test_the_cpu_is_used_silently_if_there_is_no_card_or_it_is_meant(monkeypatch, capsys):
    no_cuda(monkeypatch, TOO_OLD)
    memory.resolve_device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    memory.resolve_device("auto")
    no_cuda(monkeypatch, TOO_OLD, card=False)
    memory.resolve_device("auto")
    assert capsys.readouterr().err == ""


# MPS. It was never run: what can be seen without it.


def test_on_mps_there_are_fp32_and_adamw():
    config = MemoryConfig().resolved(torch.device("mps"))
    assert (config.precision, config.optimizer) == ("fp32", "adamw")
    assert MemoryConfig().resolved(torch.device("cpu")).optimizer == "adamw8bit"


def test_mps_is_refused_where_it_is_not():
    with pytest.raises(UserError, match="--device mps cannot be used here"):
        memory.resolve_device("mps")


def test_the_optimiser_for_mps_skips_what_its_kernel_would_not(monkeypatch):
    """As on MPS, the kernel gets `found_inf` but does not read it."""
    kernel = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *arguments, found_inf, **options: kernel(*arguments, **options))
    runs = []
    for kind, flags in ((skipping(torch.optim.AdamW), [0.0, 1.0, 0.0]), (torch.optim.AdamW, [0.0, 0.0])):
        p = torch.nn.Parameter(torch.ones(4))
        optimizer = kind([p], weight_decay=0.01, fused=True)
        for flag in flags:
            p.grad = torch.full((4,), float("nan") if flag else 0.5)
            optimizer.found_inf = torch.tensor(flag)
            optimizer.step()
        runs.append((p.detach(), *optimizer.state[p].values()))
    assert all(map(torch.equal, *runs))


def test_nothing_of_the_step_is_in_float64():
    """MPS has none. extract_lora.py, which needs it, refuses MPS; deltas of files and tables of the schedule are on the CPU."""
    on_the_cpu = {f"lora_files/{name}.py" for name in ("deltas", "base_weights", "decompose")}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        if name not in on_the_cpu | {"scripts/extract_lora.py", "model/diffusion.py"}:
            assert not re.search(r"float64|\.double\(", path.read_text("utf-8")), name
