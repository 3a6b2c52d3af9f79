"""Drawings in SVG. Their colours are the page's, so that one drawing serves light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from kurtail_pl.stages.reporting.page.scale import Scale, scale_of
from kurtail_pl.stages.reporting.page.section import Picture

WIDTH, HEIGHT, WIDE = 460, 270, 940
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 42
NAMED = 76
"""The right margin where names of levels stand in it."""
COLOURS = 7
"""Series beyond begin with the first colour again."""
Points = Sequence[tuple[float, float]]


def lines(
    title: str,
    series: Mapping[str, Points],
    x: str,
    y: str,
    log: bool | None = None,
    marks: Mapping[str, float] | None = None,
    dots: bool = False,
) -> Picture:
    """Curves over a common axis.

    Args:
        title: of the picture.
        series: by name, in the order of the colours.
        x: name of the axis.
        y: name of the other.
        log: whether that one is logarithmic; by the numbers if not given.
        marks: levels that are drawn across, by name.
        dots: draw the points, each with its number under the pointer.
    """
    marks, everything = marks or {}, [point for points in series.values() for point in points]
    first, last = min(a for a, _ in everything), max(a for a, _ in everything)
    across = Scale(first, last if last > first else first + 1)
    up = scale_of([b for _, b in everything] + list(marks.values()), log)
    end = WIDTH - (NAMED if marks else RIGHT)
    parts = [*_axes(across, up, x, y, end), *(_mark(name, up, value, end) for name, value in marks.items())]
    for number, (name, points) in enumerate(series.items()):
        places = [(_x(across.at(a), end), _y(up.at(b))) for a, b in points]
        colour = number % COLOURS
        parts.append(Markup('<path class="line s{}" d="{}"/>').format(colour, _path(places)))
        for (a, b), (left, top) in zip(points, places, strict=True) if dots else ():
            dot = '<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}, {} {:g}: {:.4g}</title></circle>'
            parts.append(Markup(dot).format(colour, left, top, name, x, a, b))
    return Picture(_drawing(title, WIDTH, HEIGHT, parts), title, list(series))


def bars(title: str, values: Mapping[str, Sequence[float]], colours: Mapping[str, int], x: str) -> Picture:
    """A bar for each name, logarithmic where all are positive, with the mean of its numbers and their spread.

    Args:
        title: of the picture.
        values: numbers, one or more, by name.
        colours: number of the series whose colour each name has.
        x: what the bars say.
    """
    means = {name: sum(found) / len(found) for name, found in values.items()}
    every = [number for found in values.values() for number in found]
    log = min(every) > 0
    across = Scale(min(every) * 0.7, max(every) * 1.3, log) if log else Scale(0.0, max(*every, 1.0))
    longest = max(map(len, values))
    left, step = 20 + 6.8 * longest, 24
    width = WIDE - left - 90
    parts: list[Markup] = []
    for number, (name, found) in enumerate(values.items()):
        top, end = TOP + number * step, width * across.at(means[name])
        colour = colours[name] % COLOURS
        text = f"{means[name]:.2f}" + (f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else "")
        bar = '<rect class="bar s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" rx="2"/>'
        parts.append(Markup(bar).format(colour, left, top, max(end, 1.0)))
        parts.append(_text(name, left - 8, top + 11, "end"))
        parts.append(_text(text, left + end + 6, top + 11, "start", "strong"))
    height = TOP + len(values) * step + 24
    note = f"{x}, logarithmic" if log else x
    parts.append(_text(note, left, height - 8, "start"))
    return Picture(_drawing(title, WIDE, height, parts), title, wide=True)


def heat(title: str, values: Mapping[str, Mapping[int, float]], x: str) -> Picture:
    """A cell for each name and place, the fuller the larger, in proportion.

    Args:
        title: of the picture.
        values: by name, the number at each place that has one.
        x: what the places are.
    """
    largest = max((value for places in values.values() for value in places.values()), default=0.0)
    last = max((place for places in values.values() for place in places), default=0)
    left = 20 + 6.8 * max(map(len, values))
    cell, height = (WIDE - left - RIGHT) / (last + 1), 20
    parts: list[Markup] = []
    for number, (name, places) in enumerate(values.items()):
        top = TOP + number * (height + 2)
        parts.append(_text(name, left - 8, top + 14, "end"))
        for place, value in places.items():
            share = max(value, 0.0) / largest if largest > 0 else 0.0
            rect = '<rect class="cell" x="{:.1f}" y="{}" width="{:.1f}" height="{}" fill-opacity="{:.2f}">'
            parts.append(Markup(rect).format(left + place * cell, top, max(cell - 1, 0.5), height, share))
            parts.append(Markup("<title>{}, {} {}: {:.3g}</title></rect>").format(name, x, place, value))
    bottom = TOP + len(values) * (height + 2)
    shown = range(0, last + 1, max(1, (last + 1) // 15))
    parts += [_text(str(place), left + (place + 0.5) * cell, bottom + 14) for place in shown]
    parts.append(_text(x, left + (WIDE - left) / 2, bottom + 32))
    return Picture(_drawing(title, WIDE, bottom + 40, parts), title, wide=True)


def ridges(title: str, magnitudes: Sequence[Sequence[float]], limit: float, colour: int) -> Picture:
    """A surface as a ridge for each token, the last one at the back.

    Args:
        title: of the picture.
        magnitudes: ``[tokens, channels]``, tokens by their largest one.
        limit: the largest magnitude of all surfaces that are compared.
        colour: number of the series.
    """
    depth, peak, slant = 96.0, 128.0, 52.0
    tokens, width = len(magnitudes), WIDTH - LEFT - RIGHT - slant
    floor = TOP + peak + depth
    parts = [
        _text("channel", LEFT + width / 2, floor + 22),
        _text("token, largest at the back", LEFT + width + slant, floor + 22, "end"),
        Markup('<path class="grid" d="M{0} {1:.1f}V{2:.1f}"/>').format(LEFT - 8, floor - peak, floor),
        _text(f"{limit:.3g}", LEFT - 12, floor - peak + 4, "end"),
        _text("0", LEFT - 12, floor + 4, "end"),
    ]
    for token in reversed(range(tokens)):
        share, row = token / max(tokens - 1, 1), magnitudes[token]
        left, ground = LEFT + slant * share, floor - depth * share
        step = width / max(len(row) - 1, 1)
        places = [(left + n * step, ground - peak * min(v / limit, 1.0)) for n, v in enumerate(row)]
        closed = f"{_path(places)}V{ground:.1f}H{left:.1f}Z"
        parts.append(Markup('<path class="ridge s{}" d="{}"/>').format(colour % COLOURS, closed))
    return Picture(_drawing(title, WIDTH, int(floor) + 32, parts), title)


def _axes(across: Scale, up: Scale, x: str, y: str, end: int) -> Iterable[Markup]:
    for value in up.ticks():
        place = _y(up.at(value))
        yield Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, place, end)
        yield _text(f"{value:g}", LEFT - 6, place + 4, "end")
    for value in across.ticks():
        if value == int(value):  # Steps and layers.
            yield _text(f"{value:g}", _x(across.at(value), end), HEIGHT - BOTTOM + 17)
    yield _text(x, (LEFT + end) / 2, HEIGHT - 6)
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield Markup('<text transform="translate(13 {:.1f}) rotate(-90)" class="middle">{}</text>').format(middle, y)


def _mark(name: str, up: Scale, value: float, end: int) -> Markup:
    place = _y(up.at(value))
    line = Markup('<path class="mark" d="M{} {:.1f}H{}"/>').format(LEFT, place, end)
    return line + _text(name, end + 5, place + 4, "start")


def _text(text: str, x: float, y: float, anchor: str = "middle", style: str = "") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" class="{} {}">{}</text>').format(x, y, anchor, style, text)


def _drawing(title: str, width: int, height: int, parts: Iterable[Markup]) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return opening + Markup("").join(parts) + Markup("</svg>")


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _x(share: float, end: int) -> float:
    return LEFT + share * (end - LEFT)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
