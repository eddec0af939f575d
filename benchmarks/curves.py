"""Line plots as SVG, drawn by hand so that the benchmarks need no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = {"l1": "#1f77b4", "l2": "#2ca02c", "activation": "#d62728", "random": "#7f7f7f"}
WIDTH, HEIGHT = 430, 330  # of one panel
LEFT, RIGHT, TOP, BOTTOM = 44, 24, 34, 44
LEGEND_HEIGHT = 30
LEGEND_STEP = 92
LEAST_WIDTH = 640  # of the legend
TICK = 0.2

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """`curves` by (criterion, with repair): points of share removed and metric; both in [0, 1]."""

    title: str
    metric: str
    curves: Mapping[tuple[str, bool], Points]


def render_svg(panels: Sequence[Panel]) -> str:
    """The panels side by side over one legend; solid lines are with repair, dashed ones without."""
    width, height = max(WIDTH * len(panels), LEAST_WIDTH), HEIGHT + LEGEND_HEIGHT
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
    ticks = math.ceil(high / TICK)
    top = ticks * TICK

    def x(share: float) -> float:
        return LEFT + share / right * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{escape(panel.title)}</text>']
    for tick in range(ticks + 1):
        value = TICK * tick
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
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
    parts = []
    for index, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * LEGEND_STEP
        parts.append(
            f'<line x1="{x}" x2="{x + 18}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{x + 22}" y="{y + 4}">{name}</text>'
        )
    x = LEFT + len(COLOURS) * LEGEND_STEP
    parts.append(f'<text x="{x}" y="{y + 4}">solid: with repair, dashed: without</text>')
    return "".join(parts)
