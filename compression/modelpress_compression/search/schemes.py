"""What quantization is tried on one float model for a goal, and in which order.

    stored      weights in 8 bits or float16, computing in float32: what every model gets; for `accurate` once more,
                closer than anybody could tell
    in 8 bits   half precision, dynamic and static quantization where the target has kernels for them, mixed with
                float32 in a far search; then all of these with the other weights stored
    in blocks   weights in 8, 4 and 2 bits that products read as they are: where size counts

How each of them is built: quantization.py. A short time is for what was asked for, so that the last two change places
where the goal is about size; for `smallest` arithmetic waits until everything else has been tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from modelpress_compression.measure.task import GivenScores
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.recipe import ACCURATE, BALANCED, SMALLEST, Goal, Recipe
from modelpress_compression.search.candidates import Candidate
from modelpress_compression.search.judge import FLOAT_FLOOR_DB
from modelpress_compression.search.mixed_bits import MixedBitsSearch
from modelpress_compression.search.mixed_schemes import MixedSchemeSearch
from modelpress_compression.search.quantization import CLOSE_FLOOR_DB, SchemeSearch

WEIGHT_ONLY = QuantizeConfig(scheme="weight_only")
_IN_4_BITS = "4 bits in blocks"


@dataclass
class Schemes:
    """On the model of `search`, to which the candidates go. `whole`: nothing was cut from it. `far`: whether the search
    goes as far as it can. `bits`: the search for mixed bits, once there was one."""

    search: SchemeSearch
    recipe: Recipe
    goal: Goal
    whole: bool
    far: bool
    bits: MixedBitsSearch | None = None

    def candidates(self) -> Iterator[None]:
        """Adds those of one scheme after the other. Raises ModelNotRunnableError, TimeLimitError."""
        yield from self._stored()
        parts = (self._in_blocks, self._in_8_bits) if self.recipe.size_first else (self._in_8_bits, self._in_blocks)
        for part in parts[:1] if self.waits else parts:
            yield from part()

    def rest(self) -> Iterator[None]:
        """Adds what is no smaller than stored weights, where nothing but size counts: once all else has been tried."""
        if self.waits:
            yield from self._in_8_bits()

    @property
    def waits(self) -> bool:
        """Whether some are left for `rest`."""
        return self.far and self.goal.objective == SMALLEST

    def further(self) -> Iterator[None]:
        """Adds those that a far search has besides, where the others are there."""
        self.far = True
        begun = len(self.search.candidates)
        yield from self._mixed_schemes()
        if mixed := self.search.candidates[begun:]:
            self.search.smaller(mixed)
        yield from self._mixed_bits()

    def _stored(self) -> Iterator[None]:
        """Weights in fewer bits, computing in float32."""
        search = self.search
        search.context.progress(0.0, "storing weights in fewer bits")
        floors = {"weights stored in fewer bits, computing in float32": FLOAT_FLOOR_DB}
        if self.goal.objective == ACCURATE and self.whole:
            floors["weights stored so that nobody could tell"] = CLOSE_FLOOR_DB
        for variant, floor_db in floors.items():
            search.stored(variant, floor_db)
            yield

    def _in_8_bits(self) -> Iterator[None]:
        """Arithmetic in 8 bits, or in half precision, and the same with all weights stored in fewer bits."""
        search = self.search
        stored = [candidate for candidate in search.candidates if "blocks" not in candidate.variant]
        begun = len(search.candidates)
        search.half()
        search.dynamic()
        yield
        search.static()
        yield
        yield from self._mixed_schemes()
        search.smaller([*stored, *search.candidates[begun:]])
        yield

    def _in_blocks(self) -> Iterator[None]:
        """Weights in blocks of 8, 4 and 2 bits."""
        if not self._wants_size or not (self.whole or self.far):
            return
        self._add_in_blocks(WEIGHT_ONLY, "8 bits in blocks")
        yield
        if not self.far:
            self._in_4_bits(replace(WEIGHT_ONLY, weights="int4"))
            yield
            return
        # The prices of bits take long, and may not be through in time.
        in_4_bits = replace(WEIGHT_ONLY, weights="int4")
        nearest = self._add_in_blocks(replace(in_4_bits, rounding="nearest"), f"{_IN_4_BITS}, to the nearest")
        yield
        yield from self._mixed_bits()
        yield from self._rounded_well(in_4_bits, nearest)

    def _rounded_well(self, config: QuantizeConfig, nearest: Candidate) -> Iterator[None]:
        """4 bits for all, rounded by the data, where no mix that keeps the answers is as small as these are to the
        `nearest` level. Prices tell answers only to within some decibels, and streams are rotated here."""
        search = self.search
        mixed = (one.size_bytes for one in search.candidates if not one.reason or one.unscored)
        if nearest.reason and search.context.data.provided and nearest.size_bytes < min(mixed, default=math.inf):
            self._add_in_blocks(config, _IN_4_BITS)
            yield

    def _add_in_blocks(self, config: QuantizeConfig, variant: str) -> Candidate:
        search = self.search
        return search.add("weight_only", partial(Quantize(config), search.model, search.context), variant)

    def _in_4_bits(self, config: QuantizeConfig) -> None:
        """Rounding them well takes a fifth of the search, and where 8 bits are faster they are hardly ever taken: so it
        waits until size and times speak for them."""
        search, variant = self.search, _IN_4_BITS
        if not search.context.data.provided or isinstance(search.judge.task, GivenScores):
            self._add_in_blocks(config, variant)
            return
        well, nearest = (
            partial(Quantize(one), search.model, search.context)
            for one in (config, replace(config, rounding="nearest"))
        )
        search.add_draft("weight_only", nearest, well, variant)

    def _mixed_schemes(self) -> Iterator[None]:
        """A far search's mixes of layers in 8 bits and in float32."""
        if self.far and self.search.context.data.vouches:
            for _ in MixedSchemeSearch(self.search).candidates():
                yield

    def _mixed_bits(self) -> Iterator[None]:
        """A far search's mixes of bits, where size is wanted."""
        if self._wants_size:
            self.bits = MixedBitsSearch(self.search)
            for _ in self.bits.candidates():
                yield

    @property
    def _wants_size(self) -> bool:
        return self.goal.objective == BALANCED or self.recipe.size_first
