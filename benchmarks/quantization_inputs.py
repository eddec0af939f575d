"""Inputs for trained models that come without any: pages and crops of text lines, first and last bytes of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from modelpress_compression.inputs import Array

LINES_A_PAGE = 8
PAGES = 40
PAGE_HEIGHT, PAGE_WIDTH = 448, 384
CROPS = 400
CROP_WIDTH = 192
FILES = 400
HALF = 1024  # bytes from either end of a file
PADDING = 256  # the value after the last byte
# Of ImageNet, as PaddleOCR's detection takes them.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)


def pages(models: Path) -> dict[str, Array]:
    """Pages of eight text lines at random places, [N, 3, H, W] as PP-OCR's detection takes them."""
    images, widths = _lines(models)
    rng = np.random.default_rng(0)
    made = np.full((PAGES, PAGE_HEIGHT, PAGE_WIDTH, 3), 235, np.uint8)
    for index in range(PAGES):
        chosen = rng.choice(len(images), LINES_A_PAGE, replace=False)
        for row, line in enumerate(chosen):
            top = row * (PAGE_HEIGHT // LINES_A_PAGE) + int(rng.integers(0, 9))
            left = int(rng.integers(0, PAGE_WIDTH - widths[line] + 1))
            made[index, top : top + 48, left : left + widths[line]] = images[line, :, : widths[line]]
    scaled = (made.astype(np.float32) / 255 - MEAN) / DEVIATION
    return {"x": np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))}


def line_crops(models: Path) -> dict[str, Array]:
    """The left ends of text lines, every second one upside down, [N, 3, 48, 192] for PP-OCR's direction model."""
    images, widths = _lines(models)
    crops = np.zeros((CROPS, 48, CROP_WIDTH, 3), np.float32)
    for index in range(CROPS):
        width = min(int(widths[index]), CROP_WIDTH)
        line = images[index, :, :width]
        upside_down = (index // 2) % 2 == 1
        crops[index, :, :width] = (line[::-1, ::-1] if upside_down else line) / 127.5 - 1
    return {"x": np.ascontiguousarray(crops.transpose(0, 3, 1, 2))}


def _lines(models: Path) -> tuple[Array, np.ndarray]:
    with np.load(models / "data" / "ocr_lines.npz") as data:
        return data["x"], data["w"]


def file_bytes(models: Path) -> dict[str, Array]:
    """First and last 1,024 bytes of files of this repository and of installed packages, int32 [N, 2048] for magika."""
    rows = [_ends(path.read_bytes()) for path in _some_files()]
    return {"bytes": np.stack(rows)}


def _some_files() -> list[Path]:
    """As many kinds of files as there are, and not more of one kind than needed; the same ones on every call."""
    roots = (Path(__file__).parents[1], Path(np.__file__).parents[1])
    by_suffix: dict[str, list[Path]] = {}
    for root in roots:
        # Parts of names starting with a dot are tools' caches.
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            same = by_suffix.setdefault(path.suffix, [])
            if len(same) < FILES // 6 and not hidden and path.is_file() and path.stat().st_size >= 64:
                same.append(path)
    turns = range(max(len(paths) for paths in by_suffix.values()))
    found = [paths[turn] for turn in turns for _, paths in sorted(by_suffix.items()) if turn < len(paths)]
    return found[:FILES]


def _ends(content: bytes) -> Array:
    row = np.full(2 * HALF, PADDING, np.int32)
    first, last = content.lstrip()[:HALF], content.rstrip()[-HALF:]
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * HALF - len(last) :] = np.frombuffer(last, np.uint8)
    return row
