"""Shows what training will see: a contact sheet of the crops with their captions and sizes, and a table of the buckets.

python scripts/show_data.py photos/                                         data.png and the table, for SDXL
python scripts/show_data.py photos/ --flip --shuffle-tags --keep-tags 1     with train_lora.py's own flags
"""

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.errors import UserError, first_names, one_line_errors
from common.options import MAX_SEED, Options, option
from options.command import parse_command
from options.training import CaptionConfig, CaptionFilesConfig, DataOptions


@dataclass(frozen=True)
class ShowConfig(Options):
    data: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """The values of train_lora.py's --data. None given: demo."""
    dataset: DataOptions = DataOptions()
    captions: CaptionConfig = CaptionConfig()
    caption_files: CaptionFilesConfig = CaptionFilesConfig()
    seed: int = option(0, at_least=0, at_most=MAX_SEED)
    """As train_lora.py's --seed: the sheet begins with the first batch of that training."""
    images: int = option(100, at_least=1)
    """Pictures on the sheet at most, each once."""
    out: Path = Path("data.png")
    """File for the sheet."""


if __name__ == "__main__":
    COMMAND = parse_command("show_data.py", ShowConfig, __doc__)

import numpy as np
from PIL import Image

from common.files import check_writable
from common.sheets import captioned, tiled
from data import Stream, batch_or_raise, open_cache
from dataset.buckets import enlarged, share_cropped
from dataset.captions import with_trigger
from dataset.sources import Source, open_mixture
from model.load import BASE
from model.text import split_tokens


def dim(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Pixels [h, w, 3] uint8, faded to grey where the loss mask [1, h/8, w/8] in 0…1 hides them."""
    kept = 0.2 + 0.8 * mask[0].repeat(8, axis=0).repeat(8, axis=1)[..., None]
    return (pixels * kept + 160 * (1 - kept)).astype(np.uint8)


def data_sheet(stream: Stream, images: int) -> tuple[Image.Image, list[str]]:
    """(sheet of the first images of the stream, each once, row by row; names of those that could not be decoded)."""
    cells: list[Image.Image] = []
    skipped: list[str] = []
    missing = set(stream.source.names)
    for batch in map(batch_or_raise, islice(stream, images)):  # an end also where the weights of --data hide an image
        skipped += batch.skipped
        facts = zip(batch.size.tolist(), batch.original_size.tolist(), batch.crop.tolist(), strict=True)
        shown = list(batch.images.numpy())
        if batch.mask is not None:
            shown = [dim(pixels, mask) for pixels, mask in zip(shown, batch.mask.numpy(), strict=True)]
        for name, pixels, caption, (size, original, crop) in zip(batch.names, shown, batch.captions, facts, strict=True):
            if name in missing:
                numbers = "{1}×{0} of {3}×{2}, cut left {5}, top {4}".format(*size, *original, *crop)
                cells.append(captioned(Image.fromarray(pixels), numbers, caption))
                missing.remove(name)
        missing -= set(skipped)
        if len(cells) >= images or not missing:
            break
    return tiled(cells[:images]), skipped


def bucket_table(source: Source, stream: Stream) -> list[str]:
    """A line for every bucket in use: its images, how much of them is cropped away and how many are enlarged."""
    heights, widths = source.column("height"), source.column("width")
    lines = ["   width × height   images   cropped away: mean, most   enlarged: images, most"]
    for number in np.unique(stream.bucket):
        size, chosen = stream.sizes[number], (stream.bucket == number) & (heights > 0)  # those that can be read
        originals = heights[chosen], widths[chosen]
        cropped = 100 * share_cropped(originals, size) if chosen.any() else np.zeros(1)
        factors = enlarged(originals, size)
        factors = factors[factors > 1]
        enlargement = f"{len(factors):8} {factors.max():10.2f} ×" if len(factors) else f"{0:8}"
        cropping = f"{cropped.mean():12.1f} % {cropped.max():8.1f} %"
        lines.append(f"{size[1]:8} × {size[0]:<6} {len(originals[0]):8} {cropping} {enlargement}")
    return lines


def caption_facts(source: Source, config: CaptionConfig) -> list[str]:
    """Lines of text: how many captions there are, and how many are longer than --max-tokens."""
    from transformers import CLIPTokenizer  # here: `model` has to quiet it first

    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    captions = [with_trigger(caption, config) for n in range(source.samples) for caption in source.read_sample(n).captions]
    split = split_tokens(tokenizer, captions, config.max_tokens)
    lengths = [sum(map(len, chunks)) + len(rest) for chunks, rest in split]
    lines = [f"{len(captions)} captions of {source.samples} images, {np.mean(lengths):.0f} tokens on average"]
    if lost := sorted((rest for _, rest in split if rest), key=len):
        mean, limit = np.mean(list(map(len, lost))), f"{config.max_tokens} tokens"
        lines.append(f"{len(lost)} are cut after {limit} and lose {mean:.0f} on average, {len(lost[-1])} at most:")
        lines.append(f"   …{tokenizer.decode(lost[-1])[:150]}")
    return lines


def main(config: ShowConfig) -> None:
    source = open_mixture(config.data, open_cache(config.dataset), config.caption_files)
    if source.has_latents:
        raise UserError(f"{' '.join(config.data)} holds latents: give the images that they were made of")
    check_writable("the folder of --out", config.out.parent)
    stream = Stream(source, config.dataset, config.captions, config.dataset.resolution or 1024, config.seed)
    print("\n".join(bucket_table(source, stream) + caption_facts(source, config.captions)))
    print(source.account())
    for line in source.left_out():
        print(f"  {line}")
    if source.uncaptioned:
        print(f"{len(source.uncaptioned)} images have no caption and are left out: {first_names(source.uncaptioned)}")
        print("  a .txt beside each, or --caption 'my style' for all of them, lets training use them")
    sheet, skipped = data_sheet(stream, config.images)
    sheet.save(config.out)
    if skipped:
        print(f"{len(set(skipped))} of these cannot be decoded: {first_names(sorted(set(skipped)))}")
    print(f"what training sees: {config.out}")


if __name__ == "__main__":
    with one_line_errors("show_data.py"):
        main(COMMAND)
