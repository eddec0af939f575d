"""A console of rich whose text cannot steer the terminal; only its own styles do."""

from __future__ import annotations

from collections.abc import Iterable

from modelpress_protos.printable import printable
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from modelpress_client.cli.units import LAYOUT


class SafeConsole(Console):
    """What is rendered goes through `printable`; styles and cursor movements of rich stand beside the text."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of safe text."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text, keep=LAYOUT), style)
