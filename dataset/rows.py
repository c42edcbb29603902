"""Captioned images as rows that are packed into shards: the interface, and the rows of parquet files."""

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

from common.errors import UserError
from dataset.folder import Names, files_under

Row = tuple[str, bytes | str, list[str]]  # name, encoded image or why there is none, captions; empty where they cannot be read


class Inputs(Protocol):
    def __len__(self) -> int: ...

    def identity(self, first: int, last: int) -> list:
        """JSON values that change if the inputs first … last - 1 are replaced by others: names, sizes, times."""

    def name(self, n: int) -> str: ...

    def repeats(self, first: int, last: int) -> list[int]:
        """How often an epoch draws each of these inputs; empty: each of them once."""

    def rows(self, first: int, last: int) -> Iterator[Row]: ...


class ParquetRows:
    """Rows of the columns image {bytes, path} and text, as in lambdalabs/naruto-blip-captions. Raises UserError for others."""

    def __init__(self, tables: list[Path]):
        import pyarrow  # here, as the import is slow
        from pyarrow.parquet import read_metadata

        self.tables, self.begins = tables, [0]
        for table in tables:
            try:
                metadata = read_metadata(table)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{table} is no readable parquet file: {error}") from None
            columns = metadata.schema.to_arrow_schema().names
            if not {"image", "text"} <= set(columns):
                raise UserError(f"{table} has columns {columns}, not image and text")
            self.begins.append(self.begins[-1] + metadata.num_rows)

    def __len__(self) -> int:
        return self.begins[-1]

    def parts(self, first: int, last: int) -> Iterator[tuple[Path, int, int]]:
        """(table, first row, end row) of every table that holds some of these inputs."""
        for table, (begin, end) in zip(self.tables, pairwise(self.begins), strict=True):
            if first < end and begin < last:
                yield table, max(first, begin) - begin, min(last, end) - begin

    def identity(self, first: int, last: int) -> list:
        parts = [(table.name, table.stat(), begin, end) for table, begin, end in self.parts(first, last)]
        return [(name, stat.st_size, stat.st_mtime_ns, begin, end) for name, stat, begin, end in parts]

    def name(self, n: int) -> str:
        ((table, row, _),) = self.parts(n, n + 1)
        return f"{table.name}:{row}"

    def repeats(self, first: int, last: int) -> list[int]:
        return []

    def rows(self, first: int, last: int) -> Iterator[Row]:
        for part in self.parts(first, last):
            yield from read_rows(*part)


def read_rows(table: Path, first: int, last: int) -> Iterator[Row]:
    """Rows first … last - 1, one at a time: memory then holds a page (pyarrow writes 1,024 rows to one), not a row group,
    which may be the whole file. A row that cannot be read is empty.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with ParquetFile(table, pre_buffer=False, buffer_size=2**20) as file:
        end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            wanted = range(max(first, begin), min(last, end))
            if not wanted:
                continue
            batches = file.iter_batches(batch_size=1, row_groups=[group], columns=["image", "text"], use_threads=False)
            batches = islice(batches, wanted.start - begin, None)
            for n in wanted:
                row: dict[str, Any] = {"image": None, "text": None}
                with suppress(pyarrow.ArrowException, OSError, ValueError, StopIteration):  # damage empties the rest of a group
                    row = next(batches).to_pylist()[0]
                texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
                captions = [text for text in texts if isinstance(text, str)]
                name, encoded = encoded_image(row["image"], table.parent)
                yield name or f"{table.name}:{n}", encoded, captions


def encoded_image(cell: object, folder: Path) -> tuple[str, bytes | str]:
    """A cell of the column image -> (its name or '', the encoded image or why there is none; b"" where nothing could be read).

    It holds bytes, a path from the table's folder, a struct of both, or a list of one of these.
    """
    if isinstance(cell, list) and len(cell) == 1:
        cell = cell[0]
    name, encoded = (cell.get("path"), cell.get("bytes")) if isinstance(cell, dict) else ("", cell)
    encoded = (name or None) if encoded is None else encoded
    if encoded is None or isinstance(encoded, bytes):
        return name or "", encoded or b""
    if not isinstance(encoded, str):
        return name or "", "the column image holds no encoded image: bytes, or a struct of bytes and path"
    if not (path := names_under(folder).find_in(folder, encoded)):
        return "", f"the column image holds a path, and no such file is in {folder}/: {encoded[:80]}"
    try:
        return encoded, path.read_bytes()
    except OSError as error:
        return encoded, str(error)


@lru_cache
def names_under(folder: Path) -> Names:
    return Names(files_under(folder)[0])
