"""Running a model and looking inside: activations of the main graph, one sample at a time.

    extract      a part of a model as a model of its own: what all others run
    taps         from a feed to what some values hold then
    stream       the same over data, sample by sample
    portions     how much of a model is looked at together
    wavefront    a model in pieces, so that layers may change between them
    shapes       the shape of every value, branches of If included

Memory holds the model and what one sample makes of it, or a few samples where that is little, however many there are;
Wavefront keeps more, by budget. Whoever looks at many values of large samples takes them in portions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

import onnx_ir

from modelpress_compression.graph.padding import counted_positions, without_padding
from modelpress_compression.graph.watch.extract import extract
from modelpress_compression.inputs import Array, Feeds, InputData, values_bytes
from modelpress_compression.model import Model
from modelpress_compression.parallel import map_ahead
from modelpress_compression.runtime import run, session_of

Taps = Callable[[Feeds], dict[str, Array]]
Listener = Callable[[float], None]  # is told the share of the samples that is done


def observable(value: onnx_ir.Value | None, model: Model) -> bool:
    """Whether the value can be looked at: it has a name and is computed in, or given to, the main graph."""
    if value is None or not value.name:
        return False
    producer = value.producer()
    return value.is_graph_input() if producer is None else producer.graph is model.graph


@contextmanager
def taps(model: Model, names: Sequence[str], *, optimize: bool = True) -> Iterator[Taps]:
    """A function from a feed to what these values of the main graph hold then; only what they need is computed.

    `optimize`: as in `open_session`. Raises ModelNotRunnableError, UnsupportedOperatorError.
    """
    computed = {value.name for node in model.graph for value in node.outputs}
    wanted = sorted({name for name in names if name in computed})
    given = sorted({name for name in names if name not in computed})
    if not wanted:
        yield lambda feed: {name: feed[name] for name in given}
        return
    with session_of(extract(model, wanted), optimize=optimize) as session:
        yield lambda feed: {**{name: feed[name] for name in given}, **run(session, feed)}


def stream(
    model: Model,
    names: Sequence[str],
    samples: InputData,
    check_time: Callable[[], None],
    done: Listener | None = None,
    *,
    padding: bool = True,
) -> Iterator[dict[str, Array]]:
    """What these values of the main graph hold, for one sample (or the model's fixed batch) after the other.

    `padding=False` takes away positions that an attention mask leaves out, and with them the axis of samples.

    Nothing of a sample is kept here once it is handed out, and what was handed out is emptied before the next sample
    runs: who wants more of it keeps the arrays. Where activations are small, the next samples run while the caller
    works on one (parallel.map_ahead). Raises ModelNotRunnableError, UnsupportedOperatorError, and what `check_time`
    raises.
    """
    count = 0
    with taps(model, names) as look:

        def counted(feed: Feeds) -> dict[str, Array]:
            mask = None if padding else counted_positions(feed)
            return {name: without_padding(array, mask) for name, array in look(feed).items()}

        with closing(map_ahead(counted, samples.feeds(batch_size=1), values_bytes)) as seen:
            for values in seen:
                check_time()
                yield values
                values.clear()
                count += samples.feed_size
                if done is not None:
                    done(min(1.0, count / len(samples)))
