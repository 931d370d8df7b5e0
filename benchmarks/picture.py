"""The share of the machine's limit that every case reached, drawn: SVG by ourselves, PNG where cairosvg is installed."""

from html import escape
from pathlib import Path

_COLOURS = {"float32": "#d97706", "bf16": "#2563eb", "int8": "#7c3aed", "read": "#059669"}
_NAMES = {"float32": "float32 FMA", "bf16": "bf16 products", "int8": "int8 products", "read": "reading memory"}
_ROW, _LEFT, _BAR, _RIGHT, _TOP = 20, 470, 400, 170, 66


def draw(results: list, headline: str) -> str:
    """One bar a case that has a limit: ours in the limit's colour, the peer a black mark, the ratio beside it."""
    shown = [r for r in results if r.share is not None]
    width, height = _LEFT + _BAR + _RIGHT, _TOP + _ROW * len(shown) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="12" y="20" font-size="14" font-weight="bold">Share of the limit</text>',
        f'<text x="12" y="38" fill="#475569">{escape(headline)}</text>',
    ]
    x = 12
    for kind in (k for k in _NAMES if any(r.peak == k for r in shown)):
        parts.append(f'<rect x="{x}" y="46" width="10" height="10" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 14}" y="55">{_NAMES[kind]}</text>')
        x += 130
    if any(r.peer_share for r in shown):
        parts.append(f'<rect x="{x}" y="45" width="3" height="12" fill="black"/><text x="{x + 8}" y="55">the peer</text>')
    for share in range(0, 101, 25):
        at = _LEFT + _BAR * share / 100
        parts.append(f'<line x1="{at}" x2="{at}" y1="{_TOP - 2}" y2="{height - 22}" stroke="#cbd5e1"/>')
        parts.append(f'<text x="{at}" y="{height - 8}" text-anchor="middle" fill="#475569">{share} %</text>')
    for i, r in enumerate(shown):
        y = _TOP + _ROW * i
        name = r.name if len(r.name) <= 72 else r.name[:71] + "…"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        length = _BAR * min(r.share, 1.0)
        parts.append(f'<rect x="{_LEFT}" y="{y + 2}" width="{length:.1f}" height="{_ROW - 6}" fill="{_COLOURS[r.peak]}"/>')
        if r.peer_share:
            at = _LEFT + _BAR * min(r.peer_share, 1.0)
            parts.append(f'<rect x="{at - 1.5:.1f}" y="{y}" width="3" height="{_ROW - 2}" fill="black"/>')
        told = f"{100 * r.share:.0f} %" + (f", {r.ratio:.2f}x {r.peer_name}" if r.ratio else "")
        parts.append(f'<text x="{_LEFT + _BAR + 8}" y="{y + 13}">{escape(told)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def check(path: Path) -> None:
    """Raises ValueError if no picture can be written there; called before anything is measured."""
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"--picture is {path}, want a name that ends in .svg or .png")
    if path.suffix == ".png":
        try:
            import cairosvg  # noqa: F401
        except ImportError:
            raise ValueError(
                f"--picture is {path}: a PNG needs cairosvg (pip install cairosvg); an .svg needs nothing"
            ) from None


def write(path: Path, svg: str) -> None:
    """Writes the picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.suffix == ".png":
        import cairosvg

        cairosvg.svg2png(bytestring=svg.encode(), write_to=str(part))
    else:
        part.write_text(svg)
    part.replace(path)
