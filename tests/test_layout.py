"""The house itself: floors, no forbidden dependency, nothing that unpickles or runs foreign code, and files found from afar."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from common.files import suite_sources
from dataset.sources import DEMO
from model.load import BASE, MODELS
from model.render import DEMO_PROMPTS

# Each floor may use all below it; packages of one floor each other, but not in a circle.
FLOORS = [
    {"common"},
    {"dataset", "model", "performance", "lora_files"},
    {"lora", "data"},
    {"memory"},
    {"run"},
    {"train_lora", "infer", "scripts"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR)


def room(path: Path) -> str:
    """The module or package at the root that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, also inside of functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def top_level_names(path: Path) -> set[str]:
    """What a file defines, imports apart."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {e.id for target in targets for e in ast.walk(target) if isinstance(e, ast.Name)}
    return names


def test_the_root_has_five_doors():
    assert {path.name for path in ROOT.glob("*.py")} == {"train_lora.py", "infer.py", "lora.py", "data.py", "memory.py"}
    assert len(SOURCES) > 50


def test_every_import_goes_down():
    beside = defaultdict(set)
    for path in SOURCES:
        for name in imports(path):
            here, there = room(path), name.split(".")[0]
            if there in FLOOR and there != here:
                assert FLOOR[there] <= FLOOR[here], f"{path.relative_to(ROOT)} imports {name} from a floor above"
                if FLOOR[there] == FLOOR[here]:
                    beside[here].add(there)
    list(TopologicalSorter(beside).static_order())  # raises CycleError


def test_modules_of_a_package_import_each_other_in_no_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    list(TopologicalSorter({name: imports(path) & modules.keys() for name, path in modules.items()}).static_order())


def test_a_name_means_one_thing():
    """No top-level name is defined in two files, but `main` of the scripts, their way to the suite, and type variables."""
    defined = defaultdict(list)
    for path in SOURCES:
        for name in top_level_names(path) - {"main", "ROOT", "T"}:
            defined[name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_is_imported_and_no_peft_or_accelerate(path):
    helpers = {"scripts.demo_model.demo_world", "demo_world"} if path.parent.name == "demo_model" else set()
    first = {name.split(".")[0] for name in imports(path) - helpers}
    assert not first & {"train_lora", "infer", "scripts", "peft", "accelerate"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_foreign_is_run(path):
    text = path.read_text()
    assert "trust_remote_code" not in text
    assert text.count("torch.load(") == text.count("weights_only=True")


def test_what_is_found_from_a_modules_own_place_is_there():
    """These break in silence when a file moves: what a state is made with, and what the suite brings along."""
    assert suite_sources() == [path for path in SOURCES if room(path) != "scripts"]
    assert DEMO_PROMPTS.read_text().count("\n") > 2
    assert list(DEMO.glob("*.tar"))
    assert (BASE / "unet/config.json").is_file()
    assert (Path(MODELS["demo"]) / "model_index.json").is_file()
