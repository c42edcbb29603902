"""evaluation/page.py and scripts/report.py: the page of a run, as text and in a real browser."""

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, photograph
from PIL import Image
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from evaluation.intervals import Interval
from evaluation.page import ALL_PIXELS, Line, Point, chart, less_error, page, read_scalars, running_median, share, ticks
from evaluation.verdict import StepFigures, Tell, Verdict

HOSTILE = (
    """</style></title><script>console.error("ran")</script>"'><img src="http://127.0.0.1:9/x.png" onerror="x"> & {{ 7 * 7 }}"""
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NO_VERDICT = Verdict((), None, ())


class Elements(HTMLParser):
    """The tags with their attributes, and the text, as a browser would see them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.text += " "
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_data(self, data):
        self.text += data

    def of(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def interval(mean: float, half: float) -> Interval:
    return Interval(mean, mean - half, mean + half)


def full_record(out: Path, word: str, steps: tuple[int, ...] = (80, 160)) -> dict:
    """Of a run with everything in it; `word` is in every text that comes from outside."""
    (out / "samples").mkdir(parents=True)
    thumb = {"caption": f"caption {word}", "jpeg": base64.b64encode(encoded(photograph(9, 160, 120), "JPEG")).decode()}
    pictures: dict[str, list] = {}
    for key in ("base", *map(str, steps)):
        pictures[key] = []
        for i in range(2):
            file = f"samples/step-{0 if key == 'base' else int(key):06}-p{i + 1}-{'base' if key == 'base' else 'lora'}.png"
            photograph(i, 128, 96).save(out / file)
            nearest = {"trained": ["a", 0.1 if i else 0.8], "kept_out": None}
            pictures[key].append({"file": file, "recognised": i == 0, "nearest": None if key == "base" else nearest})
    return {
        "run": {
            "name": f"name {word}", "model": f"model {word}", "trigger": f"trigger {word}", "state": "stopped",
            "reason": f"reason {word}", "begun": "2026-11-27 13:30", "seconds": 206.0, "step": 160, "steps": 240,
            "images_per_step": 3, "epoch": 47, "command": f"command {word}", "changed": {"lr": f"value {word}"},
            "versions": {"torch": f"version {word}"}, "peak_gib": 0.6,
        },
        "usual_distance": 0.9,
        "files": {str(step): {"name": f"file {word} {step}", "sha256": "ab" * 32} for step in steps},
        "lines": {"data": f"line {word}", "memory": f"plan {word}"},
        "warnings": [f"warning {word}"],
        "prompts": [{"text": f"prompt {word}", "seed": 2, "width": 128, "height": 96, "negative": f"negative {word}"}] * 2,
        "pictures": pictures,
        "thumbs": {"trained": {"a": thumb}, "kept_out": {"b": thumb}},
    }  # fmt: skip


def verdict_with(word: str) -> Verdict:
    bands = (interval(0.3, 0.1), None, Interval(0.2, math.nan, math.nan), *[interval(0.5, 0.05)] * 7)
    good = StepFigures(80, interval(0.42, 0.04), bands, interval(0.5, 0.1), interval(0.08, 0.1), interval(0.97, 0.05))
    bad = StepFigures(160, interval(0.45, 9), bands, None, None, interval(0.5, 0.2), tells=(Tell("prompts", f"tell {word}"),))
    return Verdict((good, bad), 80, (f"sentence {word}", "another"))


SCALARS = {"train/loss": [(step, 0.3 + math.sin(step)) for step in range(1, 60)], "train/lr/unet": [(1, 1e-4), (2, 1e-4)]}


def pages(out: Path) -> dict[str, str]:
    """Of a run with all there is, hostile texts in it; of one that has just begun; of nothing."""
    full = full_record(out, HOSTILE)
    begun = {"run": full["run"] | {"state": "running", "step": 0}, "pictures": {"base": full["pictures"]["base"]}}
    return {
        "full": page(full, verdict_with(HOSTILE), SCALARS, out),
        "begun": page(begun | {"prompts": full["prompts"]}, NO_VERDICT, {}, out),
        "empty": page({}, NO_VERDICT, {}, out),
    }


# The text of the page.


def test_the_same_input_gives_the_same_bytes(tmp_path):
    record = full_record(tmp_path / "out", "x")
    once, again = (page(json.loads(json.dumps(record)), verdict_with("x"), SCALARS, tmp_path / "out") for _ in range(2))
    assert once == again


def test_foreign_text_is_text(tmp_path):
    elements = Elements(pages(tmp_path / "out")["full"])
    assert "script" not in elements.tags
    assert elements.tags.count("style") == 1
    assert not [name for name, _ in elements.attributes if name.startswith("on") or name == "style"]
    kinds = "caption name model trigger reason command value version file line plan warning prompt negative sentence tell"
    assert not [kind for kind in kinds.split() if f"{kind} {HOSTILE}" not in elements.text]


def test_nothing_is_fetched(tmp_path):
    for html in pages(tmp_path / "out").values():
        elements = Elements(html)
        assert not [link for link in elements.of("href") + elements.of("src") if not link.startswith(("data:", "#"))]
        assert "url(" not in html
        assert not {"iframe", "object", "form", "base"} & set(elements.tags)
        assert len(set(elements.of("id"))) == len(elements.of("id"))
        assert {link[1:] for link in elements.of("href") if link.startswith("#")} <= set(elements.of("id"))
    assert "http" not in page(full_record(tmp_path / "own", "x"), verdict_with("x"), SCALARS, tmp_path / "own").replace(
        "http-equiv", ""
    )


def test_it_says_what_a_person_looks_for(tmp_path):
    text = " ".join(Elements(page(full_record(tmp_path, "x"), verdict_with("x"), SCALARS, tmp_path)).text.split())
    words = """stopped: reason x · model x model · 2026-11-27 13:30 · 3 minutes of training
        160 of 240 steps 10.2 looks at each picture
        42 % less error than the base on pictures it never saw, step 80 (38 to 46 %)
        step 80 recommended
        It copies file x 80 to name x.safetensors
        seed 2 · 128 × 96 · without: negative x
        45 % less error (−855 to 945 %) tell x
        not what was asked
        looks like a copy of yours
        Where step 80 learned"""
    assert not [line for line in map(str.strip, words.splitlines()) if line not in text]
    assert f"python scripts/choose.py {tmp_path} --take 80" in text
    assert text.count("looks like a copy") == 2  # of the second prompt at both steps; the base has no nearest picture


def test_sections_without_data_vanish(tmp_path):
    all_of_them, begun, empty = (re.findall("<h2[^>]*>(.+?)</h2>", html) for html in pages(tmp_path).values())
    assert (len(all_of_them), begun, empty) == (7, ["The same prompts, step by step", "How it was made"], [])


def test_a_picture_that_is_gone_or_broken_is_left_out(tmp_path):
    record = full_record(tmp_path, "x")
    whole = page(record, NO_VERDICT, {}, tmp_path)
    (tmp_path / "samples/step-000080-p1-lora.png").unlink()
    path = tmp_path / "samples/step-000160-p1-lora.png"
    path.write_bytes(path.read_bytes()[:500] + b"????" + path.read_bytes()[504:])
    record["pictures"]["160"][1] = None
    assert whole.count('class="open"') - page(record, NO_VERDICT, {}, tmp_path).count('class="open"') == 3


def test_what_is_no_number_or_no_text_breaks_nothing(tmp_path):
    nan, record = Interval(math.nan, math.nan, math.nan), full_record(tmp_path, "\udcff \x00")
    record["run"] |= {"step": 5000, "epoch": 12}
    (first, second), bands = verdict_with("x").steps, (nan, interval(0.3, 0.1), None)
    broken = StepFigures(240, nan, bands, nan, nan, nan, tells=(Tell("nan", "It draws nothing."),))
    only = Verdict((broken, StepFigures(250, interval(0.1, 0.1), bands, nan)), None, ())
    for verdict in (Verdict((first, second, broken), 80, ()), only):
        html = page(record, verdict, {"loss": [(1, math.nan), (2, math.inf), (3, 0.0), (4, 0.0)]}, tmp_path)
        assert html.encode()
        assert not re.search(r"\bnan\b|\binf\b", re.sub('data:[^"]+', "", html))
        assert "1250 looks" in html
    assert "Where step 250 learned" in html


def test_many_pictures_become_small_ones(tmp_path):
    record = full_record(tmp_path, "x", tuple(range(10, 310, 10)))
    photo = encoded(photograph(1, 400, 325))
    for path in (tmp_path / "samples").iterdir():
        path.write_bytes(photo)
    sizes = []
    for uri in Elements(page(record, NO_VERDICT, {}, tmp_path)).of("src"):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
            sizes.append(image.size)
    drawn = [width * height for width, height in sizes if (width, height) != (160, 120)]
    assert len(drawn) == 62
    assert 0.7 * ALL_PIXELS < sum(drawn) <= ALL_PIXELS


# Figures and curves.


@pytest.mark.parametrize(
    ("figure", "words", "shown"),
    [
        (Interval(0.42, 0.38, 0.46), ("42 % less error", "38 to 46 %"), "42 % (38 to 46 %)"),
        (Interval(0.03, -0.02, 0.08), ("3 % less error", "−2 to 8 %"), "3 % (−2 to 8 %)"),
        (Interval(-0.12, -0.18, -0.06), ("12 % more error", "6 to 18 %"), "−12 % (−18 to −6 %)"),
        (Interval(0.42, math.nan, math.nan), ("42 % less error", ""), "42 %"),
    ],
)
def test_figures_in_words(figure, words, shown):
    plain = [text.replace("\N{NO-BREAK SPACE}", " ") for text in (*less_error(figure), share(figure))]
    assert plain == [*words, shown]


def test_points_lie_where_the_axes_say():
    drawn = chart("", "", "", [Line("", [Point(0, 0.2), Point(50, 0.4), Point(100, 1), Point(150, 9)])], (0, 1))
    places = [tuple(map(float, pair.split(","))) for pair in drawn["lines"][0]["path"].split()]
    x_marks, y_marks = ({text: place for place, text in drawn[name]} for name in ("x_marks", "y_marks"))
    assert [x for x, _ in places] == [x_marks[text] for text in ("0", "50", "100", "150")]
    at = {text.replace("\N{NO-BREAK SPACE}", " "): y for text, y in y_marks.items()}
    assert [y for _, y in places] == [at[text] for text in ("20 %", "40 %", "100 %", "100 %")]  # the last is beyond


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.5, 1.5), (1e-5, 1.1e-5), (0, 45_000), (-3, -1)])
def test_ticks_are_few_and_round(low, high):
    marks = ticks(low, high, 5)
    assert 2 <= len(marks) <= 6
    assert low <= marks[0] < marks[-1] <= high
    assert {f"{b - a:e}"[0] for a, b in itertools.pairwise(marks)} <= set("125")
    assert all(math.isclose(mark / (marks[1] - marks[0]), round(mark / (marks[1] - marks[0])), abs_tol=1e-6) for mark in marks)


def test_the_median_is_of_the_values_around():
    values = np.random.default_rng(0).normal(size=80).tolist()
    points = running_median(list(enumerate(values)), [0, 40, 79])
    assert [p.y for p in points] == pytest.approx([statistics.median(values[a:b]) for a, b in ((0, 6), (35, 46), (74, 80))])
    assert all(p.low <= p.y <= p.high for p in points)


def write_log(folder: Path, scalars: dict[str, list[tuple[int, float]]], purge_step: int | None = None) -> None:
    with SummaryWriter(str(folder), purge_step=purge_step) as log:
        for tag, readings in scalars.items():
            for step, value in readings:
                log.add_scalar(tag, value, step)


def test_scalars_of_a_resumed_run_are_read_once(tmp_path):
    write_log(tmp_path, {"loss": [(10, 0.5), (20, 0.25), (30, 9.0)]})
    write_log(tmp_path, {"loss": [(30, 0.125)], "a": [(30, 1.0)]}, purge_step=21)
    assert read_scalars(tmp_path) == {"a": [(30, 1.0)], "loss": [(10, 0.5), (20, 0.25), (30, 0.125)]}
    assert read_scalars(tmp_path / "nothing") == {}


def test_a_log_that_a_crash_has_cut_is_read_up_to_there(tmp_path):
    write_log(tmp_path, {"loss": [(step, 0.5) for step in range(100)]})
    (log,) = tmp_path.iterdir()
    log.write_bytes(log.read_bytes()[:-20])
    assert read_scalars(tmp_path) == {"loss": [(step, 0.5) for step in range(99)]}


def test_tags_of_old_and_new_logs_give_the_same_curves(tmp_path):
    new = ("train/loss", "train/grad_norm", "train/grad_norm_unet", "train/lr_unet", "train/lr_text_encoder")
    new += ("speed/images_per_second", "memory/peak_GiB")
    old = ("loss", "grad_norm", "grad_norm/unet", "lr/unet", "lr/text_encoder", "images_per_second", "peak_memory_GiB")
    others = {tag: [(1, 1.0), (2, 1.0)] for tag in ("loss_scale", "train/loss_scale", "validation/loss", "memory/reserved_GiB")}
    htmls = []
    for tags in (new, old):
        values = dict(zip(tags, (1, 2, 3, 4, 4, 5, 6), strict=True))
        scalars = {tag: [(10, 0.5), (20, math.nan), (30, value)] for tag, value in values.items()}
        htmls.append(page({}, NO_VERDICT, scalars | others, tmp_path))
    assert htmls[0] == htmls[1]
    titles = "Loss; Norm of the gradient; Learning rate; Images per second; Peak memory, GiB"
    assert "; ".join(re.findall("<h3>(.+?)</h3>", htmls[0])) == titles
    assert "nan" not in htmls[0]
    assert htmls[0].count('<svg class="key"') == 2  # both norms; the learning rates are one line


# scripts/report.py.


@pytest.fixture
def old_run(tmp_path) -> Path:
    """The --out of a run without record.json, with a log beside it."""
    out = tmp_path / "out"
    full_record(out, "x")
    for step in (80, 160):
        header = {
            "sdxl_lora.step": str(step),
            "sdxl_lora.config": json.dumps({"model": "demo", "bs": 3, "steps": 240, "rank": 4}),
        }
        header |= {"sdxl_lora.prompts": json.dumps([{"text": "a man"}]), "ss_num_train_images": "47"}
        save_file({"a": torch.zeros(1)}, out / f"pytorch_lora_weights_{step}.safetensors", header)
    (out / "foreign.safetensors").write_bytes(b"no LoRA")
    write_log(tmp_path / "log", {"loss": [(10, 0.5), (20, 0.25)]})
    return out


def test_the_page_of_a_run_without_a_record(script, old_run):
    printed, _ = script("scripts/report.py", old_run)
    assert "no log was found" in printed
    assert "<h3>Loss</h3>" not in (old_run / "report.html").read_text()
    script("scripts/report.py", old_run, "--log-dir", old_run.parent / "log")
    html = (old_run / "report.html").read_text()
    text = " ".join(Elements(html).text.split())
    for words in (
        "160 of 240 steps",
        "10.2 looks",
        "base without a LoRA step 80 step 160",
        "a man seed 0",
        "prompt 2",
        "Loss",
        "rank 4",
    ):
        assert words in text, words
    assert html.count('class="open"') == 6


def test_a_record_goes_before_the_files(script, old_run):
    record = full_record(old_run / "again", "recorded")
    record["run"]["log_dir"] = str(old_run.parent / "log")
    (old_run / "again/record.json").write_text(json.dumps(record))
    script("scripts/report.py", old_run / "again")
    html = (old_run / "again/report.html").read_text()
    assert "prompt recorded" in html
    assert "<h3>Loss</h3>" in html


def test_mistakes_are_one_line(script, old_run):
    _, told = script("scripts/report.py", old_run / "samples", status=2)
    assert "name the --out of a run" in told
    _, told = script("scripts/report.py", old_run, "--log-dir", old_run, status=2)
    assert told.startswith("report.py: --log-dir")
    assert told.count("\n") == 1


# In a browser.


def browse(html: str, folder: Path) -> tuple[str, list[str], set[str]]:
    """(the page as the browser has built it, what it complained of, the addresses that it asked for beside the page's own)."""
    if not BROWSER:
        assert os.environ.get("SDXL_LORA_BROWSER") != "required", "no chromium: apt-get install chromium"
        pytest.skip("no chromium here")
    (folder / "page.html").write_text(html)
    address, log = (folder / "page.html").as_uri(), folder / "net.json"
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking", "disable-sync"]
    flags += ["host-resolver-rules=MAP * ~NOTFOUND", f"user-data-dir={folder / 'profile'}", "enable-logging=stderr", "v=0"]
    command = [str(BROWSER), *(f"--{flag}" for flag in flags), f"--log-net-log={log}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}  # that is itself
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked - {address}


@pytest.mark.parametrize("kind", ["full", "begun", "empty"])
def test_a_browser_has_nothing_to_complain_of(tmp_path, kind):
    html = pages(tmp_path / "out")[kind]
    dom, complaints, asked = browse(html, tmp_path)
    assert Elements(dom).text.split() == Elements(html).text.split()
    assert not complaints
    assert not asked


def test_a_browser_would_tell(tmp_path):
    html = page({}, NO_VERDICT, {}, tmp_path)
    planted = html.replace("</body>", '<script>console.error("ran")</script><img src="http://127.0.0.1:9/x.png"></body>')
    _, complaints, _ = browse(planted, tmp_path)
    assert len(complaints) == 2  # the policy of the page lets neither happen
    assert not [line for line in complaints if '"ran"' in line]
    unguarded = re.sub("<meta http-equiv.*", "", planted)
    (tmp_path / "unguarded").mkdir()
    _, complaints, asked = browse(unguarded, tmp_path / "unguarded")
    assert [line for line in complaints if '"ran"' in line]
    assert asked == {"http://127.0.0.1:9/x.png"}
