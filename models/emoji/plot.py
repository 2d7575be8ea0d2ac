"""Line plots as PIL pictures: panels with several curves each, and bars for intervals."""

import math
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

COLOURS = ["#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#616a6b"]
WIDTH, HEIGHT, MARGIN = 520, 340, 52


@dataclass
class Panel:
    """One plot. `curves` maps names to points (x, y, low, high), whose bars end at the frame; `level` is a named line across
    it."""

    title: str
    x_label: str
    logarithmic: bool = False
    curves: dict = field(default_factory=dict)
    level: tuple | None = None

    def _x(self, x):
        return math.log10(x) if self.logarithmic else x

    def draw(self):
        """The panel as a picture."""
        points = [point for curve in self.curves.values() for point in curve]
        xs = [self._x(point[0]) for point in points]
        ys = [point[1] for point in points] + ([self.level[1]] if self.level else [])
        left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
        room = 0.3 * (max(ys) - min(ys)) or 1
        low, high = min(ys) - room, max(ys) + room

        def place(x, y):
            across, up = (self._x(x) - left) / (right - left), (min(max(y, low), high) - low) / (high - low)
            return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

        picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        pen = ImageDraw.Draw(picture)
        pen.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="#cccccc")
        pen.text((MARGIN, 8), self.title, fill="black")
        pen.text((WIDTH // 2, HEIGHT - 18), self.x_label, fill="black", anchor="ma")
        for value in (low, (low + high) / 2, high):
            pen.text((MARGIN - 4, place(points[0][0], value)[1]), f"{value:.3g}", fill="black", anchor="rm")
        for x in sorted({point[0] for point in points})[:: max(1, len(points) // 6)]:
            pen.text((place(x, low)[0], HEIGHT - MARGIN + 4), f"{x:.3g}", fill="black", anchor="ma")
        if self.level:
            at = place(points[0][0], self.level[1])[1]
            pen.line((MARGIN, at, WIDTH - MARGIN, at), fill="#888888")
            pen.text((WIDTH - MARGIN, at - 12), self.level[0], fill="#888888", anchor="ra")
        for number, (name, curve) in enumerate(self.curves.items()):
            colour, curve = COLOURS[number % len(COLOURS)], sorted(curve)
            pen.line([place(x, y) for x, y, *_ in curve], fill=colour, width=2)
            for x, y, least, most in curve:
                (across, up), top, bottom = place(x, y), place(x, most)[1], place(x, least)[1]
                pen.line((across, top, across, bottom), fill=colour)
                pen.ellipse((across - 3, up - 3, across + 3, up + 3), fill=colour)
            pen.text((MARGIN + 110 * (number % 4), 22 + 12 * (number // 4)), name, fill=colour)
        return picture


def grid(panels, columns):
    """One picture of all panels, in rows of `columns`."""
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for i, panel in enumerate(panels):
        canvas.paste(panel.draw(), (i % columns * WIDTH, i // columns * HEIGHT))
    return canvas
