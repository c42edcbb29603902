"""Files from others run no code, choose no path and see no secret. See also test_bad_inputs.py (data),
test_checkpoint.py (states), test_remote.py (URLs) and test_layout.py (torch.load).
"""

import ast
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_layout import SOURCES, imports
from test_train import weights

from common.errors import UserError
from common.files import sha256_of
from lora_files.read import trained_on
from run.state import MANIFEST, STATE, find_states

UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
RUNNERS = {"eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen", "torch.hub.load"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_call_that_could_run_foreign_code(path):
    assert not imports(path) & UNPICKLERS
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        assert ast.unparse(call.func) not in RUNNERS
        assert not {"shell", "allow_pickle", "trust_remote_code"} & {keyword.arg for keyword in call.keywords}


class Attack:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(("part", "pickled"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")])
def test_weights_of_a_model_are_no_pickles(train, tiny_model, tmp_path, part, pickled):
    """Not even pickles that torch.load(weights_only=True) would read."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (file,) = (model / part).glob("*.safetensors")
    torch.save(load_file(file), model / part / pickled)
    file.unlink()
    _, err = train("--model", model, "--steps", 1, status=2)
    assert f"Error no file named {file.name} found" in err


@pytest.mark.parametrize("part", ["unet", "scheduler"])
@pytest.mark.parametrize("library", ["attack", "this"])
def test_a_model_brings_no_code(train, tiny_model, tmp_path, monkeypatch, library, part):
    """diffusers refuses classes from a module in the component's folder, or from an installed one."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    for folder in (model, model / part):
        (folder / "attack.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'attacked')!r})\nclass UNet: pass\n")
    index = json.loads((model / "model_index.json").read_text()) | {part: [library, "UNet"]}
    (model / "model_index.json").write_text(json.dumps(index))
    monkeypatch.chdir(model)
    _, err = train("--model", model, "--steps", 1, status=2)
    assert "its unet is UNet, not UNet2DConditionModel" in err if part == "unet" else "is no complete SDXL folder" in err
    assert not (tmp_path / "attacked").exists()


def test_a_state_with_a_fitting_manifest_runs_no_code(train, tmp_path):
    train("--steps", 1)
    (state,) = find_states(tmp_path / "out")
    torch.save({"run": Attack(tmp_path / "attacked")}, state / STATE)
    (state / MANIFEST).write_text(json.dumps({STATE: sha256_of((state / STATE).read_bytes())}))
    _, err = train("--steps", 2, status=2)
    assert f"passed over: --resume: {state} is not a readable state: UnpicklingError" in err
    assert not (tmp_path / "attacked").exists()


# Names.

CLIMBING = ["../../../climbed", "/tmp/sdxl_lora_climbed", "..\\climbed", "climbed\0", "\x1b]0;climbed\x07"]


@pytest.fixture
def below(tmp_path):
    """below() -> every path below tmp_path, so that a file written outside the current folder shows."""
    return lambda: {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}


def test_what_a_lora_names_is_no_path(train, script, tiny_model, tmp_path, monkeypatch, below):
    train("--steps", 1, "--no-train-text-encoder")
    good = weights(tmp_path / "out", 1)
    metadata = {key: name for key in ("ss_output_name", "ss_sd_model_name", "modelspec.title", "name") for name in CLIMBING[:1]}
    config = json.dumps({"model": str(tmp_path / "out"), "out": CLIMBING[0], "log_dir": CLIMBING[1]})
    here = tmp_path / "a/b/c/d"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    save_file(good, here / "x.safetensors", metadata | {"sdxl_lora.config": config, "sdxl_lora.step": CLIMBING[0]})
    before, options = below(), ["--model", tiny_model]
    script("scripts/convert_lora.py", "x.safetensors", "y.safetensors", *options)
    script("scripts/extract_lora.py", "x.safetensors", "z.safetensors", "--resize", "--rank", 1, *options)
    script("scripts/merge_lora.py", tiny_model, "merged", "--lora", "x.safetensors")
    script("scripts/inspect_lora.py", "x.safetensors", *options)
    script("infer.py", "--lora", "x.safetensors", "--steps", 1, "--prompts", CLIMBING[0], "--out", "images", *options)
    _, err = script("infer.py", "--lora", "x.safetensors", status=2)  # the folder exists, but is no model
    assert "which is not here: name the model by --model" in err
    new = {name.removeprefix("a/b/c/d/").partition("/")[0] for name in below() - before}
    assert new == {"y.safetensors", "z.safetensors", "merged", "x.norms.png", "images"}
    assert sorted(os.listdir("images")) == ["1.png"]
    assert not Path(CLIMBING[1]).exists()


@pytest.mark.parametrize("name", CLIMBING)
def test_keys_and_models_of_a_lora_file_write_nothing(script, tiny_model, tmp_path, name, below):
    down = {f"{name}.lora_down.weight": torch.zeros(1, 4), f"{name}.lora_up.weight": torch.zeros(4, 1)}
    save_file(down, tmp_path / "x.safetensors", {"sdxl_lora.config": json.dumps({"model": name})})
    before, options = below(), ["--model", tiny_model]
    for command in (
        ["scripts/convert_lora.py", tmp_path / "x.safetensors", tmp_path / "y.safetensors", *options],
        ["scripts/merge_lora.py", tiny_model, tmp_path / "merged", "--lora", tmp_path / "x.safetensors"],
        ["infer.py", "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "images", *options],
        ["infer.py", "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "images"],
    ):
        _, err = script(*command, status=2)
        assert err.count("\n") == 1
        assert err[:-1].isprintable()
    assert below() == before
    assert not Path(CLIMBING[1]).exists()


def test_the_header_of_a_lora_fetches_no_model(tmp_path):
    file = tmp_path / "x.safetensors"
    for model, here in (("someone/evil", False), ("demo", True), (str(ROOT / "assets/demo/model"), True), (str(ROOT), False)):
        save_file({"a": torch.zeros(1)}, file, {"sdxl_lora.config": json.dumps({"model": model})})
        if here:
            assert trained_on(file) == model
        else:
            with pytest.raises(UserError, match=f"was trained on {model!r}, which is not here"):
                trained_on(file)


# Secrets.


def test_no_secret_of_the_environment_is_written_or_printed(train, script, tiny_model, tmp_path, monkeypatch):
    secret = "geheim12345"
    for name in ("HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "http_proxy"):
        monkeypatch.setenv(name, f"http://me:{secret}@127.0.0.1:9")
    outputs = train("--steps", 2, "--format", "both")
    lora, ours = tmp_path / "out/pytorch_lora_weights_2.safetensors", tmp_path / "y.safetensors"
    options = ["--steps", 1, "--prompts", "x", "--out", tmp_path / "images", "--save-merged", tmp_path / "merged"]
    outputs += script("infer.py", "--lora", lora, "--model", tiny_model, *options)
    outputs += script("scripts/convert_lora.py", lora, ours, "--model", tiny_model)
    for data in (f"https://me:{secret}@host/a.tar", f"s3://bucket/a.tar?X-Amz-Signature={secret}"):
        outputs += train("--data", data, "--out", tmp_path / "refused", "--log-dir", tmp_path / "refused", status=2)
    assert not (tmp_path / "refused").exists()
    assert not any(secret in text for text in outputs)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {"tfevents" if "tfevents" in path.name else path.suffix for path in written}
    assert {"tfevents", ".pt", ".json", ".safetensors", ".png"} <= kinds
    assert not [path for path in written if secret.encode() in path.read_bytes()]
