"""options/command.py: mistakes in a command or a run file are one line, and the file that a run writes gives it again."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.options import flag_of, flat_options
from common.text import NO_TEXT
from options.command import all_fields, options_as_toml, parse_arguments
from options.foreign import DIFFERENT, NO_EFFECT, REMOVED, SAME
from options.training import TrainCommand, TrainConfig
from scripts.from_kohya import OBJECTIVE

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
        ("--noise_offset 0.03", "--noise_offset: --noise is offset:x or pyramid:LEVELS,DECAY"),
        ("--lr 1,5e-4", "--lr 1,5e-4: write 1.5e-4"),
        ("--lr=1,5", "--lr 1,5: write 1.5"),
        ("--flip true", "--flip takes no value: --flip or --no-flip"),
        ("--no-masked-loss=False", "--masked-loss takes no value: --masked-loss or --no-masked-loss"),
        ("--rank abc", "--rank abc: this must be a whole number"),
        ("--rank=2.5", "--rank 2.5: this must be a whole number"),
        ("--lr 1.0.0", "--lr 1.0.0: this must be a number"),
        ("--rank 8 photos/", "Unrecognized options: photos/"),
        ("--rank", "Missing value for argument '--rank'.*"),
        ("--precision fp8", "invalid choice 'fp8' for argument '--precision'.*'bf16'.*"),
        ("--config", "--config needs a file"),
        ("--config= --rank 8", "--config needs a file"),
        ("--config --rank 8", "--config needs a file"),
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
        ("config = 'b.toml'", "config: a file names no other: give several --config"),
        ("no-flip = true", "no-flip: in a file it is flip = false"),
        ("base-precision = 'int8'\nbase_precision = 'nf4'", "base_precision is there twice: remove one"),
        ("prompts = ['a', '--n b']", "prompts: none of its texts may begin with -"),
        ('trigger = "a\\u0000b"', "--trigger a.x00b: holds a control character, or is no UTF-8"),
        ('data = ["a\\u0000b"]', "--data a.x00b: holds a control character, or is no UTF-8"),
        ("epochs = 1e308", "--epochs must be above 0 and at most .*"),
        (f"name = '{'n' * 151}'", "--name 'n*' must be a name .*, up to 150 bytes"),
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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_file_of_any_editor_is_read(tmp_path, encoding, newline):
    (tmp_path / "run.toml").write_bytes(f"rank = 4{newline}trigger = 'é'{newline}".encode(encoding))
    run = parse("--config", str(tmp_path / "run.toml"))
    assert (run.lora.rank, run.captions.trigger) == (4, "é")


@pytest.mark.parametrize(
    ("files", "flags", "length"),
    [
        (["epochs = 3"], ["--steps", "7"], (7, None)),
        (["epochs = 3\nsteps = 40"], ["--steps", "7"], (7, None)),  # as a run writes them
        (["epochs = 3\nsteps = 40"], [], (40, 3)),
        (["epochs = 3", "steps = 7"], [], (7, None)),
        (["steps = 7", "epochs = 3"], [], (7, 3)),
        (["steps = 7"], ["--epochs", "3"], (7, 3)),
    ],
)
def test_steps_take_the_place_of_epochs_that_were_said_before(tmp_path, files, flags, length):
    for number, text in enumerate(files):
        (tmp_path / str(number)).write_text(text)
    run = parse(*flags, *(f"--config={tmp_path / str(number)}" for number in range(len(files))))
    assert (run.steps, run.epochs) == length


@pytest.mark.parametrize("flag", ["trigger", "caption", "author", "description", "license"])
def test_what_people_read_is_text(flag):
    with pytest.raises(UserError, match=f"^--{flag} x.xff: holds a control character, or is no UTF-8"):
        parse(f"--{flag}", "x\udcff")
    parse("--data", "x\udcff")  # the name of a file may be any bytes


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1)
CLEAN = TEXT.filter(lambda text: not NO_TEXT.search(text))
OPTIONS = st.fixed_dictionaries({
    "data": st.lists(CLEAN).map(tuple), "prompts": st.lists(CLEAN.filter(lambda text: text[0] != "-")).map(tuple),
    "rank": st.integers(1, 10_240), "lr": st.floats(0, 1e9), "input_perturbation": st.floats(0, 1),
    "flip": st.booleans(), "pictures": st.booleans(), "trigger": CLEAN | st.just(""),
    "author": st.none() | CLEAN,
})  # fmt: skip


@settings(max_examples=12, deadline=None)  # each parses a command, in 0.15 s
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


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_a_removed_option_in_the_file_of_an_older_run_has_no_effect(tmp_path, name):
    file = tmp_path / "config.toml"
    file.write_text(f"rank = 3\n{name} = true\n")
    assert name not in NAMES
    assert parse("--config", str(file)) == parse("--rank", "3")
    with pytest.raises(UserError, match=f"^--{name}: {NO_EFFECT[name]}$"):
        parse(f"--{name}")


def test_the_table_of_foreign_names():
    assert len(SAME | DIFFERENT | NO_EFFECT) == len(SAME) + len(DIFFERENT) + len(NO_EFFECT) > 150
    assert {name.removeprefix("no_") for name in SAME.values()} <= NAMES.keys()


PRESETS = sorted((ROOT / "presets").glob("*.toml"))
MODELS, KINDS = {"sdxl", "pony", "illustrious", "noobai-vpred", "lightning"}, {"style", "character"}


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_is_read_and_every_line_has_its_reason(file):
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert all(re.fullmatch(r"[\w-]+ = [^#]+  # .{9,}", line) for line in lines)
    parse("--config", str(file))


def test_presets_of_models_kinds_and_cards_set_different_options():
    values = {file.stem: tomllib.loads(file.read_text()).keys() for file in PRESETS}
    cards = values.keys() - MODELS - KINDS
    assert cards == {"8gb", "12gb", "16gb", "24gb"}
    for one, other in [(MODELS, KINDS), (KINDS, cards)]:
        assert not set().union(*(values[name] for name in one)) & set().union(*(values[name] for name in other))


# Settings of kohya's scripts.

KOHYA = """
[general]
pretrained_model_name_or_path = "model.safetensors"
[training]
unet_lr = 2e-4
learning_rate = 1e-4
network_dim = 16
optimizer_type = "AdamW8bit"
lr_scheduler = "cosine"
lr_warmup_steps = 10
max_train_steps = 800
network_train_unet_only = {unet_only}
min_snr_gamma = 0
noise_offset = 0.03
save_precision = "float"
new_key = 3
[[datasets]]
resolution = [1024, 768]
[[datasets.subsets]]
image_dir = "a"
num_repeats = 3
[[datasets.subsets]]
image_dir = "b"
"""


@pytest.mark.parametrize("unet_only", ["true", "false"])
def test_toml_of_kohyas_scripts(script, tmp_path, unet_only):
    (tmp_path / "theirs.toml").write_text(KOHYA.format(unet_only=unet_only))
    out = tmp_path / "run.toml"
    script("scripts/from_kohya.py", tmp_path / "theirs.toml", "--out", out)
    rates = {"text_encoder_lr": [1e-4]} if unet_only == "false" else {}
    assert tomllib.loads(out.read_text()) == rates | {
        "model": "model.safetensors", "lr": 2e-4, "rank": 16, "alpha": 1.0, "optimizer": "adamw8bit", "lr_schedule": "cosine",
        "warmup": 10, "steps": 800, "train_text_encoder": unet_only == "false", "save_dtype": "fp32", "bs": 1,
        "resolution": 880, "data": ["a:x3", "b"], "noise": "offset:0.03",
    }  # fmt: skip
    for line in ("min_snr_gamma: 0: --weighting is", "new_key: 3: not known here"):
        assert f"# {line}" in out.read_text()
    _, err = script("scripts/from_kohya.py", tmp_path / "theirs.toml", "--out", out, status=2)
    assert "is there already" in err


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("a.json", "[1]", "it holds no settings by name"),
        ("a.toml", "{", "is neither TOML of sd-scripts nor JSON"),
        ("a.json", '{"additional_parameters": "--seed \'1"}', "No closing quotation"),
        ("a.toml", None, "cannot be read: No such file"),
        ("a.toml", "max_train_steps = 5\nlr_warmup_steps = 9", "--warmup 9 is longer than --steps 5"),
    ],
)
def test_settings_that_cannot_be_used_leave_no_file(script, tmp_path, file, text, message):
    if text is not None:
        (tmp_path / file).write_text(text)
    _, err = script("scripts/from_kohya.py", tmp_path / file, "--out", tmp_path / "run.toml", status=2)
    assert message in err
    assert {path.name for path in tmp_path.iterdir()} <= {file}


def test_another_optimizer_and_another_layer_keep_what_is_theirs(script, tmp_path):
    theirs = {
        "optimizer": "DAdaptation",
        "unet_lr": 1.0,
        "LoRA_type": "LyCORIS/LoKr",
        "network_dim": 100000,
        "network_alpha": 1,
    }
    theirs |= {"additional_parameters": "--network_train_unet_only --max_grad_norm=0 --seed 7", "bucket_reso_steps": 1}
    (tmp_path / "gui.json").write_text(json.dumps(theirs))
    script("scripts/from_kohya.py", tmp_path / "gui.json", "--out", tmp_path / "run.toml")
    assert tomllib.loads((tmp_path / "run.toml").read_text()) == {"train_text_encoder": False, "seed": 7, "bs": 1, "clip": 0.0}


@pytest.mark.parametrize(
    ("theirs", "here", "said"),
    [
        ({"lr_warmup_steps": 0.1, "max_grad_norm": 0}, {"warmup": 0.1, "clip": 0.0}, ""),
        ({"optimizer_type": "", "learning_rate": "1e-4"}, {"lr": 1e-4, "text_encoder_lr": [1e-4]}, "optimizer_type: not set"),
        ({"optimizer_type": "DAdaptation", "learning_rate": 1}, {}, "--lr: 1.0: of another optimizer"),
        (
            {
                "optimizer_type": "Prodigy",
                "unet_lr": 1,
                "optimizer_args": "betas=0.9,0.99 d_coef=2 weight_decay=0.1",
            },
            {
                "optimizer": "prodigy",
                "lr": 1.0,
                "text_encoder_lr": [1.0],
                "betas": [0.9, 0.99],
                "weight_decay": 0.1,
                "optimizer_args": ["d_coef=2"],
            },
            "",
        ),
        ({"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3}, {"lr_schedule": "cosine-restarts:3"}, ""),
        ({"unet_lr": 1e-4, "learning_rate": 2e-4, "text_encoder_lr": 3e-4}, {"lr": 1e-4, "text_encoder_lr": [3e-4]}, ""),
        ({"unet_lr": 1e-4, "text_encoder_lr": [3e-5, 1e-5]}, {"lr": 1e-4, "text_encoder_lr": [3e-5, 1e-5]}, ""),
        ({"learning_rate": 2e-4, "text_encoder_lr": "0.0"}, {"lr": 2e-4, "train_text_encoder": False}, "text_encoder_lr: off"),
        ({"keep_tokens": 2}, {}, "--keep-tags: 2: does nothing here without --shuffle-tags"),
        ({"scale_weight_norms": 2.5, "loraplus_lr_ratio": 0}, {"max_norm": 2.5}, "loraplus_lr_ratio: off"),
        ({"scale_weight_norms": 0, "block_dims": "4,8"}, {}, "block_dims: '4,8': ranks of single blocks are --rank-pattern"),
        ({"learning_rate": "fast"}, {}, "learning_rate: 'fast': not here"),
        ({"network_args": ["conv_dim=4", "conv_alpha=1", "algo=lora"]}, {"conv_rank": 4, "conv_alpha": 1.0}, "algo: 'lora'"),
        ({"conv_dim": 8, "rank_dropout": 0.1}, {"conv_rank": 8, "conv_alpha": 1.0, "rank_dropout": 0.1}, ""),
        ({"conv_dim": 0, "conv_alpha": 1}, {}, "--conv-alpha: 1.0: does nothing here without --conv-rank"),
        ({"resolution": "1024"}, {"resolution": 1024}, ""),
        ({"epoch": 10, "max_train_steps": 0, "save_every_n_epochs": 1}, {"epochs": 10.0, "save_every": "1epochs"}, ""),
        ({"epoch": 10, "max_train_steps": 500}, {"steps": 500}, "epoch: 10: the number of steps is given"),
        ({"save_every_n_epochs": 2, "save_every_n_steps": 50}, {"save_every": 50}, ""),
        ({"class_tokens": "sks cat", "caption_extension": ".txt"}, {"caption": "sks cat", "caption_extension": ".txt"}, ""),
        ({"batch_size": [3, {"image_dir": "x"}]}, {"data": ["x"]}, ""),
        ({"reg_data_dir": "reg", "prior_loss_weight": 0.5}, {"prior_data": ["reg"], "prior_weight": 0.5}, ""),
        ({"prior_loss_weight": 0.5}, {}, "--prior-weight: 0.5: does nothing here without --prior-data"),
        (
            {"subsets": [{"image_dir": "x", "class_tokens": "sks"}, {"is_reg": True, "image_dir": "y", "class_tokens": "cat"}]},
            {"data": ["x"], "caption": "sks", "prior_data": ["y"]},
            "class_prompt: 'cat': pictures of the class, with captions of their own, are --prior-data",
        ),
    ],
)
def test_single_keys_of_kohyas(script, tmp_path, theirs, here, said):
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    script("scripts/from_kohya.py", tmp_path / "theirs.json", "--out", tmp_path / "run.toml")
    text = (tmp_path / "run.toml").read_text()
    assert tomllib.loads(text) == here
    assert f"# {said}" in text


@pytest.mark.parametrize("file", sorted(Path("/work/shared/kohya-presets").glob("*.json")), ids=lambda file: file.stem)
def test_every_key_of_a_setting_of_the_gui_is_accounted_for(file, script, tmp_path):
    """On the project's machines; elsewhere there are no such files."""
    out = tmp_path / "run.toml"
    script("scripts/from_kohya.py", file, "--out", out)
    options, said = tomllib.loads(out.read_text()), out.read_text()
    option_of = SAME | {key: option for option, keys in OBJECTIVE.items() for key in keys}
    assert "not known here" not in said
    for key in json.loads(file.read_text()):
        assert option_of.get(key) in options or f"# {key}: " in said or f"# {flag_of(option_of[key])}: " in said, key


def test_of_kohyas_noises_and_weightings_that_exclude_each_other_here_the_second_is_named(script, tmp_path):
    theirs = {"multires_noise_iterations": 6, "noise_offset": 0.1, "min_snr_gamma": 5, "debiased_estimation_loss": True}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs | {"min_timestep": [3], "network_args": ["dora_wd=True"]}))
    script("scripts/from_kohya.py", tmp_path / "theirs.json", "--out", tmp_path / "run.toml")
    text = (tmp_path / "run.toml").read_text()
    assert tomllib.loads(text) == {"noise": "pyramid:6,0.3", "weighting": "min-snr:5"}
    assert "# noise_offset: 0.1: --noise is offset:x or pyramid" in text
    assert "# debiased_estimation_loss: True: --weighting is" in text
    assert "# min_timestep: [3]: --timesteps is LOW-HIGH" in text
    assert "# dora_wd: 'True': --dora is for linear layers" in text
