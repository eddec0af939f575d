"""The error at the outputs of single activations and weights: from gradients where there are any, else by trials."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from modelpress_compression.errors import ModelNotRunnableError
from modelpress_compression.graph.watch import Listener
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.quantize.ranges.gradients import GradientProbe, gradient_probe
from modelpress_compression.passes.quantize.ranges.output_error import Trial, open_probe
from modelpress_compression.passes.quantize.setup import QuantizationSetup
from modelpress_compression.runtime import fit_together

# Of the weights, in a probe: numbers, gradients, and both forms of a weight.
COPIES = 5


class SensitivityProbe:
    """Of one model, that of `setup`. `samples`: a few of the setup's data where None.

    `by_trial`: each is tried out, which takes as many runs as there are trials for each sample.
    """

    def __init__(self, setup: QuantizationSetup, samples: InputData | None = None, *, by_trial: bool = False) -> None:
        self.setup = setup
        self._samples, self._by_trial = samples, by_trial

    def errors(self, trials: Sequence[Trial], done: Listener | None = None) -> list[float] | None:
        """The error of each trial; None: that would take too long or too much memory, or cannot be tried.

        Raises TimeLimitError.
        """
        if not self._fits:
            return None
        found = self._gradients.errors(trials, done) if self._gradients is not None else None
        return self._tried(trials, done) if found is None else found

    def _tried(self, trials: Sequence[Trial], done: Listener | None) -> list[float] | None:
        try:
            with open_probe(self.setup, self._samples) as probe:
                return probe.errors(trials, done)
        except ModelNotRunnableError as error:
            # onnxruntime makes room for what an If gives by shapes that it infers, and for some operators, such as
            # STFT, it infers false ones: the model with its switches does not run, though the model does.
            self.setup.context.log(f"errors at the outputs cannot be tried out: {error.message}")
            return None

    @cached_property
    def _fits(self) -> bool:
        """Whether a probe may be had. Where the data vouches for no ranges, little is lost without one."""
        copies = 2 if self.setup.context.data.vouches else COPIES
        return fit_together([self.setup.model.weight_bytes()] * copies)

    @cached_property
    def _gradients(self) -> GradientProbe | None:
        return None if self._by_trial else gradient_probe(self.setup, self._samples)
