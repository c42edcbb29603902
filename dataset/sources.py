"""Data sets of captioned images, in tar shards, local or remote, or in a plain folder: listed once, then read one by one."""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]  # not in its stub

from common.errors import UserError, printable
from common.files import ROOT
from common.progress import tqdm
from dataset.captions import BESIDE, caption_of_name
from dataset.columns import PLACE, Columns, columns_of
from dataset.disk_cache import Cache
from dataset.folder import REPEATS, Folder, Names
from dataset.images import IMAGE_SUFFIXES, MOST_BYTES, survey_size
from dataset.index import Index, fingerprint_of, index_in, index_of
from dataset.packing import NO_CAPTION, pack_tables
from dataset.remote import HTTP, RemoteFile, Span, remote_shards, scheme_of
from dataset.shards import MOST_TEXT, Shard, read_from, split_captions, survey, unfinished
from options.training import CaptionFilesConfig

DEMO = ROOT / "assets/demo/train"
HELD_OUT = ROOT / "assets/demo/heldout"  # of the demo, never trained on

HUB_ID = r"[\w.-]+/[\w-]+"


@dataclass(frozen=True)
class File:
    """A local file; `remote.RemoteFile` is its counterpart on a server."""

    path: Path

    def read(self, *spans: Span) -> list[bytes]:
        """The bytes of each span, fewer or none where the file ends too early. Raises OSError."""
        parts = []
        with self.path.open("rb") as file:
            for at, size in spans:
                file.seek(at)
                parts.append(file.read(size))
        return parts


@dataclass
class EncodedSample:
    name: str
    image: bytes
    captions: list[str]
    of_prior: bool = False  # from --prior-data


@dataclass(frozen=True)
class Part:
    """Consecutive samples of an index or of a folder of images. To cut a part or to join several copies nothing."""

    columns: Columns
    rows: range  # of `columns`, in which an image that cannot be read has a height and width of 0
    files: Mapping[int, File | RemoteFile] | Sequence[File]  # by the "file" of a place
    labels: Sequence[str] = ()  # names of shards, by the same
    captions: Sequence[list[str]] = ()  # of each of the `columns` of a folder; those of shards are read with the images

    def names(self, rows: range) -> list[str]:
        """What messages call these samples of `columns`."""
        keys, numbers = self.columns.names(rows), self.columns.places["file"][rows.start : rows.stop].tolist()
        if self.labels:
            keys = [f"{self.labels[number]}:{key}" for number, key in zip(numbers, keys, strict=True)]
        return list(map(printable, keys))


@dataclass
class Source:
    """A data set: `parts` hold its samples, which are numbered from 0.

    `fingerprint` is a SHA-256 of the names and sizes of the samples, without their bytes; LoRA files record it.
    """

    parts: list[Part]
    uncaptioned: list[str]  # names of images without a caption
    fingerprint: str
    refused: list[str] = field(default_factory=list)  # other files and images that are not used, with the reason
    others: Counter[str] = field(default_factory=Counter)  # {what they are: number} of files that are no images, or passed over
    note: str = ""  # what else the user should know
    truncated: tuple[str, ...] = ()  # names of shards whose file ends too early
    has_latents: bool = False  # cached latents instead of images: the VAE is not needed
    has_mirrored: bool = False  # every sample also has latents of the mirrored image
    has_masks: bool = False  # every sample of latents has a loss mask
    vae_signature: tuple[float, ...] = ()  # `model.vae.vae_signature` of the VAE that made the latents, if known
    text_signature: tuple[float, ...] = ()  # signature of the text encoders, if their hidden states are cached too
    part: np.ndarray | None = None  # [N] number of the data set in a mixture
    shares: tuple[float, ...] = ()  # of each data set in the draws of an epoch; they add up to 1
    repeats: np.ndarray | None = None  # [N] how often an epoch draws each sample; None: once
    kept_out: int = 0  # samples that `without` has taken away
    prior: int = 0  # of the samples, the last ones: those of --prior-data
    draws: float | None = None  # of an epoch, if there is a prior: the others are then drawn as often as without it

    @cached_property
    def ends(self) -> list[int]:
        """For each of the parts, the number after its last sample."""
        return list(accumulate(len(part.rows) for part in self.parts))

    @property
    def samples(self) -> int:
        return self.ends[-1] if self.parts else 0

    def between(self, first: int, last: int) -> list[Part]:
        """The samples `first` to `last` - 1."""
        begins = [0, *self.ends]
        cut = [part.rows[max(0, first - begin) : max(0, last - begin)] for part, begin in zip(self.parts, begins, strict=False)]
        return [replace(part, rows=rows) for part, rows in zip(self.parts, cut, strict=True) if rows]

    def column(self, name: str) -> np.ndarray:
        """[N] one field of PLACE. The "file" is that of the sample's part."""
        found = [part.columns.places[name][part.rows.start : part.rows.stop] for part in self.parts]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, PLACE[name]), *found])

    def find(self, n: int) -> tuple[Part, int]:
        """(the part of sample n, its row in the columns)."""
        i = bisect_right(self.ends, n)
        part = self.parts[i]
        return part, part.rows[n - self.ends[i]]  # counted from its end

    def name(self, n: int) -> str:
        part, row = self.find(n)
        return part.names(range(row, row + 1))[0]

    @property
    def names(self) -> list[str]:
        """Of all samples: a hundred bytes for each, made anew every time."""
        return [name for part in self.parts for name in part.names(part.rows)]

    @property
    def epoch(self) -> float:
        """Draws of an epoch, which is one look at each picture, but for repeats: a whole number if there is no prior."""
        once = self.samples if self.repeats is None else int(self.repeats.sum())
        return once if self.draws is None else self.draws

    def repeats_of(self, first: int, last: int) -> list[int]:
        """How often an epoch draws each of these samples; empty: each of them once."""
        times = [] if self.repeats is None else self.repeats[first:last].tolist()
        return times if any(n != 1 for n in times) else []

    def identity(self) -> str:
        """What decides which samples are drawn when, in a few words."""
        shares = " ".join(f"{share:.3g}" for share in self.shares)
        shares = f", {round(self.epoch)} draws an epoch at {shares}" if shares else ""
        kept_out = f", {self.kept_out} kept out" if self.kept_out else ""
        return f"files {self.fingerprint[:8]}{kept_out}{shares}"

    def without(self, numbers: Collection[int]) -> "Source":
        """The other samples: `numbers` are kept out of training. Of each data set of a mixture one must be left."""
        removed = sorted({*numbers})
        bounds = zip([0, *(n + 1 for n in removed)], [*removed, self.samples], strict=True)
        parts = [part for first, last in bounds for part in self.between(first, last)]
        part, repeats = (of_each if of_each is None else np.delete(of_each, removed) for of_each in (self.part, self.repeats))
        shares = self.shares
        if part is not None and repeats is not None:
            draws = np.bincount(part, repeats)
            shares = tuple((draws / draws.sum()).tolist())
        return replace(self, parts=parts, part=part, repeats=repeats, shares=shares, kept_out=len(removed))

    def account(self) -> str:
        """What became of all that is there, in one line."""
        unreadable, others = np.count_nonzero(self.column("height") == 0), describe_others(self.others)
        captioned = f"{self.samples} images with a caption" + f" ({self.prior} of --prior-data)" * bool(self.prior)
        broken = f" ({unreadable} cannot be read: training skips them)" if unreadable else ""
        counts = f"{captioned}{broken}, {len(self.uncaptioned)} without, {len(self.refused)} refused"
        return f"{counts}; beside them {others}" if others else counts

    def left_out(self, most: int = 20) -> list[str]:
        """Lines of text: what is refused and why, the first `most` of it, and `note`."""
        more = [f"and {len(self.refused) - most} more"] * (len(self.refused) > most)
        return [f"refused {line}" for line in self.refused[:most]] + more + [self.note] * bool(self.note)

    def local_captions(self, most: int) -> Iterator[str]:
        """The captions of the first `most` samples; none if they are on a server."""
        for n in range(min(most, self.samples)):
            part, row = self.find(n)
            number, _, _, text_at, text_size, *_ = part.columns.places[row].item()
            file = part.files[number]
            if part.captions:
                yield from part.captions[row]
            elif isinstance(file, File):
                with suppress(OSError, ValueError):
                    (text,) = file.read((text_at, text_size))
                    yield from split_captions(text)

    def read_sample(self, n: int) -> EncodedSample:
        """Sample n, still encoded. If a local file or its caption cannot be read its image is empty, and is skipped like a
        broken one.

        Raises UserError if a server fails after all tries.
        """
        part, row = self.find(n)
        number, at, size, text_at, text_size, *_ = part.columns.places[row].item()
        captions = part.captions[row] if part.captions else []
        try:
            image, *text = part.files[number].read((at, size), *([] if captions else [(text_at, text_size)]))
            captions = captions or [line for encoded in text for line in split_captions(encoded)]
        except (OSError, ValueError):
            image = b""
        return EncodedSample(self.name(n), image, captions or [""], of_prior=n >= self.samples - self.prior)


def describe_others(others: Counter[str]) -> str:
    return printable(", ".join(f"{number} {kind}" for kind, number in sorted(others.items()) if number))


def open_mixture(data: tuple[str, ...], cache: Cache | None = None, captions: CaptionFilesConfig = BESIDE) -> Source:
    """The values of all --data -> one source. With weights ('a/:3' 'b/:1') three samples of a/ are drawn for each of b/,
    whatever their sizes; without weights each sample is drawn once per epoch, or as often as 'a/:x3' and kohya's names of
    folders say.

    Raises UserError as `open_source`, and for invalid weights or a mixture of images and latents.
    """
    asked = [split_weight(value) for value in data or ("demo",)]
    weights = [weight for _, weight, _ in asked if weight is not None]
    if weights and len(weights) < len(asked):
        raise UserError(f"{' '.join(data)}: give all of them a weight (:3 at the end), or none")
    sources = [open_source(name, cache, captions) for name, *_ in asked]
    whole = sources[0]
    if len(sources) > 1:
        whole = joined([name for name, *_ in asked], sources, joint_fingerprint(sources))
    if captions != BESIDE and not any(part.captions for part in whole.parts):
        raise UserError("--caption, --caption-from-name and --caption-extension do nothing here: shards hold their captions")
    if not weights and all(times == 1 and s.repeats is None for (*_, times), s in zip(asked, sources, strict=True)):
        return whole
    own = [np.ones(s.samples, int) if s.repeats is None else s.repeats.astype(int) for s in sources]
    repeats = np.concatenate([times * of_source for (*_, times), of_source in zip(asked, own, strict=True)])
    if not weights and (repeats == 1).all():
        return whole
    of_set, most = np.repeat(range(len(sources)), [source.samples for source in sources]), int(repeats.max()) + 1
    numbers, part, sizes = np.unique(of_set * most + repeats, return_inverse=True, return_counts=True)
    groups, part = np.divmod(numbers, most), part.astype(np.min_scalar_type(len(numbers)))
    draws = groups[1] * sizes  # of each group, which has the samples of one data set that are repeated alike
    if weights:  # then the repeats count among the samples of a data set
        shares = np.array(weights)[groups[0]] / sum(weights) * draws / np.bincount(groups[0], draws)[groups[0]]
        return replace(whole, part=part, shares=tuple(shares.tolist()))
    return replace(whole, part=part, shares=tuple((draws / draws.sum()).tolist()), repeats=repeats)


def joint_fingerprint(sources: Iterable[Source]) -> str:
    return hashlib.sha256(" ".join(source.fingerprint for source in sources).encode()).hexdigest()


def with_prior(training: Source, prior: Source, share: float) -> Source:
    """One source, of whose draws `share` are from `prior`; an epoch is still one look at each sample of `training`.

    Raises UserError as `joined`.
    """
    both = training, prior
    whole = joined(["--data", "--prior-data"], both, joint_fingerprint(both))
    part: list[np.ndarray] = []
    shares: list[float] = []
    for source, of_draws in zip(both, (1 - share, share), strict=True):
        own = np.zeros(source.samples, int) if source.part is None else source.part.astype(int)
        part.append(own + len(shares))
        shares += [of_draws * own_share for own_share in source.shares or (1.0,)]
    numbers = np.concatenate(part).astype(np.min_scalar_type(len(shares)))
    whole = replace(whole, kept_out=training.kept_out, prior=prior.samples, draws=training.epoch / (1 - share))
    return replace(whole, part=numbers, shares=tuple(shares))


def joined(labels: Sequence[str], sources: Sequence[Source], fingerprint: str) -> Source:
    """One source of several. Raises UserError for both images and latents, or for latents that several models made."""
    full = [(label, source) for label, source in zip(labels, sources, strict=True) if source.samples]
    by_kind = {source.has_latents: label for label, source in full}
    if len(by_kind) > 1:
        raise UserError(f"{by_kind[False]} and {by_kind[True]} hold both images and latents: train on one kind")
    by_model = {(source.vae_signature, source.text_signature): label for label, source in full}
    if len(by_model) > 1:
        names = " and ".join(list(by_model.values())[:2])
        raise UserError(f"the latents of {names} were made by several models: make them anew with scripts/cache_latents.py")

    def all_of(field: str) -> list:
        return [item for source in sources for item in getattr(source, field)]

    return Source(
        parts=merged(all_of("parts")),
        uncaptioned=all_of("uncaptioned"),
        fingerprint=fingerprint,
        refused=all_of("refused"),
        others=sum((source.others for source in sources), Counter()),
        note=" ".join(filter(None, (source.note for source in sources))),
        truncated=tuple(all_of("truncated")),
        has_latents=True in by_kind,
        has_mirrored=bool(full) and all(source.has_mirrored for _, source in full),
        has_masks=bool(full) and all(source.has_masks for _, source in full),
        vae_signature=full[0][1].vae_signature if full else (),
        text_signature=full[0][1].text_signature if full else (),
    )


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same samples in as few parts as can be."""
    found: list[Part] = []
    for part in parts:
        if found and found[-1].files is part.files and found[-1].rows.stop == part.rows.start:
            part = replace(part, rows=range(found.pop().rows.start, part.rows.stop))
        found.append(part)
    return found


def split_weight(data: str) -> tuple[str, float | None, int]:
    """'shards/:3' -> ('shards/', 3.0, 1): its weight; 'shards/:x3' -> ('shards/', None, 3): its repeats. Without either
    ('shards/', None, 1). Raises UserError if one is 0, or as `scheme_of`.
    """
    scheme = scheme_of(data)
    name, colon, number = data.rpartition(":")
    port = scheme in HTTP and "/" not in name.partition("://")[2]
    found = re.fullmatch(r"(x?)([+-]?\d+\.?\d*(?:e[+-]?\d+)?|[+-]?inf|nan)", number, re.IGNORECASE)
    if not found or not colon or port or os.path.exists(data):
        return data, None, 1
    value = float(found[2])
    if not 0 < value < float("inf"):
        raise UserError(f"{data}: a weight must be above 0")
    if not found[1]:
        return name, value, 1
    if value % 1:
        raise UserError(f"{data}: repeats are a whole number")
    return name, None, int(value)


def open_source(data: str, cache: Cache | None = None, captions: CaptionFilesConfig = BESIDE) -> Source:
    """One value of --data -> its source, after reading the header of every file. Parquet files are packed into shards first.

    `cache` keeps what is loaded from a server. Raises UserError if nothing is there, a shard cannot be trusted or no image has
    a caption.
    """
    if not data:  # from an unset shell variable; Path("") would be the working directory
        raise UserError("the name of the data is empty")
    path = DEMO if data == "demo" else Path(data)
    try:
        if re.fullmatch(HUB_ID, data) and not path.exists():
            raise UserError(f"{data} does not exist; a data set of the hub: scripts/make_shards.py {data} --out shards/")
        source = of_shards(remote_shards(expand(data), cache)) if scheme_of(data) else open_folder(Folder(path, captions))
    except OSError as error:
        raise UserError(f"{data}: {error}") from None
    if not source.samples:
        raise UserError(f"{data}: no image with a caption there ({why_empty(source)})")
    return source


def open_folder(folder: Folder) -> Source:
    """The shards, images or parquet files of a folder, packed. Raises UserError and OSError as `open_source`."""
    if folder.tables:
        path, refused = pack_tables(folder.tables)
        source = open_folder(Folder(path))
        uncaptioned = [line.removesuffix(f" {NO_CAPTION}") for line in refused if line.endswith(NO_CAPTION)]
        refused = folder.refused + [line for line in refused if not line.endswith(NO_CAPTION)]
        return replace(source, uncaptioned=uncaptioned, refused=refused, others=folder.others)
    shards = local_shards(folder.path, folder.shards)
    if not shards:
        return scan_images(folder)
    source = of_shards(shards)
    return replace(source, refused=source.refused + folder.refused, others=source.others + folder.others)


def why_empty(source: Source) -> str:
    """Why no image of a source can be used, and what to do."""
    lacking = len(source.uncaptioned)
    advice = f"{lacking} have none: put name.txt beside name.jpg, or a metadata.jsonl with file_name and text"
    reasons = [advice] * bool(lacking) + source.left_out(3)
    return "; ".join(reasons) or f"no {', '.join(IMAGE_SUFFIXES)}; beside them {describe_others(source.others) or 'nothing'}"


def expand(pattern: str) -> list[str]:
    """'{0..2}.tar' -> ['0.tar', '1.tar', '2.tar']. Raises UserError if a brace is not closed."""
    try:
        return [pattern] if os.path.exists(pattern) else list(braceexpand(pattern, escape=False))
    except UnbalancedBracesError:
        raise UserError(f"{pattern}: a brace is not closed") from None


def local_shards(path: Path, found: Sequence[Path]) -> list[tuple[File, Index, str]]:
    """The tar files of a folder, `found` there, or of a brace pattern, with the contents of each; none for a folder of images.

    The contents are those in the index next to the file if it has the file's size, otherwise the file's headers are read.
    """
    tars = list(found) if path.is_dir() else [Path(name) for name in expand(str(path))]
    indexes = {folder: index_in(folder) for folder in {tar.parent for tar in tars}}
    if path.is_dir() and path in indexes:
        tars = sorted({*tars, *(path / name for name, (_, shard) in indexes[path].shards.items() if shard.bytes)})
    if any(map(unfinished, {*indexes, path})):
        raise UserError(f"{path}: the writing of these shards was interrupted: the same command goes on with it")
    if missing := [tar for tar in tars if not tar.is_file()]:
        raise UserError(f"{missing[0]} does not exist")
    shards = []
    for tar in tqdm(tars, desc="looking through the shards", unit="shard", delay=2, leave=False):
        index = indexes[tar.parent]
        if tar.name not in index.shards or index.shards[tar.name][1].bytes != tar.stat().st_size:
            index = index_of(survey(tar))
        shards.append((File(tar), index, tar.name))
    return shards


def of_shard(shard: Shard, part: Part) -> Source:
    def named(names: Iterable[str]) -> list[str]:
        return [printable(f"{shard.name}:{name}") for name in names]

    return Source(
        parts=[part] * bool(part.rows),
        uncaptioned=named(shard.uncaptioned),
        fingerprint="",
        refused=named(shard.unusable),
        others=Counter(shard.others),
        truncated=(printable(shard.name),) * shard.truncated,
        has_latents=shard.has_latents,
        has_mirrored=shard.has_mirrored,
        has_masks=shard.has_masks,
        vae_signature=tuple(shard.vae_signature),
        text_signature=tuple(shard.text_signature),
    )


def of_shards(found: Sequence[tuple[File | RemoteFile, Index, str]]) -> Source:
    """One source of several shards: (file, index that lists it, name there). Raises UserError as `joined`."""
    files: dict[int, dict[int, File | RemoteFile]] = defaultdict(dict)  # {id of the index: {number of a shard: its file}}
    sources, numbers = [], []
    for file, index, name in found:
        number, shard = index.shards[name]
        files[id(index)][number] = file
        part = Part(index.columns, index.columns.rows(number), files[id(index)], index.names)
        sources.append(of_shard(shard, part))
        numbers.append((index.columns, number))
    source = joined([name for *_, name in found], sources, "")
    all_of_one = len(source.parts) == 1 and source.samples == len(source.parts[0].columns.places)
    fingerprint = source.parts[0].columns.fingerprint if all_of_one else fingerprint_of(numbers)
    repeats = [part.columns.repeats[part.rows.start : part.rows.stop] for part in source.parts]
    if any(map(len, repeats)):
        pairs = zip(repeats, source.parts, strict=True)
        source.repeats = np.concatenate([times if len(times) else np.ones(len(part.rows), np.int16) for times, part in pairs])
    return replace(source, fingerprint=fingerprint)


def scan_images(folder: Folder) -> Source:
    """The images of a folder, with captions from a metadata.jsonl, name.txt or name.json, else from kohya's name of a folder,
    or as the options say. Images that cannot be read are included, with a height and width of 0.
    """
    files: list[Path] = []
    places, captions, uncaptioned, used, digest = [], [], [], set(), hashlib.sha256()
    refused, others = list(folder.refused), Counter(folder.others)
    kohya, repeats, stand_ins = folder.repeats(), [], Counter[str]()
    for path in tqdm(folder.images, desc="looking through the folder", unit="img", delay=2, leave=False):
        lines: list[str] | None = folder.captions.get(path)
        times, of_folder = kohya.get(path.relative_to(folder.path).parts[0], (1, ""))
        try:
            if not lines:
                lines, text = captions_beside(path, folder.names, folder.config.extensions)
                used.add(text)
                if not lines and (caption := of_folder or stand_in(path, folder.config)):
                    lines = [caption]
                    stand_ins[caption] += 1
        except ValueError as error:
            lines = None
            refused.append(printable(f"{path} ({error})"))
        try:
            size = path.stat().st_size
            if size > MOST_BYTES:
                size = 0  # training skips it, as an image that cannot be read
            with path.open("rb") as file:
                pixels = survey_size(partial(read_from, file, 0), size)
        except OSError:  # no permission: training skips it and reports its name
            size, pixels = 0, (0, 0)
        digest.update(json.dumps([str(path.relative_to(folder.path)), size, lines]).encode())
        if lines:
            places.append((len(files), 0, size, 0, 0, *pixels))
            files.append(path)
            captions.append(lines)
            repeats.append(times)
        elif lines is not None:
            uncaptioned.append(printable(str(path)))
    columns = columns_of(list(map(str, files)), np.array(places, PLACE))
    part = Part(columns, range(len(files)), list(map(File, files)), captions=captions)
    unused = len(folder.texts) - len(used & {*folder.texts})
    others += Counter({"captions": len(folder.texts) - unused, "texts that caption no image": unused})
    source = Source([part], uncaptioned, digest.hexdigest())
    usual = "".join(f"{caption!r}" for caption, _ in stand_ins.most_common(1))
    notes = [f"{sum(stand_ins.values())} pictures without a text get a caption, such as {usual}"] * bool(stand_ins)
    notes += [f"{name}/ is drawn {times} times an epoch" for name, (times, _) in kohya.items() if times > 1]
    if (itself := REPEATS.fullmatch(folder.path.name)) and any(path.parent == folder.path for path in files):
        notes.append(f"the number of {folder.path.name}/ is not read: give the folder that it is in, or :x{itself[1]}")
    return replace(source, refused=refused, others=others, note=printable("; ".join(notes)), repeats=np.array(repeats, int))


def stand_in(image: Path, config: CaptionFilesConfig) -> str:
    """The caption of an image that has none of its own; "" if there is none for it either."""
    return (caption_of_name(image.stem) if config.caption_from_name else "") or config.caption or ""


def captions_beside(image: Path, names: Names, extensions: tuple[str, ...]) -> tuple[list[str], Path | None]:
    """(captions of name.jpg in a name.txt, name.json, …, that file). Raises ValueError if it cannot be read."""
    for suffix in extensions:
        if (path := names.find(image.with_suffix(f".{suffix}"))) and path.is_file():
            try:
                (encoded,) = File(path).read((0, MOST_TEXT + 1))
            except OSError as error:
                raise ValueError(f"its caption cannot be read: {error.strerror}") from None
            if lines := split_captions(encoded, must_be_json=suffix == "json"):
                return lines, path
    return [], None
