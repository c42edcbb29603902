"""docs/first-lora.md, as a stranger goes through it: its commands as printed, in a folder of pictures. The tiny model stands
for SDXL, and the run is short.
"""

import shlex
import shutil

import pytest
from conftest import ROOT, photograph
from test_docs import commands, fences

from model.load import MODELS

PAGE = ROOT / "docs/first-lora.md"
APPENDED = {
    "train_lora.py": ["--steps", "2", "--workers", "0"],
    "infer.py": ["--steps", "2"],
    "scripts/choose.py": ["--take", "2"],  # seven pictures are too few to keep some out
}  # the last value of a flag counts


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """The folder of a stranger, who has put seven captioned pictures into my-pictures/."""
    (tmp_path / "presets").symlink_to(ROOT / "presets")
    pictures = tmp_path / "my-pictures"
    pictures.mkdir()
    for i in range(7):
        image = photograph(i, 80 + 30 * i, 200 - 20 * i)
        if i % 3 == 0:
            image.putalpha(image.convert("L"))
        image.save(pictures / f"drawing {i}.png")
        (pictures / f"drawing {i}.txt").write_text(f"a woman with hair of colour {i}, seen from the side", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "sdxl", str(tiny_model))
    monkeypatch.setattr("run.gallery.SAMPLE_STEPS", 2)
    return tmp_path


def test_the_commands_as_printed_lead_from_a_folder_to_a_lora_to_share(folder, script):
    printed = [words for text in fences(PAGE, "bash") for words in commands(text)]
    names = [words[1] for words in printed]
    assert names == ["scripts/show_data.py", "train_lora.py", *["scripts/choose.py"] * 2, "infer.py", "scripts/share.py"]
    for program, name, *arguments in printed:
        assert program == "python", shlex.join([program, name, *arguments])
        script(name, *arguments, *APPENDED.get(name, []))
    assert (folder / "data.png").exists()
    assert (folder / "checkpoints/naruto-000002.safetensors").exists()
    assert {path.name.split("-p")[0] for path in (folder / "checkpoints/samples").glob("step-*.png")} >= {
        "step-000000",
        "step-000002",
    }
    taken = (folder / "checkpoints/naruto.safetensors").read_bytes()
    assert taken == (folder / "checkpoints/naruto-000002.safetensors").read_bytes()
    assert (folder / "images/compare.png").exists()
    assert list((folder / "naruto-lora").glob("*.safetensors"))
    assert "nrt style" in (folder / "naruto-lora/README.md").read_text("utf-8")

    # "Mend the folder and run the training command again. A finished run is moved to checkpoints/before-1."
    (folder / "my-pictures/drawing 0.txt").write_text("a man with a hat", "utf-8")
    shutil.copy(folder / "my-pictures/drawing 1.png", folder / "my-pictures/new.png")
    (folder / "my-pictures/new.txt").write_text("a castle", "utf-8")
    _, name, *arguments = printed[1]
    script(name, *arguments, *APPENDED[name])
    assert (folder / "checkpoints/before-1/naruto-000002.safetensors").exists()
    assert (folder / "checkpoints/naruto-000002.safetensors").exists()
