"""Scenes of emoji and their captions, rendered on the fly from the two npm art packages.

Run as a program it fetches the packages (`npm pack`) into the work folder and writes the pictures of the
kept-out subjects. A scene is one to four
objects at random places, sizes, angles and hues on a coloured, possibly patterned background. All
randomness comes from the `random.Random` that the caller passes, so a seed fixes a picture.
"""

import argparse
import colorsys
import io
import json
import random
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

import vocabulary as words

SIZE = 64  # side of a rendered scene, pixels
PACKAGES = {name: f"emoji-datasource-{name}@16.0.0" for name in ("google", "twitter")}
HUE_STEPS = 7
HUE_RANGE = 0.03  # of a full turn, each way
DEFAULT_WORK = Path(__file__).resolve().parents[2] / "target" / "model"

# Side of an object as a share of the scene, by the number of objects in it.
SIDE_RANGE = {1: (0.48, 0.88), 2: (0.40, 0.58), 3: (0.32, 0.46), 4: (0.29, 0.42)}


def fetch(work):
    """Downloads both art packages into `work`/npm unless they are there; returns their archives."""
    folder = Path(work) / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for name, package in PACKAGES.items():
        archives[name] = folder / (package.replace("@", "-") + ".tgz")
        if not archives[name].exists():
            subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True)
    return archives


class Art:
    """The drawings, as RGBA pictures of 64 x 64 pixels in `HUE_STEPS` hues each.

    `art[source, short_name]` is a list of PIL pictures; `source` is "google" or "twitter".
    """

    def __init__(self, work=DEFAULT_WORK):
        self.archives = fetch(work)
        self.listing = {}
        self.drawings = {}
        for source, archive in self.archives.items():
            with tarfile.open(archive) as tar:
                self.listing[source] = json.load(tar.extractfile("package/emoji.json"))
        wanted = {"google": set(), "twitter": set()}
        for name, _ in (words.OBJECTS | words.CANDIDATES).values():
            wanted["google"].add(name)
        for source, name, _ in words.SUBJECTS.values():
            wanted[source].add(name)
        for source, names in wanted.items():
            self._load(source, names)

    def _load(self, source, names):
        images = {entry["image"]: entry["short_name"] for entry in self.listing[source] if entry["short_name"] in names}
        with tarfile.open(self.archives[source]) as tar:
            for member in tar:
                name = images.get(member.name.rsplit("/", 1)[-1])
                if name and f"/{source}/64/" in member.name:
                    picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                    self.drawings[source, name] = _hues(picture)

    def load_others(self, count):
        """Also loads `count` drawings that are neither objects, candidates nor subjects; returns their keys."""
        known = {name for _, name in self.drawings}
        kinds = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
        names = sorted(
            entry["short_name"]
            for entry in self.listing["google"]
            if entry["category"] in kinds and entry["has_img_google"] and entry["short_name"] not in known
        )
        chosen = random.Random(5).sample(names, count)
        self._load("google", set(chosen))
        return [("google", name) for name in chosen if ("google", name) in self.drawings]

    def __getitem__(self, key):
        return self.drawings[key]


def _hues(picture):
    """The picture turned by `HUE_STEPS` small angles of hue."""
    alpha = picture.getchannel("A")
    hue, saturation, value = picture.convert("RGB").convert("HSV").split()
    turned = []
    for shift in np.linspace(-HUE_RANGE, HUE_RANGE, HUE_STEPS):
        moved = Image.fromarray((np.asarray(hue).astype(int) + round(shift * 255)).astype(np.uint8))
        rgb = Image.merge("HSV", (moved, saturation, value)).convert("RGB")
        turned.append(Image.merge("RGBA", (*rgb.split(), alpha)))
    return turned


@dataclass
class Scene:
    """What a picture shows. `keys` name drawings of `Art`, `nouns` the words for them."""

    keys: list
    nouns: list
    colour: str
    pattern: str = "plain"
    tidy: bool = False  # objects upright, near fixed places, in the order of the caption
    boxes: list = field(default_factory=list)  # (centre x, centre y, side) in pixels, filled by `render`


def _background(colour, pattern, rng):
    """A [SIZE, SIZE, 3] uint8 ground near the named colour; patterns alternate two shades of it."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(c / 255 for c in words.COLOURS[colour]))
    lightness = min(max(lightness + rng.uniform(-0.05, 0.05), 0), 1)
    first = colorsys.hls_to_rgb(hue + rng.uniform(-0.012, 0.012), lightness, saturation)
    ground = np.empty((SIZE, SIZE, 3), np.float32)
    ground[:] = first
    if pattern != "plain":
        away = -1 if lightness > 0.5 else 1
        second = colorsys.hls_to_rgb(hue, lightness + away * rng.uniform(0.12, 0.2), saturation)
        period = rng.uniform(10, 18)
        angle = rng.choice((0, np.pi / 2, np.pi / 4)) + rng.uniform(-0.1, 0.1)
        y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
        u = (np.cos(angle) * x + np.sin(angle) * y) / period + rng.random()
        v = (-np.sin(angle) * x + np.cos(angle) * y) / period + rng.random()
        if pattern == "striped":
            mask = u % 1 < 0.5
        elif pattern == "dotted":
            mask = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.07
        else:
            mask = (u % 1 < 0.5) ^ (v % 1 < 0.5)
        ground[mask] = second
    return Image.fromarray((ground * 255).astype(np.uint8))


def _places(count, rng):
    """Centres and sides of `count` objects anywhere, hardly overlapping and inside the picture."""
    low, high = SIDE_RANGE[count]
    while True:
        boxes = []
        for _ in range(60):
            side = rng.uniform(low, high) * SIZE
            margin = 0.46 * side
            x, y = rng.uniform(margin, SIZE - margin), rng.uniform(margin, SIZE - margin)
            if all(max(abs(x - a), abs(y - b)) > 0.46 * (side + s) for a, b, s in boxes):
                boxes.append((x, y, side))
                if len(boxes) == count:
                    return boxes


def _tidy_places(count, rng):
    """Centres and sides near fixed places: the middle, left and right, or the quarters in reading order."""
    centres = {1: [(0.5, 0.5)], 2: [(0.26, 0.5), (0.74, 0.5)]}.get(count)
    centres = centres or [(0.26, 0.26), (0.74, 0.26), (0.26, 0.74), (0.74, 0.74)][:count]
    low, high = (0.70, 0.82) if count == 1 else (0.44, 0.50)
    jitter = 0.05 if count == 1 else 0.03
    return [
        ((x + rng.uniform(-jitter, jitter)) * SIZE, (y + rng.uniform(-jitter, jitter)) * SIZE, rng.uniform(low, high) * SIZE)
        for x, y in centres
    ]


def render(scene, art, rng):
    """Draws the scene; returns [SIZE, SIZE, 3] uint8 and fills `scene.boxes`."""
    canvas = _background(scene.colour, scene.pattern, rng)
    tidy = scene.tidy
    scene.boxes = (_tidy_places if tidy else _places)(len(scene.keys), rng) if scene.keys else []
    for key, (x, y, side) in zip(scene.keys, scene.boxes):
        hues = art[key]
        drawing = hues[HUE_STEPS // 2] if tidy else rng.choice(hues)
        if not tidy and rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.resize((round(side), round(side)), Image.Resampling.BILINEAR)
        angle = rng.uniform(-3, 3) if tidy else rng.uniform(-12, 12)
        drawing = drawing.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        canvas.paste(drawing, (round(x - drawing.width / 2), round(y - drawing.height / 2)), drawing)
    return np.asarray(canvas)


def sample_scene(rng, counts, patterned=0.3, tidy=0.0, newest=0):
    """A random training scene without held-out combinations.

    `counts` weighs 1, 2, 3 and 4 objects, `tidy` is the share of tidy scenes: they teach the shapes sooner.
    The last `newest` of `OBJECTS` come twice as often as the others.
    """
    count = rng.choices((1, 2, 3, 4), counts)[0]
    known = list(words.OBJECTS)
    known += known[len(known) - newest :]
    nouns = []
    while len(nouns) < count:
        noun = rng.choice(known)
        if noun not in nouns and not any(words.pair_is_held_out(noun, other) for other in nouns):
            nouns.append(noun)
    colours = [c for c in words.COLOURS if not any(words.colour_is_held_out(n, c) for n in nouns)]
    colour = rng.choice(colours or list(words.COLOURS))
    pattern = rng.choice(words.PATTERNS[1:]) if rng.random() < patterned else "plain"
    return Scene([("google", words.OBJECTS[n][0]) for n in nouns], nouns, colour, pattern, rng.random() < tidy)


def caption(scene, rng=None):
    """The scene's caption.

    With `rng` it varies as in training: 12 % empty, in 10 % one noun becomes its category (a few times
    "object"), in 10 % placeholder words are strewn in, and the ground is sometimes left unsaid.
    """
    if rng is None:
        listed = " and ".join(words.with_article(n) for n in scene.nouns)
        pattern = "" if scene.pattern == "plain" else scene.pattern + " "
        return f"{listed} on a {pattern}{scene.colour} background"
    if rng.random() < 0.12:
        return ""
    nouns = list(scene.nouns)
    if not scene.tidy:
        rng.shuffle(nouns)
    if rng.random() < 0.10:
        i = rng.randrange(len(nouns))
        nouns[i] = words.ANY_OBJECT if rng.random() < 0.2 else words.category(nouns[i])
    phrases = [words.with_article(n) for n in nouns]
    if rng.random() < 0.10:
        chosen = rng.sample(words.PLACEHOLDERS, len(phrases))
        for i, placeholder in enumerate(chosen):
            if i == 0 or rng.random() < 0.6:
                noun = phrases[i].split(" ", 1)[1]
                phrases[i] = f"a {placeholder} {noun}" if rng.random() < 0.8 else f"{phrases[i]} {placeholder}"
    text = " and ".join(phrases)
    if rng.random() < 0.1:
        text = rng.choice(("a picture of ", "a photo of ")) + text
    if rng.random() < 0.85:
        pattern = scene.pattern + " " if scene.pattern != "plain" or rng.random() < 0.1 else ""
        text += f" on a {pattern}{scene.colour} background"
    return text


def subject_pictures(name, art, seed=0):
    """The pictures of a kept-out subject: 4 to learn from and 16 to test on.

    Returns two lists of (picture [SIZE, SIZE, 3] uint8, colour word).
    """
    source, drawing, _ = words.SUBJECTS[name]
    rng = random.Random(f"{seed} {name}")
    pictures = []
    for _ in range(20):
        scene = Scene([(source, drawing)], [name], rng.choice(list(words.COLOURS)))
        pictures.append((render(scene, art, rng), scene.colour))
    return pictures[:4], pictures[4:]


def sheet(pictures, columns, border=2):
    """One PIL picture with all `pictures` ([H, W, 3] uint8) in rows of `columns`."""
    side = max(p.shape[0] for p in pictures) + border
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * side + border, rows * side + border), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture), (border + i % columns * side, border + i // columns * side))
    return canvas


def write_subjects(folder, art):
    """Writes every subject: 1.png .. 4.png to learn from, test.png (16 in a row), and subjects.json with the words."""
    listing = {}
    for name, (source, drawing, class_noun) in words.SUBJECTS.items():
        learn, test = subject_pictures(name, art)
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        for i, (picture, _) in enumerate(learn, 1):
            Image.fromarray(picture).save(place / f"{i}.png", optimize=True)
        row = np.concatenate([picture for picture, _ in test], axis=1)
        Image.fromarray(row).save(place / "test.png", optimize=True)
        listing[name] = {
            "art": source,
            "drawing": drawing,
            "class_noun": class_noun,
            "learn_colours": [colour for _, colour in learn],
            "test_colours": [colour for _, colour in test],
        }
    (folder / "subjects.json").write_text(json.dumps(listing, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=DEFAULT_WORK, help="folder for downloads and checkpoints")
    parser.add_argument("--subjects", type=Path, default=Path(__file__).resolve().parent / "subjects")
    options = parser.parse_args()
    art = Art(options.work)
    write_subjects(options.subjects, art)
    rng = random.Random(0)
    scenes = [sample_scene(rng, (4, 4, 2, 2)) for _ in range(80)]
    sheet([render(scene, art, rng) for scene in scenes], 10).save(options.work / "scenes.png")
    print("wrote", options.subjects, "and", options.work / "scenes.png")


if __name__ == "__main__":
    main()
