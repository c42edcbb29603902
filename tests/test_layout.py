"""The layout of the code: which package may import which, no forbidden dependency, nothing that unpickles or runs foreign code,
and files that modules find by their own path.
"""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from common.files import suite_sources
from dataset.sources import DEMO
from model.load import BASE, MODELS
from model.prompts import DEMO_PROMPTS

# A package may import those of earlier rows, and those of its own row, but not in a circle.
FLOORS = [
    {"common"},
    {"options"},
    {"dataset", "model", "performance", "lora_files"},
    {"lora", "data"},
    {"memory"},
    {"evaluation"},
    {"run"},
    {"train_lora", "infer", "scripts"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in FLOOR)


def package_of(path: Path) -> str:
    """The module or package at the root that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, inside_functions: bool = True) -> set[str]:
    """Dotted names of the modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def top_level_names(path: Path) -> set[str]:
    """The names that a file defines at its top level, without imports."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {e.id for target in targets for e in ast.walk(target) if isinstance(e, ast.Name)}
    return names


def test_the_root_has_five_modules():
    assert {path.name for path in ROOT.glob("*.py")} == {"train_lora.py", "infer.py", "lora.py", "data.py", "memory.py"}
    assert len(SOURCES) > 50


def test_no_import_from_a_floor_above():
    same_floor = defaultdict(set)
    for path in SOURCES:
        for name in imports(path):
            importer, imported = package_of(path), name.split(".")[0]
            if imported in FLOOR and imported != importer:
                assert FLOOR[imported] <= FLOOR[importer], f"{path.relative_to(ROOT)} imports {name} from a floor above"
                if FLOOR[imported] == FLOOR[importer]:
                    same_floor[importer].add(imported)
    list(TopologicalSorter(same_floor).static_order())  # raises CycleError


def test_functions_fit_on_a_screen():
    """At most 60 lines, but for the training script's `main`, which shows a whole run. The two scripts nest no functions."""
    limits = {("train_lora.py", "main"): 110}
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
            assert function.end_lineno - function.lineno < limits.get((name, function.name), 60), f"{name} {function.name}"
            nested = [node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function]
            assert not nested or name not in ("train_lora.py", "infer.py"), f"{name} {function.name}: {nested}"
    assert (ROOT / "train_lora.py").read_text().count("\n") <= 250


def test_modules_import_each_other_in_no_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    list(TopologicalSorter({name: imports(path) & modules.keys() for name, path in modules.items()}).static_order())


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_finds_the_suite_before_it_imports_it(path):
    """Here the root is on Python's path already; a user's `python scripts/x.py` finds only what is in scripts/."""
    found = False
    for node in ast.parse(path.read_text()).body:
        found |= isinstance(node, ast.Expr) and "sys.path" in ast.unparse(node)
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        packages = {name.split(".")[0] for name in names if name} & FLOOR.keys()
        assert found or not packages, f"{packages} imported before sys.path leads to the suite"


def test_only_model_imports_the_libraries_that_it_has_to_quiet():
    """At import they print warnings of parts that SDXL does not use; model/__init__.py prevents that."""
    for path in (path for path in SOURCES if package_of(path) != "model"):
        packages = {name.split(".")[0] for name in imports(path, inside_functions=False)}
        assert not packages & {"diffusers", "transformers", "xformers", "bitsandbytes"}, path.relative_to(ROOT)


def test_no_top_level_name_is_defined_in_two_files():
    """Except `main` and ROOT of the scripts, and type variables."""
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
def test_no_foreign_code_is_run(path):
    text = path.read_text()
    assert "trust_remote_code" not in text
    assert text.count("torch.load(") == text.count("weights_only=True")


def test_files_that_modules_find_by_their_own_path():
    """Moving a module would break these without an error: the sources that a saved state records, and bundled files."""
    assert suite_sources() == [path for path in SOURCES if package_of(path) != "scripts"]
    assert DEMO_PROMPTS.read_text().count("\n") > 2
    assert list(DEMO.glob("*.tar"))
    assert (BASE / "unet/config.json").is_file()
    assert (Path(MODELS["demo"]) / "model_index.json").is_file()
