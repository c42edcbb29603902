"""Pictures side by side, with their captions."""

from contextlib import suppress
from functools import cache
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

from common.errors import printable, warn
from common.files import ROOT

SHEET_MARGIN = 8
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


def side_by_side(columns: dict[str, Image.Image], prompt: str) -> Image.Image:
    """Square pictures of one prompt from left to right, each with its name above it, and the prompt on top.

    Small pictures are enlarged to at least 384 pixels, so that the text can be read.
    """
    side = max(384, next(iter(columns.values())).width)
    font = lettering(side / 24)
    line = round(side / 24 * 1.6)
    sheet = Image.new("RGB", (len(columns) * (side + SHEET_MARGIN) + SHEET_MARGIN, side + 2 * line + SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    font.write(draw, (SHEET_MARGIN, line // 5), shorten(prompt, sheet.width - 2 * SHEET_MARGIN, font), "black")
    for i, (name, image) in enumerate(columns.items()):
        x = SHEET_MARGIN + i * (side + SHEET_MARGIN)
        font.write(draw, (x, line), name, "gray")
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, 2 * line))
    return sheet


def shorten(text: str, width: int, font: Lettering | ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cuts `text` to `width` pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Sheets of equal width, one below the other."""
    stacked = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    y = 0
    for sheet in sheets:
        stacked.paste(sheet, (0, y))
        y += sheet.height
    return stacked
