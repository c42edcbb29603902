"""options/command.py: mistakes in a command or a run file are one line, and the file that a run writes gives it again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.options import flat_options
from options.command import all_fields, options_as_toml, parse_arguments
from options.foreign import DIFFERENT, NO_EFFECT, SAME
from options.training import TrainCommand, TrainConfig

NAMES = {spec.name: spec for spec in all_fields(TrainConfig)}


def parse(*arguments: str) -> TrainConfig:
    return parse_arguments(TrainCommand, list(arguments)).run


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--rnak 8", "--rnak: there is no such option: do you mean --rank[?]"),
        ("--qqqq", "--qqqq: there is no such option: see --help"),
        ("--no-rank", "--no-rank: there is no such option: do you mean .*"),
        ("--learning_rate 1e-4", "--learning_rate: here it is --lr"),
        ("--train-batch-size=4", "--train-batch-size: here it is --bs"),
        ("--noise_offset 0.03", "--noise_offset: the noise is plain Gaussian"),
        ("--lr 1,5e-4", "--lr 1,5e-4: write 1.5e-4"),
        ("--lr=1,5", "--lr 1,5: write 1.5"),
        ("--flip true", "--flip takes no value: --flip or --no-flip"),
        ("--no-masked-loss=False", "--masked-loss takes no value: --masked-loss or --no-masked-loss"),
        ("--rank abc", "--rank: invalid literal for int.*'abc'"),
        ("--rank", "Missing value for argument '--rank'.*"),
        ("--precision fp8", "invalid choice 'fp8' for argument '--precision'.*'bf16'.*"),
        ("photos/", "Unrecognized options: photos/"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(command, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        parse(*command.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 8", "rnak: there is no such option: do you mean rank[?]"),
        ("network_dim = 8", "network_dim: here it is rank"),
        ("config = 'b.toml'", "config: there is no such option.*"),
        ("rank = 0", "--rank must be at least 1, not 0"),
        ("rank = '8'", "rank = '8' must be a whole number"),
        ("rank = true", "rank = True must be a whole number"),
        ("flip = 1", "flip = 1 must be true or false"),
        ("lr = '1e-4'", "lr = '1e-4' must be a number"),
        ("lr = [1e-4]", r"lr = \[0.0001\] must be a number"),
        ("data = [1]", r"data = \[1\] must be a text in quotes, or a list of such"),
        ("out = 3", "out = 3 must be a text in quotes"),
        ("precision = 'fp8'", "invalid choice 'fp8'.*--precision.*"),
        ("[training]\nrank = 8", r"\[training\] is a table.*"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{file}: {message}$"):
        parse("--config", str(file))


@pytest.mark.parametrize("content", [None, b"rank 8", b"\xff"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "run.toml"
    if content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"^--config {file} (cannot be read: No such|is no TOML: )"):
        parse(f"--config={file}")


def test_the_later_file_wins_and_flags_win_over_both(tmp_path):
    for name, text in {"a": "rank = 4\nbs = 2\ndata = ['a']\nflip = true", "b": "rank = 5\ndata = ['b', 'c']"}.items():
        (tmp_path / name).write_text(text)
    files = ["--config", str(tmp_path / "a"), f"--config={tmp_path / 'b'}"]
    run = parse(*files)
    assert (run.lora.rank, run.dataset.bs, run.dataset.data, run.dataset.flip) == (5, 2, ("b", "c"), True)
    run = parse("--data", "d", *files, "--no_flip", "--rank=6")
    assert (run.lora.rank, run.dataset.bs, run.dataset.data, run.dataset.flip) == (6, 2, ("d",), False)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
OPTIONS = st.fixed_dictionaries({
    "data": st.lists(TEXT).map(tuple), "prompts": st.lists(TEXT.filter(lambda text: text[0] != "-")).map(tuple),
    "rank": st.integers(1, 10**6), "lr": st.floats(0, 1e9), "snr_gamma": st.none() | st.floats(0, 1e9, exclude_min=True),
    "flip": st.booleans(), "pictures": st.booleans(), "caption_prefix": st.text(st.characters(exclude_categories=("Cs",))),
    "author": st.none() | TEXT,
})  # fmt: skip


@settings(max_examples=12)  # each parses a command, in 0.15 s
@given(OPTIONS)
def test_what_is_written_is_read_back(tmp_path_factory, options):
    file = tmp_path_factory.getbasetemp() / "written.toml"
    flags = flat_options(TrainConfig()) | options
    file.write_text(options_as_toml(flags, ["train_lora.py", "--author", "a\nb"]), encoding="utf-8")
    assert flat_options(parse("--config", str(file))) == flags


def test_the_file_that_a_run_writes_gives_the_same_run_again(train, script, tmp_path):
    """By the LoRA file, whose header holds every option; resolved rates do not contradict --no-train-text-encoder."""
    train("--steps", 2, "--rank", 3, "--no-train-text-encoder")
    (first,) = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    (file,) = (tmp_path / "runs").glob("*/config.toml")
    (tmp_path / "out").rename(tmp_path / "first")
    script("train_lora.py", "--config", file)
    (second,) = [path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")]
    assert first == second


def test_the_table_of_foreign_names():
    assert len(SAME | DIFFERENT | NO_EFFECT) == len(SAME) + len(DIFFERENT) + len(NO_EFFECT) > 150
    assert {name.removeprefix("no_") for name in SAME.values()} <= NAMES.keys()
