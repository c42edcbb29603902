"""Prompts: lines with kohya's options, TOML, the header of a LoRA, and what A1111 reads in a picture."""

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.options import MAX_SEED
from model.prompts import (
    LINE_OPTIONS,
    Prompt,
    from_header,
    generation_parameters,
    parse_line,
    parse_size,
    read_prompts,
    to_header,
)

WORDS = st.lists(st.text("abcé日,.#'\"\\:-", min_size=1, max_size=8).filter(lambda w: not w.startswith("--")), min_size=1)
TEXTS = WORDS.map(" ".join).filter(lambda text: not text.startswith("#"))
SIZES = st.integers(8, 512).map(lambda n: 8 * n)
PROMPTS = st.builds(
    Prompt, TEXTS, st.none() | TEXTS, st.none() | st.integers(0, MAX_SEED), st.none() | SIZES, st.none() | SIZES,
    st.none() | st.integers(1, 1000), st.none() | st.floats(0, 30), st.none() | st.floats(0, 1),
    st.none() | st.floats(-2, 2),
)  # fmt: skip


def line_of(prompt: Prompt) -> str:
    own = prompt.given()
    return " ".join([prompt.text, *(f"--{name} {own[field]}" for name, field in LINE_OPTIONS.items() if field in own)])


@given(PROMPTS)
def test_a_line_says_all_of_a_prompt(prompt):
    assert parse_line("line 1", line_of(prompt)) == prompt


@settings(deadline=None)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=4))
def test_a_file_of_lines_of_toml_and_a_header_say_the_same(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("prompts")
    lines, tables = folder / "p.txt", folder / "p.toml"
    lines.write_text("# a comment\n\n" + "\n".join(map(line_of, prompts)))
    table = "[[prompt]]\n{}\n"
    values = ["\n".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in p.given().items()) for p in prompts]
    tables.write_text("".join(map(table.format, values)))
    assert read_prompts((str(lines),), "sdxl") == prompts
    assert read_prompts((str(tables),), "sdxl") == prompts
    assert from_header(folder, to_header(prompts)) == prompts
    assert from_header(folder, {}) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --w 831", "width must be a multiple of 8 from 64 up to 4096, not 831"),
        ("a --h 8000", "height must be a multiple of 8 from 64 up to 4096, not 8000"),
        ("a --w 8x", "width is a whole number, not '8x'"),
        ("a --d -1", "seed must lie in 0…9223372036854775807, not -1"),
        (f"a --d {10**400}", "seed must lie in 0…9223372036854775807, not 1000"),
        ("a --s 0", "steps must lie in 1…1000, not 0"),
        ("a --l nan", "guidance must be at least 0, not nan"),
        ("a --l 7,5", "guidance is a number, not '7,5'"),
        ("a --rescale 1.1", "guidance_rescale must lie in 0…1, not 1.1"),
        ("a --am inf", "strength must lie in -100…100, not inf"),
        ("a --w", "width is a whole number, not ''"),
        ("a --w 64 --w 64", "--w is given twice"),
        ("a --ss euler", "--ss is no option of a prompt: --n, --w, --h, --d, --s, --l, --rescale, --am are"),
        ("a --n (red:1.2)", "(red:1.2) is not read"),
        ("a" * 10001, "more than 10000 characters"),
    ],
)
def test_a_mistake_names_its_line(tmp_path, line, message):
    (tmp_path / "p.txt").write_text(f"# a\nhouse\n{line}\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_prompts((str(tmp_path / "p.txt"),), "sdxl")
    assert str(error.value).startswith(f"--prompts {tmp_path}/p.txt line 3")
    with pytest.raises(UserError, match=f"^--prompts text 2.*{re.escape(message)}"):
        read_prompts(("a", line), "sdxl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[prompt]]\ntext = "a"\n[[prompt]]\nseeed = 1\ntext = "a"', " prompt 2: seeed is not known: text, negative, seed,"),
        ('[[prompt]]\ntext = "a"\nseed = true', " prompt 1: seed is a whole number, not 'True'"),
        ('[[prompt]]\ntext = "a"\nseed = "1"', " prompt 1: seed is a whole number, not '1'"),
        ('[[prompt]]\ntext = "a\\u0007"', " prompt 1 holds control characters"),
        ("[[prompt]]\nseed = 1", " prompt 1 has no text"),
        ('prompt = "a"', ": the prompts are no list of tables"),
        ("", ": the prompts are no list of tables"),
        ("x = 1", ": x is not known: only tables [[prompt]] are"),
        ("[[prompt", ": Expected"),
    ],
)
def test_a_mistake_in_toml_names_its_table(tmp_path, text, message):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UserError) as error:
        read_prompts((str(tmp_path / "p.toml"),), "sdxl")
    assert str(error.value).startswith(f"--prompts {tmp_path}/p.toml{message}")


@pytest.mark.parametrize("value", ["", "{", "{}", "[]", "[1]", '[{"text": 1}]', '[{"text": "a", "s": 1}]', '[{"out": "/"}]',
                                   '[{"text": "\\ud800"}]', '[{"text": "\\u001b"}]', "[" * 100_000])  # fmt: skip
def test_a_header_of_unknown_origin_ends_in_one_line(tmp_path, value):
    with pytest.raises(UserError, match=r"^.*x\.safetensors: in its header \(other --prompts help\)"):
        from_header(tmp_path / "x.safetensors", {"sdxl_lora.prompts": value})


def test_sizes():
    assert parse_size("832x1216") == {"width": 832, "height": 1216}
    assert parse_size("96") == parse_size("96X96") == {"width": 96, "height": 96}
    assert parse_size(None) == {}
    for wrong in ("831x64", "x", "axb", "64x", "0x0", "64x64x64", "-64x64", "1e9x64"):
        with pytest.raises(UserError, match=f"^--size {wrong}: (width|height) "):
            parse_size(wrong)


def infotext(text: str) -> dict[str, str]:
    """A1111's parse_generation_parameters, in short: the last line is `name: value, …`, where a value may be quoted JSON."""
    *lines, last = text.split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    negative = [line.removeprefix("Negative prompt: ") for line in lines if line.startswith("Negative prompt: ")]
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in found}
    return {**values, "prompt": lines[0], "negative": "".join(negative)}


@given(PROMPTS, st.text("abé日,.:-", min_size=1))
def test_a1111_reads_what_a_picture_was_drawn_from(prompt, model):
    defaults = Prompt("", seed=0, width=64, height=96, steps=20, guidance=5.0, strength=1.0)
    prompt = prompt.filled(3, defaults)
    read = infotext(generation_parameters(prompt, object(), f"/private/{model}/", {"x, y": (0.8, "0123"), "z": (1, "")}))
    assert read["prompt"] == f"{prompt.text} <lora:x, y:0.8> <lora:z:1>"
    assert read["negative"] == (prompt.negative or "")
    assert (read["Steps"], read["Seed"]) == (str(prompt.steps), str(prompt.seed))
    assert math.isclose(float(read["CFG scale"]), prompt.guidance, rel_tol=1e-5)
    assert float(read.get("CFG Rescale", 0)) == pytest.approx(prompt.guidance_rescale or 0, rel=1e-5)
    assert read["Size"] == f"{prompt.width}x{prompt.height}"
    assert (read["Model"], read["Lora hashes"]) == (model, "x, y: 0123")
