"""The record of a run, OUT/record.json: what was measured in it, from which the verdict and the page are made."""

import json
from base64 import b64decode, b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from common.errors import UserError
from common.files import write_atomically
from evaluation.validation import Losses, Probe

RECORD_PARTS = ("run", "losses", "pictures", "files", "extras", "thumbs", "probes")
RECORD_FILE, PAGE_FILE = "record.json", "report.html"
STAMP_SIDE = 160  # pixels


def read_record(out: Path) -> dict[str, Any]:
    """{} if there is none. Raises UserError if it cannot be read."""
    path = out / RECORD_FILE
    try:
        record = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it; report.py makes a page of what else is there") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(part, {}), dict) for part in RECORD_PARTS):
        raise UserError(f"{path} is no record of a run: remove it")
    return record


def write_record(out: Path, record: dict[str, Any]) -> None:
    """A name that is no UTF-8 is written as JSON's own escapes."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_atomically(out / RECORD_FILE, text.encode(errors="backslashreplace"))


def forget_after(record: dict[str, Any], step: int) -> None:
    """Removes what was measured after `step`, from which a run goes on."""
    for name in ("losses", "pictures", "files"):
        kept = {key: value for key, value in record.get(name, {}).items() if key == "base" or int(key) <= step}
        record[name] = kept


def described(probes: list[Probe]) -> list[dict[str, Any]]:
    """What identifies probes: a record's losses are of these."""
    return [{"name": probe.name, "caption": probe.caption, "timesteps": probe.timesteps} for probe in probes]


def rounded(losses: Losses) -> Losses:
    """To nine significant digits, more than float32 has: the file stays readable."""
    return [[float(f"{loss:.9g}") for loss in of_image] for of_image in losses]


def thumbnail(image: Image.Image) -> str:
    """A small JPEG in base64."""
    small, buffer = image.convert("RGB"), BytesIO()
    small.thumbnail((STAMP_SIDE, STAMP_SIDE), Image.Resampling.LANCZOS)
    small.save(buffer, "JPEG", quality=80)
    return b64encode(buffer.getvalue()).decode()


def picture(thumbnail: str) -> Image.Image:
    """The picture of a `thumbnail`."""
    return Image.open(BytesIO(b64decode(thumbnail)))
