"""The demo world: small cartoon people, drawn by a program from a seed, with captions in plain words.

    python scripts/demo_model/demo_world.py sheet.png        # a contact sheet: the base pens, then the held-back ninja pen

A `Scene` says what is in the picture, a `Pen` how it is drawn: outline, palette, finish. `draw` combines the two, so one
scene drawn by two pens shows the same person. The bundled SDXL is trained on every pen of `BASE_PENS`. It never sees the
word "ninja" or the ninja pen with its headband, whisker marks and speed lines: that style is for a LoRA to learn.
Points are in units of 1/128 of the picture's side; y grows downward.
"""

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
SUPERSAMPLE = 4  # draw this many times larger, then shrink: Pillow's own shapes have jagged edges

# ---------------------------------------------------------------------------------------------------------------- words

HAIR = {"black": (58, 52, 66), "brown": (128, 82, 50), "red": (208, 58, 42), "yellow": (252, 208, 74),
        "orange": (240, 132, 44), "white": (238, 238, 242), "pink": (247, 142, 182), "blue": (72, 122, 222),
        "green": (84, 174, 94), "purple": (144, 94, 196)}
EYES = {"blue": (38, 120, 245), "green": (30, 168, 70), "brown": (134, 74, 30), "red": (220, 36, 36),
        "purple": (150, 62, 210)}
SKIN = {"pale": (255, 226, 204), "light": (250, 208, 174), "tan": (222, 168, 124), "dark": (150, 100, 70)}
CLOTH = {"red": (216, 66, 60), "blue": (70, 116, 208), "green": (78, 160, 92), "yellow": (246, 204, 78),
         "purple": (142, 96, 186), "white": (242, 240, 236), "black": (66, 64, 76), "orange": (240, 140, 60),
         "pink": (244, 154, 186)}
WALL = {"white": (246, 244, 238), "yellow": (255, 232, 150), "pink": (255, 206, 218), "blue": (170, 210, 248),
        "green": (186, 228, 178), "grey": (198, 200, 206), "purple": (206, 190, 238)}
PLACES = ("forest", "city", "beach", "night sky", "mountains")
ACTIONS = ("eating ramen", "reading a book", "waving", "drinking tea", "eating a rice ball")
EXPRESSIONS = ("smiling", "sad", "angry", "surprised")
GARMENTS = ("t-shirt", "hoodie", "coat", "striped sweater", "kimono")
ACCESSORIES = ("glasses", "hat", "scarf", "headphones", "flower")
WHITE, BLACK, INK = (255, 255, 255), (20, 18, 24), (52, 32, 48)


@dataclass(frozen=True)
class Build:
    """Proportions of a kind of person, and the hair styles that it can have."""
    chin: float
    jaw: float
    eye: float
    shoulder: float
    styles: tuple[str, ...]


PEOPLE = {"boy": Build(25, 14.5, 1.0, 28, ("short", "spiky", "curly")),
          "girl": Build(25, 13.5, 1.04, 26, ("long", "bob", "ponytail", "pigtails")),
          "man": Build(30.5, 18, 0.84, 40, ("short", "spiky")),
          "woman": Build(28, 12.5, 0.94, 31, ("long", "bob", "ponytail", "bun", "curly")),
          "old man": Build(29, 16, 0.8, 36, ("bald", "short"))}


@dataclass(frozen=True)
class Scene:
    """What is in the picture. An empty string means that the picture has no such thing."""
    seed: int
    person: str
    skin: str
    hair: str
    style: str
    eyes: str
    expression: str
    garment: str
    cloth: str
    accessory: str
    accent: str
    place: str
    wall: str
    action: str
    beard: bool
    shift: tuple[float, float]
    tilt: float
    scale: float
    gaze: float
    mirror: bool


def sample_scene(seed: int) -> Scene:
    """The scene of a seed. Attributes are independent of each other, except that not every person wears everything."""
    rng = random.Random(seed)
    person = rng.choice(("boy", "girl", "man", "woman", "boy", "girl", "man", "woman", "old man"))
    style, old = rng.choice(PEOPLE[person].styles), person == "old man"
    accessory = rng.choice(ACCESSORIES) if rng.random() < 0.45 else ""
    if accessory == "flower" and person not in ("girl", "woman"):
        accessory = "glasses"
    return Scene(
        seed=seed, person=person, skin=rng.choice(("pale", "light", "light", "tan", "dark")),
        hair="white" if old else rng.choice(tuple(HAIR)), style=style, eyes=rng.choice(tuple(EYES)),
        expression=rng.choice(EXPRESSIONS) if rng.random() < 0.65 else "",
        garment=rng.choice(GARMENTS), cloth=rng.choice(tuple(CLOTH)),
        accessory=accessory, accent=rng.choice(tuple(CLOTH)),
        place=rng.choice(PLACES) if rng.random() < 0.6 else "", wall=rng.choice(tuple(WALL)),
        action=rng.choice(ACTIONS) if rng.random() < 0.6 else "", beard=old or (person == "man" and rng.random() < 0.3),
        shift=(rng.uniform(-4, 4), rng.uniform(-2, 3)), tilt=rng.gauss(0, 2.5), scale=rng.uniform(0.94, 1.08),
        gaze=rng.uniform(-1.2, 1.2), mirror=rng.random() < 0.5)


def caption(scene: Scene, style: str, seed: int, repainted: bool = False) -> str:
    """One of many captions for `scene` in `style` ("" for none), chosen by `seed`. Leaves some attributes out.

    repainted: the pen ignores the colours of clothes and walls, so the caption does not mention them.
    """
    s, rng = scene, random.Random(f"caption {seed}")
    detail = rng.choice((0.3, 0.75, 0.75, 0.95, 1.0))
    said = {name: rng.random() < detail for name in ("hair", "style", "eyes", "expression", "garment", "place", "skin")}

    def an(words):
        return ("an " if words[0] in "aeio" else "a ") + words

    looks = []
    if said["eyes"]:
        looks.append(f"{s.eyes} eyes")
    if s.style == "bald":
        if said["style"]:
            looks.append("a bald head")
    elif said["hair"]:
        worn = {"pigtails": " in pigtails"} | {style: f" in a {style}" for style in ("ponytail", "bun", "bob")}
        worn = worn.get(s.style, "")
        before = "" if worn or not said["style"] else f"{s.style} "
        looks.append(f"{before}{s.hair} hair" + (worn if said["style"] else ""))
    if s.beard and s.person == "man":
        looks.append("a beard")
    if s.skin in ("pale", "tan", "dark") and said["skin"] and rng.random() < 0.5:
        looks.append(f"{s.skin} skin")
    rng.shuffle(looks)
    if s.accessory == "glasses":
        looks.append("glasses")
    elif s.accessory == "flower":
        looks.append("a flower in her hair")
    elif s.accessory == "headphones":
        looks.append("headphones")
    elif s.accessory:
        looks.append(an(f"{s.accent} {s.accessory}") if rng.random() < 0.85 else f"a {s.accessory}")

    who = an(f"{s.expression} {s.person}" if s.expression and said["expression"] else s.person)
    if looks:
        who += " with " + (", ".join(looks[:-1]) + " and " + looks[-1] if len(looks) > 1 else looks[0])
    if said["garment"] and not repainted:
        who += rng.choice((" in ", " wearing ")) + an(f"{s.cloth} {s.garment}")
    if s.action:
        who += (" " if said["garment"] or rng.random() < 0.7 else ", ") + s.action
    if said["place"] and (s.place or not repainted):
        where = {"forest": " in a forest", "city": " in a city", "beach": " at the beach",
                 "night sky": " under the night sky", "mountains": " in the mountains",
                 "": f" on {an(s.wall)} background"}
        place = rng.choice((where[s.place], f", {s.place or s.wall} background"))
    else:
        place = ""
    if style:
        style = f" in {style} style"
        who += rng.choice((place + style, place + "," + style, style + place))
    else:
        who += place
    return rng.choice(("", "", "", "portrait of ", "a picture of ", "a drawing of ")) + who


# ----------------------------------------------------------------------------------------------------------------- pens

def mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))


def tint(colour: Colour, *amounts: float) -> Colour:
    return tuple(round(v * m) for v, m in zip(colour, amounts, strict=True))


def grey(colour: Colour) -> float:
    return (0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]) / 255


@dataclass(frozen=True)
class Pen:
    """How a picture is drawn.

    width: of outlines. ink: fill colour -> outline colour. fill: (colour of the scene, part: skin, hair, eye, cloth, trim,
    back or thing) -> colour to paint. shade: strength of shadows. finish: applied to the finished picture.
    """
    name: str
    width: float = 1.3
    ink: Callable = lambda fill: mix(fill, INK, 0.78)
    fill: Callable = lambda colour, part: colour
    shade: float = 1.0
    finish: Callable = lambda image: image


def neon_ink(fill: Colour) -> Colour:
    top, low = max(fill), min(fill)
    return tuple(round(70 + 185 * ((v - low) / (top - low) if top - low > 10 else 0.9)) for v in fill)


def hatch(image: Image.Image) -> Image.Image:
    """Grey pencil on cream paper, with slanted strokes where the picture is dark."""
    value = np.asarray(image.convert("L"), np.float32) / 255
    y, x = np.mgrid[:image.height, :image.width] * (128 / image.height)
    stroke = np.sin((x + y) * (2 * math.pi / 6)) * np.clip(0.8 - value, 0, 0.3) * (value > 0.3)
    value = 0.2 + 0.78 * np.clip(value + 0.6 * stroke, 0, 1)
    return Image.fromarray(np.uint8(value[..., None] * np.array([255, 251, 240])))


def frame(image: Image.Image) -> Image.Image:
    """Adds a paper-coloured border with round inner corners, as on an old photograph."""
    k, mask = image.width / 128, Image.new("L", image.size)
    ImageDraw.Draw(mask).rounded_rectangle([6 * k, 6 * k, 122 * k - 1, 122 * k - 1], 8 * k, fill=255)
    return Image.composite(image, Image.new("RGB", image.size, (238, 224, 196)), mask)


def ninja_fill(colour: Colour, part: str) -> Colour:
    if part in ("cloth", "trim"):
        return (246, 128, 32) if part == "cloth" else (36, 72, 160)
    if part == "back":
        dark, light = ((196, 84, 24), (255, 216, 150)) if colour[0] > colour[2] else ((18, 40, 116), (136, 186, 250))
        return mix(dark, light, grey(colour))
    return colour


PLAIN = Pen("")
BASE_PENS = {pen.name: pen for pen in (
    PLAIN,
    Pen("pastel", 1.0, lambda f: mix(f, (150, 110, 150), 0.35),
        lambda c, part: mix(c, WHITE, 0.2 if part == "eye" else 0.5)),
    Pen("pencil", 1.0, lambda f: (70, 70, 70), lambda c, part: mix(c, WHITE, 0.25), finish=hatch),
    Pen("night", 1.2, lambda f: mix(f, (10, 10, 40), 0.75),
        lambda c, part: c if part == "eye" else tint(c, 0.42, 0.5, 0.8)),
    Pen("flat", 0.0, lambda f: f, lambda c, part: mix(c, WHITE, 0.05), shade=0.0),
    Pen("neon", 1.2, neon_ink, lambda c, part: c if part == "eye" else mix(c, (14, 8, 30), 0.86)),
    Pen("vintage", 1.2, lambda f: mix(f, (70, 40, 20), 0.75),
        lambda c, part: mix(c, mix((88, 56, 34), (252, 232, 190), grey(c)), 0.75), finish=frame),
    Pen("sunset", 1.2, lambda f: mix(f, (70, 10, 50), 0.75),
        lambda c, part: c if part == "eye" else mix(tint(c, 1.0, 0.68, 0.6), (255, 90, 60), 0.12)),
    Pen("comic", 2.5, lambda f: (16, 14, 20), lambda c, part: mix(c, tint(c, 1.05, 1.0, 0.95), 0.5)),
)}
NINJA = Pen("ninja", 2.8, lambda f: (12, 10, 16), ninja_fill)


# --------------------------------------------------------------------------------------------------------------- canvas

STEPS = np.linspace(0, 1, 7)[:-1, None]
SPLINE = 0.5 * np.hstack([-STEPS + 2 * STEPS**2 - STEPS**3, 2 - 5 * STEPS**2 + 3 * STEPS**3,
                          STEPS + 4 * STEPS**2 - 3 * STEPS**3, -STEPS**2 + STEPS**3])  # Catmull-Rom, [6, 4]
CIRCLE = np.stack([np.cos(np.arange(40) * math.pi / 20), np.sin(np.arange(40) * math.pi / 20)], 1)


def curve(points: np.ndarray) -> np.ndarray:
    """[N, 2] corners -> [6N, 2] points on the smooth closed curve through them."""
    four = np.stack([np.roll(points, k, 0) for k in (1, 0, -1, -2)])  # [4, N, 2]
    return np.einsum("sk,knd->nsd", SPLINE, four).reshape(-1, 2)


def both(points: list) -> list:
    """The right half of a symmetric outline, top to bottom -> the whole."""
    return points + [(-x, y) for x, y in reversed(points) if x]


class Canvas:
    """Paints shapes with one pen. `matrix` [2, 3] maps their points to the picture (position of the person, tilt of the head).
    """

    def __init__(self, pen: Pen, size: int):
        self.pen, self.k = pen, size * SUPERSAMPLE / 128
        self.image = Image.new("RGB", (size * SUPERSAMPLE, size * SUPERSAMPLE))
        self.ink = ImageDraw.Draw(self.image)
        self.place()

    def place(self, x=0.0, y=0.0, scale=1.0, degrees=0.0):
        c, s = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
        self.matrix, self.scale = np.array([[c, -s, x], [s, c, y]]), scale

    def xy(self, points) -> list[float]:
        points = np.asarray(points, float)
        return ((points @ self.matrix[:, :2].T + self.matrix[:, 2]) * self.k).ravel().tolist()

    def width(self, units: float) -> int:
        return max(1, round(units * self.k * self.scale))

    def shape(self, points, colour, part="thing", smooth=True, line=1.0):
        """A filled shape with an outline; line: its width as a multiple of the pen's width, 0 for none."""
        points = np.asarray(points, float)
        xy, fill = self.xy(curve(points) if smooth else points), self.pen.fill(colour, part)
        self.ink.polygon(xy, fill=fill)
        if line * self.pen.width:
            self.ink.line(xy + xy[:4], fill=self.pen.ink(fill), width=self.width(line * self.pen.width), joint="curve")

    def oval(self, x, y, rx, ry, colour, part="thing", line=1.0):
        self.shape(CIRCLE * (rx, ry) + (x, y), colour, part, smooth=False, line=line)

    def stroke(self, points, colour, width, part="thing", line=0.0):
        """A round-ended brush stroke through points, outlined if line."""
        points = np.asarray(points, float)
        if len(points) > 2:  # an open curve: double the ends, then drop the closing arcs
            points = np.vstack([curve(np.vstack([points[:1], points, points[-1:]]))[6:-12], points[-1:]])
        xy, fill = self.xy(points), self.pen.fill(colour, part)
        border = 2 * line * self.pen.width
        outline = [(width + border, self.pen.ink(fill))] if border else []
        for wide, paint in (*outline, (width, fill)):
            w = self.width(wide)
            self.ink.line(xy, fill=paint, width=w, joint="curve")
            for x, y in (xy[:2], xy[-2:]):
                self.ink.ellipse([x - w / 2, y - w / 2, x + w / 2, y + w / 2], fill=paint)

    def dark(self, colour, amount=0.16):
        return mix(colour, (60, 20, 70), amount * self.pen.shade)


# ------------------------------------------------------------------------------------------------------------- pictures

def paint_place(c: Canvas, s: Scene):
    rng = random.Random(f"place {s.seed}")

    def rect(x0, y0, x1, y1, colour, line=0.0):
        c.shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, "back", smooth=False, line=line)

    if not s.place:
        rect(-9, -9, 137, 137, WALL[s.wall])
        if c.pen.shade:
            c.oval(64, 60, 52, 52, mix(WALL[s.wall], WHITE, 0.45), "back", line=0)
    elif s.place == "night sky":
        rect(-9, -9, 137, 137, (34, 40, 92))
        c.oval(64, 150, 90, 52, (52, 62, 122), "back", line=0)
        for _ in range(16):
            x, y, r = rng.uniform(2, 126), rng.uniform(2, 95), rng.choice((0.9, 1.4))
            c.oval(x, y, r, r, (255, 246, 200), "back", line=0)
        c.oval(108, 20, 11, 11, (255, 240, 170), "back", line=0)
        c.oval(103, 17, 9.5, 9.5, (34, 40, 92), "back", line=0)
    elif s.place == "forest":
        rect(-9, -9, 137, 137, (206, 236, 200))
        for y, tone in ((96, (134, 196, 128)), (116, (88, 158, 92))):
            for i in range(6):
                x, h = i * 26 - 4 + rng.uniform(-5, 5), rng.uniform(58, 84)
                rect(x - 2.5, y - 12, x + 2.5, 132, (134, 98, 70))
                c.shape([(x - 15, y - 8), (x, y - h), (x + 15, y - 8)], tone, "back", smooth=False, line=0.5)
    elif s.place == "city":
        rect(-9, -9, 137, 137, (190, 224, 248))
        for i in range(7):
            x, top = i * 20 - 6, rng.uniform(14, 66)
            tone = rng.choice(((142, 156, 186), (170, 150, 160), (120, 136, 160)))
            rect(x, top, x + 18, 132, tone, line=0.5)
            for y in range(6):
                for left in (x + 3.5, x + 10.5):
                    rect(left, top + 5 + 11 * y, left + 4, top + 11 + 11 * y, (255, 238, 160))
    elif s.place == "beach":
        rect(-9, -9, 137, 137, (164, 218, 250))
        rect(-9, 62, 137, 137, (60, 160, 214))
        c.oval(64, 128, 100, 34, (250, 226, 168), "back", line=0)
        c.oval(20, 20, 10, 10, (255, 224, 110), "back", line=0)
        for x in (88, 98, 108):
            c.oval(x, 22 if x == 98 else 26, 9, 6, WHITE, "back", line=0)
    else:
        rect(-9, -9, 137, 137, (190, 226, 250))
        for x, top, half in ((18, 34, 44), (112, 26, 48), (64, 46, 40)):
            x += rng.uniform(-5, 5)
            c.shape([(x - half, 106), (x, top), (x + half, 106)], (132, 146, 184), "back", smooth=False, line=0.5)
            c.shape([(x - half * 0.3, top + (106 - top) * 0.3), (x, top), (x + half * 0.3, top + (106 - top) * 0.3),
                     (x, top + (106 - top) * 0.22)], WHITE, "back", smooth=False, line=0)
        c.oval(64, 130, 110, 34, (136, 196, 120), "back", line=0)


def paint_speed_lines(c: Canvas, s: Scene):
    rng = random.Random(f"speed {s.seed}")
    for i in range(26):
        angle, half = (i + rng.uniform(-0.3, 0.3)) * 2 * math.pi / 26, rng.uniform(0.02, 0.05)
        inner = rng.uniform(50, 60)
        c.ink.polygon(c.xy([(64 + r * math.cos(a), 62 + r * math.sin(a))
                            for r, a in ((inner, angle), (110, angle - half), (110, angle + half))]), fill=BLACK)


def paint_body(c: Canvas, s: Scene):
    """Shoulders and clothes. The neck is at (0, 30), below the head's centre."""
    build, cloth, skin = PEOPLE[s.person], CLOTH[s.cloth], SKIN[s.skin]
    trim = mix(cloth, WHITE if grey(cloth) < 0.7 else (90, 90, 130), 0.55)
    w, neck = build.shoulder, 7.5 if build.shoulder < 36 else 10
    if s.garment == "hoodie":
        c.oval(0, 38, w * 0.66, 11, c.dark(cloth), "cloth")
    c.shape(both([(neck, 35), (w * 0.78, 41), (w, 52), (w + 3, 90)]), cloth, "cloth")
    if s.garment == "striped sweater":
        for y in (50, 61, 72):
            c.shape(both([(w * (0.9 if y == 50 else 1), y), (w * (0.92 if y == 50 else 1), y + 5)]), trim, "trim",
                    smooth=False, line=0)
    c.shape(both([(neck, 20), (neck, 36), (neck * 0.4, 42)]), c.dark(skin), "skin", smooth=s.garment != "kimono")
    if s.garment == "t-shirt":
        collar = [(-neck - 1, 36), (-neck * 0.5, 42), (0, 44), (neck * 0.5, 42), (neck + 1, 36)]
        c.stroke(collar, trim, 2.4, "trim", line=0.6)
    elif s.garment == "striped sweater":
        c.stroke([(-neck, 37), (0, 42), (neck, 37)], trim, 5, "trim", line=0.8)
    elif s.garment == "hoodie":
        for side in (-1, 1):
            c.shape([(side * (neck + 7), 34), (side * neck, 34), (0, 49), (side * 6, 50)], cloth, "cloth")
            c.stroke([(side * 6, 48), (side * 6.5, 60)], trim, 1.8, "trim", line=0.5)
    elif s.garment == "coat":
        c.shape(both([(neck * 0.8, 37), (0, 56)]), WHITE, "trim", smooth=False)
        c.stroke([(0, 56), (0, 90)], c.dark(cloth, 0.5), 1.2, "cloth")
        for side in (-1, 1):
            lapel = [(side * neck, 34), (side * (neck + 9), 40), (side * 9, 50), (0, 58)]
            c.shape(lapel, c.dark(cloth), "cloth", smooth=False)
            c.oval(side * 5, 66, 1.8, 1.8, trim, "trim", line=0.5)
    else:
        c.shape([(-neck, 33), (-neck - 6, 37), (-1, 62), (4, 55)], trim, "trim", smooth=False)
        c.shape([(neck, 33), (neck + 6, 37), (-12, 84), (-18, 79)], trim, "trim", smooth=False)
    if s.accessory == "scarf":
        accent = CLOTH[s.accent]
        c.shape([(5, 40), (15, 40), (16, 66), (7, 66)], c.dark(accent), smooth=False)
        c.shape(both([(0, 33), (12, 31), (16, 36), (12, 43), (0, 46)]), accent)


def paint_hair_behind(c: Canvas, s: Scene):
    hair = c.dark(HAIR[s.hair])
    if s.style == "long":
        c.shape(both([(0, -34), (26, -24), (33, 0), (34, 30), (36, 50), (22, 54), (8, 46)]), hair, "hair")
    elif s.style == "bob":
        c.shape(both([(0, -34), (26, -24), (33, -2), (34, 22), (24, 31), (8, 26)]), hair, "hair")
    elif s.style == "ponytail":
        c.shape([(16, -24), (32, -30), (45, -16), (46, 8), (38, 30), (34, 10), (26, -8)], hair, "hair")
    elif s.style == "pigtails":
        for side in (-1, 1):
            c.shape([(side * x, y) for x, y in ((22, -12), (36, -14), (46, 4), (44, 24), (36, 36), (32, 18), (26, 2))],
                    hair, "hair")
    elif s.style == "bun":
        c.oval(0, -37, 13, 11, hair, "hair")
    elif s.style == "curly":
        for line in (2.0, 0.0):  # outlines first: the fills then cover them, except around the whole shape
            for a in np.radians(range(-35, 216, 25)):
                c.oval(31 * math.cos(a), -4 - 31 * math.sin(a), 9.5, 9.5, hair, "hair", line=line)


def paint_face(c: Canvas, s: Scene):
    build, skin, hair = PEOPLE[s.person], SKIN[s.skin], HAIR[s.hair]
    for side in (-1, 1):
        c.oval(side * 26, 4, 5, 6.5, skin, "skin")
        c.oval(side * 26, 4, 2, 3.2, c.dark(skin), "skin", line=0)
    c.shape(both([(0, -31), (17, -27), (26, -8), (25, 8), (build.jaw, build.chin - 5), (0, build.chin)]), skin, "skin")

    if s.beard:
        c.shape(both([(0, 19), (9, 16), (18, 10), (25.5, 2), (25, 12), (build.jaw + 2, build.chin - 2),
                      (0, build.chin + 6)]), hair, "hair")
        c.shape(both([(0, 12.5), (7, 13), (11, 18), (4, 17.5), (0, 16.5)]), c.dark(hair, 0.1), "hair", line=0.6)
    elif s.person != "man":
        for side in (-1, 1):
            c.oval(side * 18, 14, 4.6, 2.8, mix(skin, (244, 90, 90), 0.35 * c.pen.shade), "skin", line=0)

    # Eyes: white, iris, pupil, two lights; the upper lid is the darkest line of the face.
    e, wide = build.eye, 1.14 if s.expression == "surprised" else 1.0
    for side in (-1, 1):
        x, y, look = side * 12, 2.5, s.gaze * 0.8
        c.oval(x, y, 7.6 * e, 8.6 * e * wide, WHITE, "eye", line=0.5)
        c.oval(x + look, y + 0.6, 5.8 * e, 7.4 * e, EYES[s.eyes], "eye", line=0.7)
        c.oval(x + look, y + 1.2, 2.5 * e, 3.6 * e, BLACK, "eye", line=0)
        c.oval(x + look - 2.1 * e, y - 2.6 * e, 2.1 * e, 2.4 * e, WHITE, "eye", line=0)
        lid = [(x - side * 7.4 * e, y - 4.6 * e), (x, y - 8.8 * e * wide), (x + side * 8.4 * e, y - 3.4 * e)]
        if s.expression == "angry":
            lid[0] = (x - side * 7.4 * e, y - 2.0 * e)
        c.stroke(lid, c.pen.ink(c.pen.fill(skin, "skin")), 2.2, "line")
        if s.person in ("girl", "woman"):
            c.stroke([lid[2], (x + side * 11 * e, y - 6 * e)], c.pen.ink(c.pen.fill(skin, "skin")), 1.6, "line")
        inner, outer = {"sad": (-4.5, 1.5), "angry": (3.5, -3.5), "surprised": (-3.5, -3.5)}.get(s.expression, (0, 0))
        brow = c.dark(hair if s.hair != "white" else (176, 176, 186), 0.5)
        c.stroke([(x - side * 6, y - 12 + inner), (x + side * 1, y - 13.6 + (inner + outer) / 2),
                  (x + side * 7, y - 11.6 + outer)], brow, 2.8 if s.person in ("man", "old man") else 2.0, "hair")

    c.stroke([(0.8, 10), (0, 12.2)], c.dark(skin, 0.45), 1.8, "skin")
    line, y = c.pen.ink(c.pen.fill(skin, "skin")), 19 if not s.beard else 21
    if s.action in ("eating ramen", "eating a rice ball") or s.expression == "surprised":
        c.oval(0, y, 3.4, 3.8, (150, 50, 56), line=0.8)
    elif s.expression == "smiling":
        c.shape(both([(0, y - 2.2), (7, y - 3), (4.5, y + 2.4), (0, y + 4)]), (176, 56, 60), line=0.8)
        c.shape(both([(0, y - 2), (5.4, y - 2.4), (4, y - 0.4)]), WHITE, smooth=False, line=0)
    elif s.expression in ("sad", "angry"):
        c.stroke([(-4.5, y + 2), (0, y - 1), (4.5, y + 2)], line, 1.9, "line")
    else:
        lips = (190, 70, 76) if s.person == "woman" else line
        c.stroke([(-3.8, y - 0.6), (0, y + 0.8), (3.8, y - 0.6)], lips, 1.9, "line")


def paint_hair(c: Canvas, s: Scene):
    hair, rng = HAIR[s.hair], random.Random(f"hair {s.seed}")
    cap = [(-28.5, 2), (-29, -14), (-19, -31), (0, -37), (19, -31), (29, -14), (28.5, 2)]
    if s.style == "spiky":
        tips = []
        for i, a in enumerate(np.linspace(192, -12, 15)):
            r = 34 if i % 2 == 0 else 46 + rng.uniform(-3, 3)
            if i in (0, 14):
                r -= 3
            tips.append((r * 0.92 * math.cos(math.radians(a)), -4 - r * math.sin(math.radians(a))))
        fringe = [(23, -8), (20, -14), (13, -7), (8, -15), (1, -7), (-6, -15), (-12, -7), (-19, -14), (-23, -8)]
        c.shape(tips + fringe, hair, "hair", smooth=False)
    elif s.style == "curly":
        for line in (2.0, 0.0):
            for x, y, r in ((-22, -15, 8), (-11, -19, 8.5), (1, -20, 8.5), (12, -19, 8.5), (22, -15, 8)):
                c.oval(x, y, r, r, hair, "hair", line=line)
        c.shape(both([(0, -34), (18, -30), (24, -17), (0, -17)]), hair, "hair", line=0)
    elif s.style == "bald":
        for side in (-1, 1):
            c.shape([(side * x, y) for x, y in ((24, -12), (30, -10), (31, 2), (27, 6), (25, -2))], hair, "hair")
    elif s.style == "long":
        c.shape([*cap, (25, -2), (20, -12), (6, -22), (0, -25), (-6, -22), (-20, -12), (-25, -2)], hair, "hair")
    elif s.style == "bob":
        c.shape([*cap, (26, 8), (23, -9), (12, -9.5), (0, -9), (-12, -9.5), (-23, -9), (-26, 8)], hair, "hair")
    elif s.style in ("ponytail", "bun"):
        c.shape([*cap, (25, -2), (22, -12), (10, -18), (-8, -21), (-20, -12), (-25, -2)], hair, "hair")
    else:
        c.shape([*cap, (24, -7), (18, -13), (11, -8), (5, -13), (-2, -8), (-9, -13), (-16, -8), (-22, -12), (-25, -4)],
                hair, "hair")
    if s.style == "pigtails":
        for side in (-1, 1):
            c.oval(side * 27, -13, 4, 4, CLOTH[s.accent], line=0.8)
    if c.pen.shade and s.style != "bald" and s.accessory != "hat":
        c.stroke([(-17, -24), (-10, -29.5), (-2, -31)], mix(hair, WHITE, 0.45), 2.6, "hair")


def paint_accessory(c: Canvas, s: Scene):
    accent = CLOTH[s.accent]
    if s.accessory == "glasses":
        for side in (-1, 1):
            c.stroke(np.vstack([CIRCLE, CIRCLE[:1]]) * 10.2 + (side * 12, 3), (60, 50, 60), 1.7)
            c.stroke([(side * 22, 1), (side * 27, -1)], (60, 50, 60), 1.7)
        c.stroke([(-2.5, 1), (2.5, 1)], (60, 50, 60), 1.7)
    elif s.accessory == "hat":
        c.shape(both([(0, -47), (17, -43), (28, -29), (30, -17), (0, -20)]), accent)
        other = mix(accent, WHITE if grey(accent) < 0.8 else BLACK, 0.3)
        c.shape(both([(0, -25), (30, -22), (32, -13), (0, -15)]), other)
        c.oval(0, -47, 5.5, 5.5, other)
    elif s.accessory == "headphones":
        bow = [(-30, 0), (-29, -18), (-18, -35), (0, -41), (18, -35), (29, -18), (30, 0)]
        c.stroke(bow, (70, 70, 82), 3.4, line=0.6)
        for side in (-1, 1):
            c.oval(side * 30, 4, 5.5, 9, accent)
    elif s.accessory == "flower":
        for a in np.radians(range(0, 360, 72)):
            c.oval(-20 + 5 * math.cos(a), -22 + 5 * math.sin(a), 4, 4, (252, 120, 150), line=0.6)
        c.oval(-20, -22, 3, 3, (255, 214, 80), line=0.6)


def paint_headband(c: Canvas):
    """The forehead protector and the whisker marks, which only the ninja pen draws."""
    blue, steel = (36, 72, 160), (196, 204, 216)
    for tail in ([(26, -14), (42, -8), (48, 4), (40, 2)], [(26, -12), (38, 2), (40, 14), (33, 10)]):
        c.shape(tail, blue)
    c.shape(both([(0, -24), (15, -23), (29, -16), (29.5, -7), (15, -12.5), (0, -13.5)]), blue)
    c.shape(both([(0, -25), (15, -23.5), (15.5, -12), (0, -13)]), steel, smooth=False)
    spiral = [(0.9 * t * math.cos(t * 1.7), -18.7 + 0.75 * t * math.sin(t * 1.7)) for t in np.linspace(0.5, 5.2, 16)]
    c.stroke(spiral, (60, 64, 76), 1.3)
    for side in (-1, 1):
        for y0, y1 in ((9, 7.5), (13, 13), (17, 18.5)):
            c.stroke([(side * 15.5, y0), (side * 24, y1)], (12, 10, 16), 1.5)


def paint_action(c: Canvas, s: Scene):
    """Arms, hands and what they hold. The chin is at y = 30."""
    cloth, skin, w = CLOTH[s.cloth], SKIN[s.skin], PEOPLE[s.person].shoulder

    def arm(x, y, side):
        elbow = (side * (abs(x) * 0.4 + w * 0.75), (y + 84) / 2 + 6)
        c.stroke([(side * (w - 1), 84), elbow, (x, y + 4)], cloth, 11, "cloth", line=1)
        c.oval(x, y, 6, 6, skin, "skin")

    if s.action == "waving":
        c.stroke([(w - 4, 62), (w + 12, 50), (w + 10, 24)], cloth, 11, "cloth", line=1)
        for x, y in ((-5, -9), (-1.5, -11.5), (2.2, -11), (5.5, -8)):
            c.stroke([(w + 10 + x * 0.6, 14), (w + 10 + x, 14 + y)], skin, 3, "skin", line=0.9)
        c.stroke([(w + 8, 15), (w + 2, 10)], skin, 3, "skin", line=0.9)
        c.oval(w + 10, 14, 6.5, 6.5, skin, "skin", line=0.9)
        c.oval(w + 10, 13.6, 5.6, 5.6, skin, "skin", line=0)
    elif s.action == "eating ramen":
        red, noodle, wood = (200, 50, 50), (252, 224, 140), (150, 96, 56)
        arm(-25, 62, -1)
        c.oval(0, 52, 23, 7.5, (214, 140, 70))
        for x in (-12, -6, 0, 6):
            c.stroke([(x, 50), (x + 3, 55), (x + 8, 51)], noodle, 1.8)
        c.oval(-11, 50, 5, 3.6, WHITE, line=0.7)
        c.oval(-11, 50, 2.2, 1.8, (250, 180, 60), line=0)
        c.oval(12, 51, 4.6, 3.4, WHITE, line=0.7)
        c.oval(12, 51, 2, 1.5, (246, 120, 150), line=0)
        for x in (-2.6, 0, 2.6):
            c.stroke([(x * 0.6, 22), (x, 36), (x * 1.5, 50)], noodle, 2.0, line=0.35)
        c.shape([(-23, 53), (-12, 58.5), (0, 60), (12, 58.5), (23, 53), (20, 68), (12, 77), (-12, 77), (-20, 68)], red)
        c.stroke([(-18, 64), (-9, 67.5), (0, 68.5), (9, 67.5), (18, 64)], WHITE, 2.2)
        for dy in (0, 3.4):
            c.stroke([(-7, 35 + dy * 0.4), (32, 40 + dy)], wood, 1.8, line=0.4)
        arm(29, 42, 1)
    elif s.action == "reading a book":
        arm(-28, 62, -1), arm(28, 62, 1)
        c.shape(both([(0, 46), (29, 42), (29, 72), (0, 76)]), CLOTH[s.accent], smooth=False)
        for side in (-1, 1):
            page = [(0, 46), (side * 12, 41), (side * 26, 42), (side * 26, 68), (side * 12, 67), (0, 72)]
            c.shape(page, (254, 250, 236), smooth=False)
            for y in (49, 54, 59):
                c.stroke([(side * 6, y), (side * 21, y - 1.5)], (186, 180, 180), 1.2)
            c.oval(side * 28, 64, 5, 5.5, skin, "skin")
    elif s.action == "drinking tea":
        arm(-14, 52, -1), arm(14, 52, 1)
        c.shape([(-11, 38), (11, 38), (9, 57), (5, 61), (-5, 61), (-9, 57)], (236, 244, 236), smooth=False)
        c.oval(0, 38, 11, 3.4, (134, 176, 84))
        c.stroke([(-9, 49), (0, 51), (9, 49)], (96, 150, 200), 2.4)
        for side in (-1, 1):
            c.oval(side * 12, 52, 5.4, 6, skin, "skin")
            c.stroke([(side * 16, 36), (side * 14, 31), (side * 17, 27)], WHITE, 1.8, line=0.3)
    elif s.action == "eating a rice ball":
        arm(-14, 46, -1), arm(14, 46, 1)
        c.shape(both([(0, 26), (6, 30), (15, 46), (11, 52), (0, 53)]), (252, 252, 250))
        c.shape(both([(5.5, 41), (5.5, 53)]), (48, 60, 54), smooth=False)
        for side in (-1, 1):
            c.oval(side * 14, 46, 5.4, 5.6, skin, "skin")


def draw(scene: Scene, pen: Pen, size: int = 128) -> Image.Image:
    """Draws a scene with a pen, as an RGB picture of size × size. The same scene shows the same person with every pen."""
    c, s = Canvas(pen, size), scene
    paint_place(c, s)
    if pen is NINJA:
        paint_speed_lines(c, s)
    head = {"x": 64 + s.shift[0], "y": 57 + s.shift[1], "scale": s.scale, "degrees": s.tilt}
    body = head | {"y": head["y"] + PEOPLE[s.person].chin - 30, "degrees": 0}
    c.place(**head)
    paint_hair_behind(c, s)
    c.place(**body)
    paint_body(c, s)
    c.place(**head)
    paint_face(c, s)
    paint_hair(c, s)
    paint_accessory(c, s)
    if pen is NINJA:
        paint_headband(c)
    c.place(**body)
    paint_action(c, s)
    image = c.image.resize((size, size), Image.Resampling.LANCZOS)
    return pen.finish(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if s.mirror else image)


def contact_sheet(rows: int = 8, size: int = 128) -> Image.Image:
    """A sheet of `rows` scenes, one a row, each drawn by the base pens and the ninja pen."""
    pens = [*BASE_PENS.values(), NINJA]
    sheet = Image.new("RGB", (len(pens) * (size + 4) + 4, rows * (size + 4) + 4), WHITE)
    for row in range(rows):
        for column, pen in enumerate(pens):
            sheet.paste(draw(sample_scene(row), pen, size), (4 + column * (size + 4), 4 + row * (size + 4)))
    return sheet


if __name__ == "__main__":
    contact_sheet().save(sys.argv[1])
