"""Line plots as SVG, drawn by hand so that the benchmarks need no plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {"l1": "#1f77b4", "l2": "#2ca02c", "activation": "#d62728", "random": "#7f7f7f"}
WIDTH, HEIGHT = 430, 330  # of one panel
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 44
LEGEND_HEIGHT = 30
TICKS = 5

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """`curves` by (criterion, with repair): points of share removed and metric; both in [0, 1]."""

    title: str
    metric: str
    curves: Mapping[tuple[str, bool], Points]


def render_svg(panels: Sequence[Panel]) -> str:
    """The panels side by side over one legend; solid lines are with repair, dashed ones without."""
    width, height = WIDTH * len(panels), HEIGHT + LEGEND_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, panel in enumerate(panels):
        parts.append(f'<g transform="translate({index * WIDTH} 0)">{_panel(panel)}</g>')
    return "\n".join([*parts, _legend(), "</svg>", ""])


def _panel(panel: Panel) -> str:
    high = max(value for points in panel.curves.values() for _, value in points)
    right = max(share for points in panel.curves.values() for share, _ in points)
    top = min(1.0, high * 1.05)

    def x(share: float) -> float:
        return LEFT + share / right * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(TICKS + 1):
        value = top * tick / TICKS
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for share in sorted({share for points in panel.curves.values() for share, _ in points}):
        parts.append(f'<text x="{x(share):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{share:.0%}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">channels removed; '
        f"{escape(panel.metric)}</text>"
    )
    for (criterion, repaired), points in panel.curves.items():
        path = " ".join(f"{x(share):.1f},{y(value):.1f}" for share, value in points)
        dash = "" if repaired else ' stroke-dasharray="5 4" opacity="0.7"'
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[criterion]}" stroke-width="2"{dash}/>')
    return "\n".join(parts)


def _legend() -> str:
    y = HEIGHT + LEGEND_HEIGHT / 2
    parts = [
        f'<g><line x1="{LEFT + index * 76}" x2="{LEFT + index * 76 + 18}" y1="{y}" y2="{y}" stroke="{colour}" '
        f'stroke-width="2"/><text x="{LEFT + index * 76 + 22}" y="{y + 4}">{name}</text></g>'
        for index, (name, colour) in enumerate(COLOURS.items())
    ]
    parts.append(f'<text x="{LEFT}" y="{y + 4 + 14}" font-size="10">solid: with repair, dashed: without</text>')
    return "".join(parts)
