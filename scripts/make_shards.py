"""Packs captioned images into tar shards (WebDataset): key.jpg, key.txt, key.json.

    python scripts/make_shards.py photos/ --out shards/                                       name.jpg + name.txt
    python scripts/make_shards.py imagefolder/ --out shards/                                  metadata.jsonl
    python scripts/make_shards.py train.parquet --out shards/                                 image {bytes, path}, text
    python scripts/make_shards.py lambdalabs/naruto-blip-captions --out shards/ --name naruto from the hub

JPEG, PNG and WebP go in byte for byte; other formats, from parquet, are stored as JPEG. What cannot be decoded or has no
caption is refused and named at the end.
"""

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoint import check_writable
from errors import UserError, one_line_errors
from images import to_rgb
from shards import write_shards
from sources import scan_folder

SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardConfig:
    source: Annotated[str, tyro.conf.Positional]
    """A folder of captioned images, a parquet file or a folder of them, or the hub id of such a data set."""
    out: Path
    """Folder for the shards."""
    name: str = "shard"
    """Shards are called name-000000.tar, name-000001.tar, …"""
    per_shard: int = 500
    """Images in a shard."""

    def __post_init__(self) -> None:
        if self.per_shard < 1:
            raise UserError(f"--per-shard must be at least 1, not {self.per_shard}")
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be a plain file name")


def open_rows(source: str) -> tuple[int, Iterator[tuple[str, bytes, list[str]]]]:
    """(number of rows, iterator of (source name, encoded image, captions)). Raises UserError if there is nothing."""
    path = Path(source)
    if not path.exists():
        path = fetch(source)
    tables = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if tables:
        return parquet_rows(tables)
    folder = scan_folder(path)
    files = [file.path for file in folder.files]
    rows = [*zip(files, folder.captions, strict=True), *((Path(name), []) for name in folder.uncaptioned)]
    return len(rows), ((str(file.relative_to(path)), file.read_bytes(), captions) for file, captions in rows)


def fetch(repository: str) -> Path:
    """The parquet files of a data set on the hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # every kind of network and name trouble ends in the same advice
        raise UserError(
            f"{repository} is neither a folder or file here nor could it be fetched from the hub ({type(error).__name__}); "
            f"where there is network: hf download {repository} --repo-type dataset --local-dir FOLDER"
        ) from None


def parquet_rows(tables: list[Path]) -> tuple[int, Iterator[tuple[str, bytes, list[str]]]]:
    """Rows of the layout of lambdalabs/naruto-blip-captions: image {bytes, path}, text."""
    import pyarrow
    import pyarrow.parquet

    try:
        files = [pyarrow.parquet.ParquetFile(table) for table in tables]
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{tables[0]} is no readable parquet file: {error}") from None
    for table, file in zip(tables, files, strict=True):
        if not {"image", "text"} <= set(file.schema_arrow.names):
            raise UserError(f"{table} has columns {file.schema_arrow.names}, not image and text")

    def rows() -> Iterator[tuple[str, bytes, list[str]]]:
        for table, file in zip(tables, files, strict=True):
            batches = file.iter_batches(batch_size=16, columns=["image", "text"])
            for n, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                image = row["image"] if isinstance(row["image"], dict) else {"bytes": row["image"]}
                text = row["text"] or []
                captions = [text] if isinstance(text, str) else text
                yield image.get("path") or f"{table.name}:{n}", image.get("bytes") or b"", captions

    return sum(file.metadata.num_rows for file in files), rows()


def pack(name: str, encoded: bytes, captions: list[str]) -> dict:
    """One sample without its key. Raises ValueError, saying what is wrong, if it is not usable."""
    lines = [" ".join(caption.split()) for caption in captions if caption.strip()]
    if not lines:
        raise ValueError("no caption")
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except Exception as error:  # whatever a broken file makes Pillow raise
        raise ValueError(f"cannot be decoded: {error}") from None
    if image.format not in SUFFIX:
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, "JPEG", quality=95, subsampling=0)
        encoded = buffer.getvalue()
    upright = ImageOps.exif_transpose(image)
    about = {"width": upright.width, "height": upright.height, "source": name, "sha256": hashlib.sha256(encoded).hexdigest()}
    return {SUFFIX.get(image.format, "jpg"): encoded, "txt": "\n".join(lines), "json": json.dumps(about)}


def usable(rows: Iterator[tuple[str, bytes, list[str]]], refused: list[str]) -> Iterator[dict]:
    """Samples; what is not usable goes to `refused`, with the reason."""
    for name, encoded, captions in rows:
        try:
            yield pack(name, encoded, captions)
        except ValueError as error:
            refused.append(f"{name} ({error})")


def main(config: ShardConfig) -> None:
    total, rows = open_rows(config.source)
    check_writable("--out", config.out)
    refused: list[str] = []
    samples = usable(tqdm(rows, total=total, unit="img"), refused)
    shards = write_shards(config.out, config.name, samples, config.per_shard)

    print(f"kept {total - len(refused)} images in {shards} shards in {config.out}/, refused {len(refused)}")
    for line in refused:
        print(f"  refused {line}")
    if not shards:
        raise UserError(f"{config.source}: no usable image with a caption")


if __name__ == "__main__":
    with one_line_errors("make_shards.py"):
        main(tyro.cli(ShardConfig))
