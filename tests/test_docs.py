"""README.md, CONTRIBUTING.md and docs/: every command parses, every link leads to a file, the tree lists the files."""

import contextlib
import functools
import io
import re
import shlex
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT, run_main

import options.command
from model.prompts import LINE_OPTIONS

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_COMMANDS = {"cp", "for", "hf", "pip", "pre-commit", "source", "tensorboard"}
FOREIGN_FLAGS = {  # flags in the text that belong to other programs
    "wsl": {"--install"},
    "torchrun": {"--max-restarts", "--nproc-per-node", "--node-rank", "--signals-to-handle", "--shutdown-timeout"},
    "kohya": {"--fp8_base"},
    "a line of --prompts": {f"--{option}" for option in LINE_OPTIONS},
    "tensorboard": {"--samples_per_plugin"},
    "sbatch": {"--nodes"},
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def fences(page: Path, language: str) -> list[str]:
    return [content for kind, content in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def inline_code(page: Path) -> list[str]:
    """The texts between backticks, each joined into one line."""
    return [" ".join(code.split()) for code in INLINE.findall(prose(page))]


# Commands.


@functools.cache
def parser(script: str) -> Callable[[list[str]], object]:
    """A function from arguments to the script's options. Records which options it reads; its main never runs."""
    configs = []

    def record(config, *_):
        configs.append(config)
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options.command, "parse_arguments", record)
        for stream in ("stdout", "stderr"):  # train_lora.py replaces them
            patch.setattr(sys, stream, getattr(sys, stream))
        run_main(script)
    return functools.partial(options.command.parse_arguments, configs[0])


def check_script(script: str, arguments: list[str]) -> str | None:
    """None if the script takes these arguments; else what is wrong."""
    if not (ROOT / script).is_file():
        return f"{script} does not exist"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            parser(script)(arguments)
    except SystemExit as error:
        return printed.getvalue() if error.code else None
    except Exception as error:  # a UserError of the options
        return str(error)
    return None


def check_torchrun(words: list[str]) -> str | None:
    from torch.distributed.run import parse_args

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options = parse_args(words)
    except SystemExit:
        return "torchrun refuses its options"
    return check_script(options.training_script, options.training_script_args)


def check_command(words: list[str]) -> str | None:
    """None if a command can be run as it is written; else what is wrong."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    match words:
        case ["python", script, *arguments]:
            return check_script(script, arguments)
        case ["torchrun", *arguments]:
            return check_torchrun(arguments)
        case ["sbatch", "scripts/train.slurm", *arguments]:
            return check_script("train_lora.py", arguments)
        case ["bash", script, *arguments]:
            if not (ROOT / script).is_file():
                return f"{script} does not exist"
            return f"{script} has no flags" if any(word.startswith("--") for word in arguments) else None
        case [program, *_]:
            return None if program in OTHER_COMMANDS else f"{program} is neither of this suite nor in OTHER_COMMANDS"
    return None


def commands(text: str) -> list[list[str]]:
    """The commands of a shell text, one for each line; comments are left out."""
    return [words for line in text.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_run(page):
    wrong = {}
    for words in chain.from_iterable(map(commands, fences(page, "bash"))):
        if problem := check_command(words):
            wrong[" ".join(words)] = problem
    starts = ("python scripts/", "python train_lora.py ", "python infer.py ", "torchrun train_lora.py ", "bash scripts/")
    for code in inline_code(page):
        if code.startswith(starts) and (problem := check_command(shlex.split(code))):
            wrong[code] = problem
    assert not wrong, "\n".join(f"{command}\n    {problem}" for command, problem in wrong.items())


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python train_lora.py --rank 8", None),
        ("python train_lora.py --rnak 8", "--rnak"),
        ("python train_lora.py --rank none", "none"),
        ("python train_lora.py --rank 0", "--rank"),
        ("python scripts/nothing.py", "does not exist"),
        ("torchrun --nproc-per-node 2 train_lora.py --bs 3", None),
        ("torchrun --nproc-per-nod 2 --no-such train_lora.py", "torchrun"),
        ("bash scripts/test.sh -k resume", None),
        ("bash scripts/demo.sh --rank 8", "no flags"),
        ("bash scripts/nothing.sh", "does not exist"),
        ("curl example.org", "OTHER_COMMANDS"),
    ],
)
def test_wrong_commands_are_found(command, problem):
    found = check_command(shlex.split(command))
    assert (found is None) if problem is None else (problem in found), found


def flags(script: str) -> set[str]:
    """Every flag in the script's --help."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        parser(script)(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


def test_every_flag_in_the_text_is_a_flag_of_a_script():
    scripts = [str(file.relative_to(ROOT)) for folder in ("scripts", "scripts/dev") for file in (ROOT / folder).glob("*.py")]
    known = set().union(*FOREIGN_FLAGS.values(), *map(flags, ["train_lora.py", "infer.py", *scripts]))
    used = {flag for page in PAGES for code in inline_code(page) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert {"--vram-gb", "--data-cache-gb", "--verify", "--parts"} <= used & known
    assert not used - known


# Links, size, tree.


def anchors(page: Path) -> set[str]:
    """The fragments that lead to a heading of the page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(prose(page)):
        target, _, fragment = link.partition("#")
        if "://" in target:
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not fragment or fragment in anchors(file), link


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 9_000


def tree() -> dict[str, set[str]]:
    """The tree in the README: {folder: files}. An indented line lists more files of the folder above it."""
    (block,) = (text for text in fences(ROOT / "README.md", "") if "train_lora.py " in text)
    found: dict[str, set[str]] = {"": set()}
    for line in block.splitlines():
        first, folder = line.split()[0], list(found)[-1]
        if line.startswith(" "):
            found[folder] |= set(line.split())
        elif first.endswith("/"):
            found[first] = set()
        else:
            found[""] |= {word for word in line.split() if re.fullmatch(r"[\w-]+\.[a-z]+|LICENSE", word)}
    return found


def test_the_tree_in_the_readme_lists_the_files():
    listed = tree()
    for folder, files in listed.items():
        assert (ROOT / folder).is_dir(), folder
        assert not [file for file in files if not (ROOT / folder / file).exists()], folder
    kinds = {".py", ".sh", ".slurm"}
    packages = [f"{init.parent.relative_to(ROOT)}/" for init in ROOT.glob("*/__init__.py")]
    for folder in ["", *packages, "scripts/", "scripts/dev/", "scripts/demo_model/"]:
        present = {path.name for path in (ROOT / folder).iterdir() if path.suffix in kinds} - {"__init__.py"}
        assert present <= listed[folder], folder or "the root"
