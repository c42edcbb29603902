"""run/advice.py: what a run says to the person who started it."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import source_in_memory

from common.text import duration
from data import Stream
from dataset.sources import PLACE
from options.training import CaptionConfig, DataConfig
from run.advice import concerns, next_steps


def stream_of(sizes: list[tuple[int, int]]) -> Stream:
    places = np.zeros(len(sizes), PLACE)
    places["height"], places["width"] = zip(*sizes, strict=True)
    source = source_in_memory(places, [str(size) for size in sizes])
    return Stream(source, DataConfig(buckets=False), CaptionConfig(), 1024, 0)


LARGE, SMALL = (2000, 1500), (400, 500)


@pytest.mark.parametrize(
    ("sizes", "looks", "on_cpu", "parameters", "words"),
    [
        ([LARGE] * 3, 20, False, 3 * 10**9, []),
        ([LARGE] * 3, 112.4, False, 3 * 10**9, ["112 looks at each picture"]),
        ([LARGE, SMALL, (0, 0), SMALL], 20, True, 10**6, ["2 of 3 pictures are enlarged more than 1.5 times"]),
        ([LARGE], 20, True, 3 * 10**9, ["on a CPU"]),
    ],
)
def test_concerns(sizes, looks, on_cpu, parameters, words):
    lines = concerns(stream_of(sizes), looks, on_cpu, parameters)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.4, "8 seconds"), (89, "89 seconds"), (240, "4 minutes"), (5399, "90 minutes"), (7500, "2 h 5 min")]
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text.replace("90 minutes", "1 h 30 min")


@pytest.mark.parametrize("name", ["my cat", "naruto", "l'été", "$x; y"])
def test_the_commands_to_copy_name_the_file_for_a_shell(name):
    file = Path(f"{name}/{name}.safetensors")
    lines = next_steps(file, f"{name}/log", "sdxl")
    words = [shlex.split(line[11:]) for line in lines]
    assert words[0] == ["python", "infer.py", "--lora", str(file), "--compare"]
    assert words[1] == ["tensorboard", "--logdir", name]
    assert words[2][:3] == ["cp", str(file), "ComfyUI/models/loras/"]
