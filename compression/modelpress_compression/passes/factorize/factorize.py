"""Factorization: one product becomes two or three of a lower rank, where these cost less.

    y = x W,    W ~ A B       A [K, r], B [r, O]:  r (K + O) multiplications in the place of K O

`methods` has the algebra of each factorization, `choice` how the ranks come about, `layers` what is left alone. With
data the error that is made least is that of the answers, not of the weight, by the second moments of what each layer
reads in the model as it is; then the last factors are fitted, from the first layer to the last, to what the uncut model
answers (see `passes.repair`), so that each also mends what those before it lost. Without data, or where the samples
say nothing because they are all the same, the weights alone decide.

A layer stays as it is where no factors are cheaper, in multiplications as in parameters. That they are faster as well
does not follow: two small products may take longer than a large one. With `budget_of: latency` layers and factors are
timed on this machine (`timing`), a layer stays whose factors are not faster, and in the end the whole model is timed:
if it is not faster, it stays as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from modelpress_compression.graph.edit import Editor, clean
from modelpress_compression.graph.linear import Matrix
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.read import graph_of, label
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult, Skip, require_data, unmatched_excludes
from modelpress_compression.passes.factorize.choice import Chooser, Option, within_budget
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.layers import Layer, find_layers
from modelpress_compression.passes.factorize.methods import METHODS, Problem, damped
from modelpress_compression.passes.factorize.tables import reads
from modelpress_compression.passes.factorize.timing import Timer, speedup_of
from modelpress_compression.passes.factorize.writer import stored, write
from modelpress_compression.passes.hessians import Hessians
from modelpress_compression.passes.repair.least_squares import Changes, Repair, repair

# Shares of the pass's time that have gone by when methods are chosen, and the factors written.
_CHOSEN, _WRITTEN = 0.5, 0.6
_PLAIN = (
    "Factors were chosen by the weights alone, and not fitted to answers: that needs representative inputs that "
    "differ from each other, and keeps much of what factorizing costs."
)
_NOTHING = "No layer was factorized: the report says of each why."
_OVERFLOWS = "Its factors would exceed the largest number of its type."

Row = Mapping[str, str | int | float]


class Factorize:
    """The pass of `factorize`."""

    def __init__(self, config: FactorizeConfig) -> None:
        self._config = config

    def __call__(self, model: Model, context: Context) -> PassResult:
        """Raises InvalidDataError where the repair needs data and none is given, ModelNotRunnableError,
        TimeLimitError."""
        if self._config.repair == "least_squares":
            require_data("factorize", "repair", self._config.repair, context)
        clone = model.clone()
        timer = Timer(context) if self._config.budget_of == "latency" else None
        context.progress(0.0, "looking for layers to factorize")
        layers, skipped = find_layers(clone, self._config.exclude, sample_shapes(context.data))
        moments = _Moments(clone, layers, context)
        chosen, left, warnings = self._choose(layers, moments, timer, model, context)
        written, details, overflowing = _write(clone, chosen, moments, context)
        skipped = [*skipped, *left, *overflowing]
        warnings = [*warnings, *unmatched_excludes(model, self._config.exclude)]
        if not details:
            return PassResult(model, {}, tuple(skipped), (*warnings, _NOTHING))
        repaired = self._repair(model, clone, written, context)
        if timer is not None and (speedup := speedup_of(model, repaired.model, context)).median <= 1:
            return PassResult(model, {}, (*skipped, *_taken_back(chosen)), (*warnings, _slower(speedup.median)))
        context.progress(1.0, "factorized")
        warnings += [*([] if moments.known else [_PLAIN]), *repaired.warnings]
        return PassResult(
            repaired.model,
            _changes(model, repaired, details, context),
            (*skipped, *repaired.skipped),
            tuple(warnings),
            tuple(details),
        )

    def _choose(
        self, layers: Sequence[Layer], moments: _Moments, timer: Timer | None, model: Model, context: Context
    ) -> tuple[list[tuple[Layer, Option]], list[Skip], list[str]]:
        """What each layer gets, why others stay, and a warning where the budget cannot be met."""
        options: dict[int, list[Option]] = {}
        left: list[Skip] = []
        for number, layer in enumerate(layers):
            context.check_time()
            context.progress(_CHOSEN * number / len(layers), f"factorizing {layer.name}")
            found = Chooser(self._config, layer, moments.of(layer)).options()
            if timer is not None and not isinstance(found, str):
                found = timer.timed(layer, found)
            if isinstance(found, str):
                left.append(Skip(layer.name, found))
            else:
                options[number] = found
        if self._config.budget is None:
            # Under a share of cost the one that errs least; under a share of energy the fastest.
            fastest = timer is not None and self._config.energy is not None
            picked = {n: min(found, key=lambda one: one.ms) if fastest else found[0] for n, found in options.items()}
            return [(layers[number], option) for number, option in picked.items()], left, []
        taken, warnings = self._within(self._config.budget, layers, options, timer, model, context)
        left += [
            Skip(layers[number].name, "The budget is met without it.") for number in options if number not in taken
        ]
        return [(layers[number], option) for number, option in sorted(taken.items())], left, warnings

    def _within(
        self,
        budget: float,
        layers: Sequence[Layer],
        options: Mapping[int, Sequence[Option]],
        timer: Timer | None,
        model: Model,
        context: Context,
    ) -> tuple[dict[int, Option], list[str]]:
        of = self._config.budget_of
        full = {number: _cost(layers[number], of, timer) for number in options}
        total = _total(model, layers, of, timer, context)
        taken = within_budget(options, full, (1 - budget) * total, of)
        left = total - sum(full[number] - option.cost(of) for number, option in taken.items())
        if left <= budget * total:
            return taken, []
        what = {"macs": "multiply-accumulates", "parameters": "parameters", "latency": "layers' time"}[of]
        return taken, [
            f"The budget of {budget:.0%} of the {what} is out of reach: {left / total:.0%} remain with all layers "
            f"factorized as far as they can be. Remove channels as well (prune), or allow more."
        ]

    def _repair(self, model: Model, clone: Model, written: Mapping[str, str], context: Context) -> Repair:
        """The factorized model with its last factors fitted; `written`: names of their weights by node."""
        if self._config.repair == "none" or not context.data.vouches or not written:
            return Repair(clone)

        def progress(share: float, message: str) -> None:
            context.progress(_WRITTEN + (1 - _WRITTEN) * share, message)

        changes = Changes("The last factors", frozenset(written), frozenset(written.values()))
        return repair(model, clone, changes, replace(context, progress=progress))


def _cost(layer: Layer, of: str, timer: Timer | None) -> float:
    if timer is not None:
        return timer.full[layer.name]
    return layer.macs if of == "macs" else layer.parameters


def _total(model: Model, layers: Sequence[Layer], of: str, timer: Timer | None, context: Context) -> float:
    """Of the whole model; of its times, that of the layers which could be measured."""
    if timer is not None:
        return sum(timer.full.values())
    known = count_macs(model, sample_shapes(context.data)).total if of == "macs" else _parameters(model)
    return known if known is not None else sum(layer.macs for layer in layers)


def _taken_back(chosen: Sequence[tuple[Layer, Option]]) -> list[Skip]:
    return [Skip(layer.name, "It was factorized and put back: the whole model was not faster.") for layer, _ in chosen]


def _slower(speedup: float) -> str:
    return (
        f"Factors were taken back: each was faster than its layer, but the model with them ran {speedup:.2f} times as "
        f"fast as before. Its layers run together better as they are."
    )


class _Moments:
    """Second moments of what the layers read, where the data says something of them."""

    def __init__(self, model: Model, layers: Sequence[Layer], context: Context) -> None:
        self.known = context.data.vouches
        names = {layer.weight.name or "" for layer in layers if not layer.is_table}
        self._hessians = Hessians(model, context, names) if self.known and names else None
        self._reads: dict[str, Matrix | None] = {}
        if self.known:
            for layer in layers:
                if layer.is_table:
                    self._reads[layer.name] = reads(model, layer.nodes, layer.inputs, context)

    def of(self, layer: Layer) -> Matrix | None:
        """H [g, K, K], damped, or of a table its diagonal [1, K]; None where the weight alone has to do."""
        if layer.is_table:
            found = self._reads.get(layer.name)
            return None if found is None else found[None]
        if self._hessians is None or isinstance(self._hessians.linear(layer.weight), str):
            return None
        return damped(self._hessians.of(layer.weight))


def _write(
    clone: Model, chosen: Sequence[tuple[Layer, Option]], moments: _Moments, context: Context
) -> tuple[dict[str, str], list[Row], list[Skip]]:
    """Puts factors in the place of layers; the last weights by node, figures by layer, and what could not be held."""
    editor = Editor(clone)
    written: dict[str, str] = {}
    details: list[Row] = []
    skipped = []
    for number, (layer, option) in enumerate(chosen):
        context.check_time()
        context.progress(_CHOSEN + (_WRITTEN - _CHOSEN) * number / len(chosen), f"writing {layer.name}")
        made = METHODS[option.method].factors(Problem(layer, moments.of(layer)), option.ranks)
        arrays = stored(layer, made.stages)
        if arrays is None:
            skipped.append(Skip(layer.name, _OVERFLOWS))
            continue
        details.append(_row(layer, option))
        # The factors of a table are the best there are, of all rows alike: there is nothing to fit.
        is_fitted = graph_of(layer.nodes[0]) is clone.graph and not layer.is_table
        labels = [label(node) for node in layer.nodes]
        weight = write(editor, layer, made.stages, arrays)
        if is_fitted:
            written.update((name, weight) for name in labels)
    clean(clone)
    return written, details, skipped


def _row(layer: Layer, option: Option) -> Row:
    return {
        "layer": layer.name,
        "method": option.method,
        "rank": " x ".join(map(str, option.ranks)),
        "relative_error": option.error,
        "macs_before": layer.macs,
        "macs_after": option.macs,
        **({"ms_after": round(option.ms, 4)} if option.ms else {}),
        "parameters_before": layer.parameters,
        "parameters_after": option.parameters,
    }


def _changes(model: Model, repaired: Repair, details: Sequence[Row], context: Context) -> dict[str, int | float]:
    counts = Counter(str(row["method"]) for row in details)
    changes: dict[str, int | float] = {"layers_factorized": len(details)}
    changes.update({f"{name}_layers": counts[name] for name in METHODS if counts[name]})
    changes["parameters_removed_share"] = 1 - _parameters(repaired.model) / max(1, _parameters(model))
    shapes = sample_shapes(context.data)
    before, after = (count_macs(one, shapes).total for one in (model, repaired.model))
    if before and after is not None:
        changes["macs_removed_share"] = 1 - after / before
    if repaired.fits:
        changes["layers_repaired"] = len(repaired.fits)
    return changes


def _parameters(model: Model) -> int:
    return sum(tensor.size for tensor in model.tensors())
