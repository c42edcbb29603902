"""Pictures side by side, with their captions."""

from PIL import Image, ImageDraw, ImageFont

SHEET_MARGIN = 8


def side_by_side(columns: dict[str, Image.Image], prompt: str) -> Image.Image:
    """Square pictures of one prompt from left to right, each with its name above it, and the prompt on top.

    Small pictures are enlarged to at least 384 pixels, so that the text can be read.
    """
    side = max(384, next(iter(columns.values())).width)
    font = ImageFont.load_default(size=side / 24)
    line = round(side / 24 * 1.6)
    sheet = Image.new("RGB", (len(columns) * (side + SHEET_MARGIN) + SHEET_MARGIN, side + 2 * line + SHEET_MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((SHEET_MARGIN, line // 5), shorten(prompt, sheet.width - 2 * SHEET_MARGIN, font), fill="black", font=font)
    for i, (name, image) in enumerate(columns.items()):
        x = SHEET_MARGIN + i * (side + SHEET_MARGIN)
        draw.text((x, line), name, fill="gray", font=font)
        sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, 2 * line))
    return sheet


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
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
