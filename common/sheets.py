"""Pictures side by side, with their captions."""

import textwrap
from bisect import bisect_right
from contextlib import suppress
from functools import cache
from io import BytesIO
from itertools import accumulate, groupby
from math import ceil

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.errors import printable, warn
from common.files import ROOT

SHEET_MARGIN = 8
TILE, COLUMNS, LINES, FONT = 256, 6, 5, 12  # pixels of a tile, tiles in a row, lines of a caption, pixels of a line
LETTERS = ROOT / "assets/fonts/DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic, mathematics …; CJK fonts have 5 MB and more
SYSTEM_FONTS = (  # with CJK: of Linux, macOS, Windows; Pillow looks for them where the system keeps fonts
    "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSans-Regular.ttc",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "unifont.otf",
    "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "msyh.ttc", "msgothic.ttc",
)  # fmt: skip
NO_CHARACTER = "\uffff"  # in no font: drawn as what stands for a missing letter


class Lettering:
    """Text in the bundled font, and in one of the system what that lacks. Warns once if no font here has a character."""

    warned = False

    def __init__(self, size: float):
        self.fonts = [ImageFont.truetype(LETTERS, size)]
        for name in SYSTEM_FONTS:
            with suppress(OSError):
                self.fonts.append(ImageFont.truetype(name, size))
        self.font_of = cache(self.find_font)

    def find_font(self, character: str) -> ImageFont.FreeTypeFont:
        found = (font for font in self.fonts if character.isspace() or drawn(font, character) != drawn(font, NO_CHARACTER))
        if font := next(found, None):
            return font
        if not Lettering.warned:
            warn(f"no font here has {printable(character)}: boxes stand for such letters on sheets (fonts-noto-cjk has most)")
        Lettering.warned = True
        return self.fonts[0]

    def parts(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        return [(font, "".join(part)) for font, part in groupby(text, self.font_of)]

    def getlength(self, text: str) -> float:
        """Pixels, as the method of Pillow's fonts."""
        return sum(font.getlength(part) for font, part in self.parts(text))

    def wrap(self, text: str, width: float) -> list[str]:
        """Lines of at most `width` pixels, broken at spaces, and inside of words that are longer than a line."""
        lines: list[str] = []
        for word in text.split():
            if lines and self.getlength(joined := f"{lines[-1]} {word}") <= width:
                lines[-1] = joined
                continue
            while self.getlength(word) > width:
                end = max(1, bisect_right(list(accumulate(map(self.getlength, word))), width))
                lines, word = [*lines, word[:end]], word[end:]
            lines += [word] if word else []
        return lines

    def write(self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill: str) -> None:
        """`xy`: the left end of the upper edge of the bundled font's line."""
        x, y = xy[0], xy[1] + self.fonts[0].getmetrics()[0]
        for font, part in self.parts(text):
            draw.text((x, y), part, fill=fill, font=font, anchor="ls")
            x += font.getlength(part)


def drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


lettering = cache(Lettering)  # by the size in pixels


def grid(rows: list[list[Image.Image]], columns: list[str], names: list[str], title: str) -> Image.Image:
    """Rows of pictures, with the name of each column above it, that of each row on its left, and a title on top: all of it in
    as many lines as it takes; without names of rows there is no room for them.

    Small pictures are enlarged to at least 384 pixels in width, so that the text can be read.
    """
    widest = max(image.width for row in rows for image in row)
    factor = max(1, 384 / widest)
    width, margin = round(widest * factor), SHEET_MARGIN
    font, line = lettering(width / 24), round(width / 24 * 1.6)
    beside = min(width // 2, ceil(max(map(font.getlength, names))))
    left = margin + (beside + margin if beside else 0)
    total = left + len(columns) * (width + margin)
    titles, heads = font.wrap(title, total - 2 * margin), [font.wrap(column, width) for column in columns]
    labels = [font.wrap(name, beside) for name in names]
    tallest = [round(max(image.height for image in row) * factor) for row in rows]
    heights = [max(height, line * len(label)) + margin for height, label in zip(tallest, labels, strict=True)]
    top = line // 5
    y = top + line * (len(titles) + max(map(len, heads)))
    sheet = Image.new("RGB", (total, y + sum(heights)), "white")
    texts = [(margin, top, titles, "black")]
    texts += [(left + i * (width + margin), top + line * len(titles), head, "gray") for i, head in enumerate(heads)]
    for row, label, height in zip(rows, labels, heights, strict=True):
        texts.append((margin, y, label, "gray"))
        for i, image in enumerate(row):
            size = round(image.width * factor), round(image.height * factor)
            sheet.paste(image.resize(size, Image.Resampling.LANCZOS), (left + i * (width + margin), y))
        y += height
    draw = ImageDraw.Draw(sheet)
    for x, y, lines, colour in texts:
        for i, text in enumerate(lines):
            font.write(draw, (x, y + i * line), text, colour)
    sheet.info |= rows[0][-1].info  # what one of the pictures is drawn from
    return sheet


def side_by_side(columns: dict[str, Image.Image], prompt: str) -> Image.Image:
    """Pictures of one prompt from left to right, each with its name above it, and the prompt on top."""
    return grid([list(columns.values())], list(columns), [""], prompt)


def shorten(text: str, width: int, font: Lettering | ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cuts `text` to `width` pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Sheets one below the other."""
    stacked = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), "white")
    stacked.info |= sheets[0].info
    y = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, y))
        y += sheet.height
    return stacked


def captioned(image: Image.Image, facts: str, caption: str) -> Image.Image:
    """A tile: one picture, a line of facts in grey, and the beginning of its caption."""
    font, line = lettering(FONT), FONT + 3
    image = image.copy()
    image.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", (TILE + 12, TILE + (LINES + 1) * line + 12), "white")
    sheet.paste(image, ((sheet.width - image.width) // 2, 6 + (TILE - image.height) // 2))
    draw = ImageDraw.Draw(sheet)
    font.write(draw, (6, TILE + 8), facts, "gray")
    lines = textwrap.wrap(caption, 42, max_lines=LINES, placeholder=" …") or ["(no caption)"]
    for i, text in enumerate(lines, 1):
        font.write(draw, (6, TILE + 8 + i * line), text, "black")
    return sheet


def tiled(tiles: list[Image.Image]) -> Image.Image:
    """Tiles row by row; all have the size of the first."""
    width, height = tiles[0].size
    sheet = Image.new("RGB", (min(COLUMNS, len(tiles)) * width, -(-len(tiles) // COLUMNS) * height), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % COLUMNS * width, i // COLUMNS * height))
    return sheet


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file with the texts of `image.info`, such as "parameters", which A1111 and others read."""
    buffer, texts = BytesIO(), PngInfo()
    for name, text in image.info.items():
        if isinstance(text, str):
            texts.add_text(str(name), text)
    image.save(buffer, "PNG", pnginfo=texts)
    return buffer.getvalue()
