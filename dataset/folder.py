"""What every file under a folder is: here alone it is decided which are images, and which are refused or passed over."""

import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath

from common.errors import UserError, printable
from common.text import read_text
from dataset.captions import BESIDE, CAPTION_KEYS, caption_lines
from dataset.images import IMAGE_SUFFIXES, UNREAD
from options.training import CaptionFilesConfig

SYSTEM_FILES = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
                "ehthumbs.db", "desktop.ini")  # fmt: skip
OWN_FILES = ("index.jsonl", ".source", ".lock")  # that make_shards.py writes beside shards
SPLITS = "train|training|validation|valid|val|dev|test|testing|eval|evaluation"  # those of load_dataset
SPLIT = re.compile(rf"(?:^|[^a-z])({SPLITS})(?=[^a-z]|$)")
REPEATS = re.compile(r"([1-9]\d{0,2})_(.+)")  # a folder of kohya's: 10_name; not 01_name, nor 2026_name
METADATA = ("metadata.jsonl", "metadata.csv")


def suffix_of(name: str) -> str:
    """'jpg' for a.b.JPG, '' without an extension."""
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def is_hidden(path: PurePosixPath | Path) -> bool:
    """Whether it, or a folder that it is in, begins with a dot or is what a system leaves behind."""
    return any(part.startswith(".") or part.lower() in SYSTEM_FILES for part in path.parts)


def files_under(folder: Path) -> tuple[list[Path], list[str]]:
    """(all that is no folder, sorted; folders that cannot be read, with the reason). Links are followed; a folder that can be
    reached in several ways is read once, and not by a link if it can be helped: no loop is endless.
    """
    folders, seen = [folder], set()
    links: list[Path] = []
    files: list[Path] = []
    unread: list[str] = []
    while folders or links:
        here = (folders or links).pop()
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        try:
            for entry in os.scandir(here):
                is_folder = os.path.isdir(entry)  # entry.is_dir() raises in a loop of links
                kind = (links if entry.is_symlink() else folders) if is_folder else files
                kind.append(Path(entry.path))
        except OSError as error:
            unread.append(f"{printable(str(here))} ({error.strerror})")
    return sorted(files), unread


class Names:
    """Files by name, through whichever link, in whatever Unicode normal form, and whatever the case of the extension."""

    def __init__(self, files: Iterable[Path]):
        self.exact = set(files)
        self.normal = {normal_form(path): path for path in self.exact}

    def find(self, path: Path) -> Path | None:
        return path if path in self.exact else self.normal.get(normal_form(path))

    def find_in(self, folder: Path, name: str) -> Path | None:
        """The file of this name, from the folder or absolute, also with backslashes. None if it is not among the files."""
        with suppress(ValueError):  # a NUL, or half of a surrogate pair
            return self.find(folder / name) or self.find(folder / name.replace("\\", "/"))
        return None


real = lru_cache(os.path.realpath)


def normal_form(path: Path) -> str:
    return unicodedata.normalize("NFC", f"{real(path.parent)}/{path.stem}{path.suffix.lower()}")


class Folder:
    """The files under a folder by what they are; a single parquet file is a table. The lists, `refused` and `others` hold each
    file once. Raises UserError for a metadata.jsonl that cannot be read.
    """

    def __init__(self, path: Path, texts: CaptionFilesConfig = BESIDE):
        self.path, self.config = path, texts
        self.images: list[Path] = []
        self.texts: list[Path] = []
        self.tables, self.shards = [path] if suffix_of(path.name) == "parquet" and path.is_file() else [], []
        self.others: Counter[str] = Counter()  # {what they are: number} of files that are counted only
        self.captions: dict[Path, list[str]] = defaultdict(list)  # of images, by metadata.jsonl
        files, self.refused = files_under(path) if path.is_dir() else ([], [])  # the rest of `refused`: names with the reason
        files = [file for file in files if file.name not in OWN_FILES]
        visible = [file for file in files if not is_hidden(file.relative_to(path))]
        self.others["hidden"], self.names = len(files) - len(visible), Names(visible)
        self.shards = [file for file in visible if suffix_of(file.name) == "tar" and file.parent == path]
        if not self.shards and not any(suffix_of(file.name) == "parquet" for file in visible):
            for file in visible:
                if file.name.lower() in METADATA and file.is_file():
                    self.read_metadata(file)
        for file in visible:
            self.sort(file)
        if self.shards or self.tables:
            for image in self.images:
                self.refuse(image, "an image beside shards or a .parquet: put images into a folder of their own")
            self.others["texts beside them"] += len(self.texts)
            self.images, self.texts = [], []

    def sort(self, file: Path) -> None:
        suffix, name = suffix_of(file.name), file.relative_to(self.path).as_posix().lower()
        if not file.is_file():
            self.refuse(file, "no plain file" if file.exists() else "a link to nothing")
        elif suffix in IMAGE_SUFFIXES:
            self.images.append(file)
        elif file.name.lower() in METADATA:
            self.others[file.name.lower()] += 1
        elif suffix in UNREAD:
            self.refuse(file, UNREAD[suffix])
        elif file in self.captions:  # by metadata.jsonl, whatever its extension
            self.images.append(file)
        elif suffix == "tar" and file.parent != self.path:
            self.refuse(file, f"shards are read from one folder: give {file.parent}")
        elif suffix == "parquet" and not self.shards:
            if (SPLIT.findall(name) or ["train"])[-1].startswith("train"):
                self.tables.append(file)
            else:
                self.others[".parquet of another split than train"] += 1
        elif suffix in self.config.extensions:
            self.texts.append(file)
        elif suffix != "tar":
            self.others[f".{suffix}" if suffix else "without an extension"] += 1

    def refuse(self, file: Path, reason: str) -> None:
        self.refused.append(f"{printable(str(file))} ({reason})")

    def read_metadata(self, metadata: Path) -> None:
        """Rows of file_name and text (Hugging Face imagefolder). Several rows of an image are all captions of it."""
        try:
            text = read_text(metadata.read_bytes())
        except ValueError as error:
            raise UserError(f"{metadata} is {error}") from None
        rows = csv_rows(metadata, text) if suffix_of(metadata.name) == "csv" else json_rows(text)
        for number, row in rows:
            where = f"{metadata} line {number}"
            try:
                row = row if isinstance(row, dict) else json.loads(row)
                name = os.fspath(row["file_name"])
                texts = row[next((key for key in CAPTION_KEYS if key in row), "text")]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{where}: needs file_name and text of one image ({error})") from None
            try:
                if file := self.names.find_in(metadata.parent, name):
                    self.captions[file] += caption_lines(texts)
                else:
                    self.refused.append(printable(f"{where}: {name} (is not in the folder, or is hidden)"))
            except ValueError as error:
                self.refused.append(printable(f"{where}: {name} ({error})"))

    def repeats(self) -> dict[str, tuple[int, str]]:
        """{name of a folder: (repeats of its images in an epoch, caption of those without one)} of kohya's folders, 10_name."""
        names = {image.relative_to(self.path).parts[0] for image in self.images if image.parent != self.path}
        found = {name: REPEATS.fullmatch(name) for name in sorted(names)}
        return {name: (int(match[1]), match[2]) for name, match in found.items() if match}


def json_rows(text: str) -> Iterator[tuple[int, str]]:
    """(line number, JSON). splitlines() would also split at U+2028 in a text."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def csv_rows(metadata: Path, text: str) -> Iterator[tuple[int, dict]]:
    """(line number, row), with the separator that its first line has: programs of many countries write semicolons.

    Raises UserError for what is no CSV, and for a row of more fields than the first: a text with a comma and without quotes.
    """
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{metadata}, line {reader.line_num} or before: {error}: is a quotation mark left open?") from None
        if None in row:
            marks = f"put a text with {reader.reader.dialect.delimiter!r} into quotation marks"
            raise UserError(f"{metadata} line {reader.line_num}: more fields than its first line has: {marks}")
        yield reader.line_num, row
