"""docs/colab.ipynb: its cells as they stand, with the bundled model, a few steps and stand-ins for Colab."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT, encoded, photograph

NOTEBOOK = json.loads((ROOT / "docs/colab.ipynb").read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
SHORT = {"MODEL": "demo", "STEPS": 2, "OPTIONS": "--bs 1 --rank 2 --workers 0 --prompts 'a cat'"}
SUITE = [
    "common",
    "options",
    "dataset",
    "model",
    "performance",
    "lora_files",
    "evaluation",
    "run",
    "scripts",
    "assets",
    "presets",
]


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 4)
    for cell in NOTEBOOK["cells"]:
        assert cell.keys() - {"outputs", "execution_count"} == {"cell_type", "metadata", "source"}
        assert all(line.endswith("\n") for line in cell["source"][:-1])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
    assert [cell["metadata"] for cell in CELLS] == [{"tags": ["parameters"]}] + [{}] * (len(CELLS) - 1)


class Runner:
    """Runs cells as IPython does: a line that begins with ! goes to the shell, with {names} filled in."""

    def __init__(self, **parameters):
        self.parameters, self.names = parameters, {"shell": self.shell}

    def shell(self, line: str) -> None:
        command = ["bash", "-c", line.format_map(self.names)]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=200)
        assert run.returncode == 0, f"{line}\n{run.stdout}"

    def run(self, cell: dict) -> None:
        source = "".join(cell["source"]).replace("\\\n", " ")
        code = re.sub(r"^( *)!(.*)$", lambda m: f"{m[1]}shell({m[2]!r})", source, flags=re.MULTILINE)
        exec(code, self.names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert self.parameters.keys() <= self.names.keys()
            self.names |= self.parameters


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """Stand-ins for google.colab and IPython, in an empty folder. Returns (uploads to come, what was shown or downloaded)."""
    uploads, shown = [], []

    def upload() -> dict[str, bytes]:
        paths = uploads.pop(0)
        return {shutil.copy(path, path.name): path.read_bytes() for path in paths}

    files, display, colab = ModuleType("files"), ModuleType("IPython.display"), ModuleType("google.colab")
    files.upload, files.download, colab.files = upload, lambda name: shown.append(os.path.abspath(name)), files
    display.Image, display.display = lambda name, width=None: os.path.abspath(name), shown.append
    modules = {
        "google": ModuleType("google"),
        "google.colab": colab,
        "IPython": ModuleType("IPython"),
        "IPython.display": display,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    monkeypatch.setenv("PIP_DRY_RUN", "1")  # the tests' own packages stay as they are
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    return uploads, shown


def suite_in(folder) -> None:
    """A copy of what the suite needs to run."""
    for name in SUITE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "heldout"))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)


def test_the_cells_lead_from_an_upload_to_a_lora_and_a_sheet(colab, tmp_path):
    uploads, shown = colab
    suite_in(tmp_path / "zip/suite-main")  # one folder in the zip, as GitHub makes it
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        (pictures / f"{i}.png").write_bytes(encoded(photograph(i, 140, 130)))
        (pictures / f"{i}.txt").write_text(f"picture {i}", "utf-8")
    loose = [pictures / "2.png", pictures / "2.txt"]
    archive = shutil.make_archive(str(tmp_path / "first"), "zip", pictures)
    uploads += [
        [tmp_path / shutil.make_archive(str(tmp_path / "suite"), "zip", tmp_path / "zip")],
        [tmp_path / archive, *loose],
    ]
    runner = Runner(**SHORT)
    for cell in CELLS:
        runner.run(cell)
    suite = tmp_path / "content/suite/suite-main"
    assert sorted(path.name for path in (suite / "my-pictures").iterdir()) == [
        "0.png",
        "0.txt",
        "1.png",
        "1.txt",
        "2.png",
        "2.txt",
    ]
    names = ["data.png", "checkpoints/samples/step-000000.png", "checkpoints/samples/step-000002.png", "images/compare.png"]
    assert shown == [str(suite / name) for name in [*names, "checkpoints/my-style-000002.safetensors"]]
    assert all(map(os.path.exists, shown))


def test_the_suite_is_cloned_once(colab, tmp_path):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "train_lora.py").touch()
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    runner = Runner(REPOSITORY=f"file://{repository}")
    parameters, _, suite, *_ = CELLS
    for cell in (parameters, suite, suite):
        runner.run(cell)
    assert os.getcwd() == str(tmp_path / "content/suite")
