"""The loss of a written model, in onnxruntime: what counts in the end is the file that is delivered."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modelpress_compression.graph.watch import taps
from modelpress_compression.inputs import Feeds
from modelpress_compression.model import Model
from modelpress_compression.passes.distill.objective import Objective, tensors
from modelpress_compression.passes.distill.samples import Samples
from modelpress_compression.passes.distill.teacher import Teacher
from modelpress_compression.passes.distill.training import judged


def written_loss(model: Model, original: Model, objective: Objective, samples: Samples) -> float:
    """Mean loss of the outputs on the samples that judge. Raises ModelNotRunnableError, UnsupportedOperatorError."""
    names = objective.output_names
    with taps(original, names) as theirs, taps(model, names) as mine:

        def run(inputs: Feeds) -> Mapping[str, Tensor]:
            return tensors(mine(inputs), torch.device("cpu"))

        return judged(samples.judging(), Teacher(theirs), objective, run)
