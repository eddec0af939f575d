"""Metric against time as SVG, drawn by hand as in `curves`: a line or a point for each method, time on a log scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#7f7f7f", "#ff7f0e", "#1f77b4", "#d62728", "#2ca02c", "#9467bd")
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 20, 34, 44
LEGEND_ROW = 20
TICKS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300)

Points = Sequence[tuple[float, float]]


def render_svg(title: str, metric: str, curves: Mapping[str, Points], reference: tuple[str, float]) -> str:
    """`curves`: points of (seconds, metric) by method; `reference`: a name and a metric, drawn as a dashed line."""
    points = [point for line in curves.values() for point in line]
    first, last = min(max(s, 0.1) for s, _ in points), max(s for s, _ in points)
    lowest, highest = (extreme(reference[1], *(value for _, value in points)) for extreme in (min, max))
    step = 0.05 if highest - lowest <= 0.45 else 0.1
    low, high = math.floor(lowest / step) * step, math.ceil(highest / step) * step

    def x(seconds: float) -> float:
        share = math.log(max(seconds, 0.1) / first) / max(math.log(last / first), 1e-9)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="20" font-weight="bold">{escape(title)}</text>']
    for tick in range(round((high - low) / step) + 1):
        value = low + step * tick
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>'
        )
    for seconds in TICKS_S:
        if first <= seconds <= last:
            parts.append(f'<text x="{x(seconds):.1f}" y="{HEIGHT - 28}" text-anchor="middle">{seconds:g} s</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">CPU time; {escape(metric)}</text>')
    name, value = reference
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="black" '
        f'stroke-dasharray="5 4"/><text x="{WIDTH - RIGHT}" y="{y(value) - 5:.1f}" text-anchor="end">{name}</text>'
    )
    for index, (method, line) in enumerate(curves.items()):
        colour, row = COLOURS[index % len(COLOURS)], HEIGHT + LEGEND_ROW * (index // 3) + 12
        path = " ".join(f"{x(seconds):.1f},{y(value):.1f}" for seconds, value in sorted(line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="4" fill="{colour}"/>' for s, v in line]
        left = LEFT + index % 3 * 200
        parts.append(f'<circle cx="{left}" cy="{row - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 10}" y="{row}">{escape(method)}</text>')
    height = HEIGHT + LEGEND_ROW * (1 + (len(curves) - 1) // 3)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>", ""])
