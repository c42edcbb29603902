"""The house itself: two layers, no forbidden dependency, nothing that unpickles or runs foreign code."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = {"train_lora", "infer"}
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = [*MODULES.values(), *sorted((ROOT / "scripts").glob("*.py"))]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


ROOMS = {  # leaves in several files: what each stands on
    "shards": {"images"},
    "packing": {"shards", "images", "signals"},
    "remote": {"shards"},
    "sources": {"packing", "remote", "shards", "images"},
    "data": {"sources", "remote", "shards", "images", "buckets", "captions", "signals"},
    "stop": {"signals"},
    "resume": {"checkpoint", "formats", "memory"},
}


def test_leaves_import_no_sibling_but_errors():
    leaves = MODULES.keys() - SCRIPTS
    assert {"lora", "data", "memory", "sdxl", "diffusion", "formats", "checkpoint"} <= leaves
    siblings = {leaf: imports(MODULES[leaf]) & MODULES.keys() - {"errors"} for leaf in leaves}
    assert siblings == {leaf: ROOMS.get(leaf, set()) for leaf in leaves}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_script_is_imported_and_no_peft_or_accelerate(path):
    assert not imports(path) & {*SCRIPTS, "peft", "accelerate"}


def test_memory_comes_before_diffusers():
    """memory.py readies xFormers, which diffusers imports: the scripts' sorted imports put it first."""
    for path in SOURCES:
        lines = path.read_text().splitlines()
        first = {name: next((i for i, line in enumerate(lines) if line.startswith((f"import {name}", f"from {name}"))), None)
                 for name in ("memory", "sdxl")}  # fmt: skip
        assert first["sdxl"] is None or first["memory"] < first["sdxl"], path.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_foreign_is_run(path):
    text = path.read_text()
    assert "trust_remote_code" not in text
    assert text.count("torch.load(") == text.count("weights_only=True")
