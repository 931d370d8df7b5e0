"""Line charts as inline SVG: text in, text out."""

import math
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 270, 66, 34, 26, 16
_COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#475569")
_MANY, _FEW = 60, 12  # points of a line that is smoothed, and of one whose points are marked


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of round values from 10**low to 10**high: 1, 2, 5 times powers of ten; evenly spaced within a decade."""
    if high - low < 1:
        return [math.log10(value) for value in ticks(10**low, 10**high)]
    logs = [math.log10(m) + decade for decade in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    logs = [y for y in logs if low <= y <= high]
    return logs if len(logs) <= 9 else [y for y in ticks(low, high) if y == int(y)]


def smoothed(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of windows of a twentieth of the line, each at its own middle."""
    half = max(1, len(line) // 40)
    windows = [line[max(0, i - half) : i + half + 1] for i in range(len(line))]
    return [(x, sum(y for _, y in w) / len(w)) for (x, _), w in zip(line, windows, strict=True)]


def line_chart(series: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, log_y: bool = False) -> str:
    """One chart with a line for each name in `series`: points (x, y), x a whole number, those that are not finite left out.

    A line of many points is drawn faint, under its running mean; the points of a short one are marked.
    """
    points = {n: [(x, y) for x, y in line if math.isfinite(y) and (y > 0 or not log_y)] for n, line in series.items()}
    points = {n: line for n, line in points.items() if line}
    if not points:
        return f'<p class="empty">{escape(y_label)}: nothing recorded</p>'
    scale = math.log10 if log_y else float
    xs = [x for line in points.values() for x, _ in line]
    ys = [scale(y) for line in points.values() for _, y in line]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, pad = (x1 if x1 > x0 else x0 + 1), (y1 - y0) * 0.05 or 0.5
    y0, y1 = y0 - pad, y1 + pad

    def px(x):
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def py(y):
        return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _BOTTOM - _TOP)

    def polyline(line, colour, style):
        path = " ".join(f"{px(x):.1f},{py(scale(y)):.1f}" for x, y in line)
        return f'<polyline fill="none" stroke="{colour}" {style} points="{path}"/>'

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for y in log_ticks(y0, y1) if log_y else ticks(y0, y1, 6):
        shown = f"{10**y:.3g}" if log_y else f"{y:g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{shown}</text>')
    for x in (x for x in ticks(x0, x1, 8) if x == int(x)):
        parts.append(f'<text x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    for i, (name, line) in enumerate(points.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        if len(line) > _MANY:
            parts.append(polyline(line, colour, 'stroke-width=".8" opacity=".3"'))
            line = smoothed(line)
        parts.append(polyline(line, colour, 'stroke-width="1.8"'))
        if len(line) <= _FEW:
            parts += [f'<circle cx="{px(x):.1f}" cy="{py(scale(y)):.1f}" r="2.5" fill="{colour}"/>' for x, y in line]
        # The legend stands above the plot, where no line can cross it.
        parts.append(f'<text x="{_LEFT + 90 * i}" y="12" fill="{colour}">━ {escape(name)}</text>')
    return "".join([*parts, "</svg>"])
