"""Calibration: run batches, let the estimators see activations, and turn ranges into grids."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice

import torch
from torch import fx

from fxquant.errors import CalibrationError, FxquantError
from fxquant.graph.batches import Batch, as_arguments, placeholder_values
from fxquant.graph.constants import Constants
from fxquant.graph.module import AT_REST, AT_WORK, ProgramModule
from fxquant.graph.program import Note, NoteKind, Program, Stage, describe
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.live_batch_norm import BatchNormShift
from fxquant.numerics.lockstep import in_step
from fxquant.progress import track


def calibrate(
    program: Program,
    batches: Iterable[Batch],
    *,
    max_batches: int | None = None,
    through_quantizers: bool = False,
    progress: bool = True,
) -> None:
    """Estimate the range of every activation from `batches`, and compute every grid; the program is then CALIBRATED.

    A FakeQuant that is FROZEN (encodings loaded with freeze=True) or OFF keeps its mode and its grid.

    Arguments:
        program: at stage INSERTED, or CALIBRATED to calibrate afresh.
        batches: any iterable of tensors, tuples or lists of tensors, or dicts of keywords.
        max_batches: stop after so many.
        through_quantizers: False: every estimator sees float activations, as if nothing were quantized. True: it sees
            what the quantizers before it leave: weights are quantized, an activation is first observed and then
            quantized on the extremes that its estimator has seen so far, and what is frozen is quantized on its grid.
            Biases stay in float, and so does a value whose grid another value owns (concatenations).
        progress: show a progress bar when standard error is a terminal.

    After `fxquant.synchronise` all processes calibrate together: their i-th batches count as one, and who has fewer
    batches waits for the others.

    Raises CalibrationError: wrong stage, no batches, NaN or Inf (which value, which batch), values without a range.
    The program's grids are as before if it raises before the ranges are complete.
    """
    _require_calibratable(program, batches)
    require_finite_parameters(program)
    owners = _owners(program)
    with _observing(program, through_quantizers):
        count = _observe(program, owners, batches, max_batches, progress)
        if count == 0:
            raise CalibrationError(
                "calibrate", expected="at least one batch", got="none", remedy="Is the iterator used up?"
            )
        _require_observed(owners)
    for _, module in owners:
        module.compute_encoding()
    _follow_weights(program)
    settle_biases(program)
    _follow_at_work(program)
    engage(program)
    program.stage = Stage.CALIBRATED


def _require_calibratable(program: Program, batches: Iterable[Batch]) -> None:
    if isinstance(batches, torch.Tensor):
        remedy = "Put it in a list: [batch]; a bare tensor would be taken apart along its first axis."
        raise CalibrationError("calibrate", expected="an iterable of batches", got="a tensor", remedy=remedy)
    if program.stage not in (Stage.INSERTED, Stage.CALIBRATED):
        remedy = (
            "Run the pipeline's prepare passes first."
            if program.stage < Stage.INSERTED
            else "Calibrate before finalize."
        )
        raise CalibrationError(
            "calibrate", expected="a program at stage inserted or calibrated", got=str(program.stage), remedy=remedy
        )


def engage(program: Program) -> None:
    """Begin to move and learn ranges, from the grids as they are, where the specs ask for it."""
    for _, module in program.fake_quant_nodes():
        if module.mode is Mode.FAKE:
            module.engage()


def _owners(program: Program) -> list[tuple[fx.Node, FakeQuant]]:
    """The node that owns each activation's FakeQuant, with the module, where the grid is to be calibrated."""
    return [
        (node, module)
        for node, module in program.fake_quant_nodes()
        if not module.follows and node.kwargs.get("observe", True) and not module.mode.is_settled
    ]


@contextmanager
def _observing(program: Program, through_quantizers: bool) -> Iterator[None]:
    """Activations observed, all else as `through_quantizers` says, module in eval mode.

    On leaving: the training mode that it was in, and all fake that is neither frozen nor off.
    """
    training = [module for module in program.module.modules() if module.training]
    before = [(module, module.mode) for _, module in program.fake_quant_nodes()]
    for module, mode in before:
        module.mode = _mode_while_observing(module.follows, mode, through_quantizers)
        if not mode.is_settled:
            module.estimator.reset()
    program.module.eval()
    try:
        yield
    except BaseException:
        for module, mode in before:
            module.mode = mode
        raise
    else:
        for module, mode in before:
            module.mode = mode if mode.is_settled else Mode.FAKE
    finally:
        for trained in training:
            trained.training = True


def _mode_while_observing(follows: bool, before: Mode, through_quantizers: bool) -> Mode:
    if through_quantizers:
        return before if before.is_settled else Mode.OBSERVE_FAKE
    return Mode.OFF if follows or before.is_settled else Mode.OBSERVE


def _observe(
    program: Program,
    owners: list[tuple[fx.Node, FakeQuant]],
    batches: Iterable[Batch],
    max_batches: int | None,
    progress: bool,
) -> int:
    total = max_batches if max_batches is not None else len(batches) if isinstance(batches, Sized) else None
    count = 0
    estimators = [module.estimator for _, module in owners]
    peers = estimators[0].peers if estimators else None
    shown = track(batches, "calibrating", total=total, show=progress and sys.stderr.isatty())
    fitting = _fitting(program, islice(shown, max_batches))
    with torch.no_grad():
        for batch in in_step(fitting, peers, estimators[0].low.device if estimators else torch.device("cpu")):
            if batch is None:
                for estimator in estimators:  # in the order in which the others' graph runs them
                    estimator.observe(estimator.low.new_empty(0))
            else:
                args, kwargs = as_arguments(batch)
                program.module(*args, **kwargs)
            _require_finite(owners, count)
            count += 1
    return count


def _fitting(program: Program, batches: Iterable[Batch]) -> Iterator[Batch]:
    for index, batch in enumerate(batches):
        _require_fit(program, batch, index)
        yield batch


def _require_fit(program: Program, batch: Batch, index: int) -> None:
    """A batch that does not fit is refused by name before it runs."""
    try:
        placeholder_values(program, batch)
    except FxquantError as err:
        raise CalibrationError(
            f"calibrate: batch {index}: {err.thing}", expected=err.expected, got=err.got, remedy=err.remedy
        ) from err


def _require_finite(owners: list[tuple[fx.Node, FakeQuant]], batch: int) -> None:
    """Ranges after a batch: infinite of the initial sign is 'nothing seen yet'; everything else must be finite."""
    if not owners:
        return
    low = torch.stack([module.estimator.low.amin() for _, module in owners])
    high = torch.stack([module.estimator.high.amax() for _, module in owners])
    bad = ~((torch.isfinite(low) & torch.isfinite(high)) | ((low == float("inf")) & (high == float("-inf"))))
    if not bool(bad.any()):
        return
    value = _source(owners[int(bad.nonzero()[0])][0])
    raise CalibrationError(
        f"calibrate: value '{value.name}' is not finite in batch {batch}",
        place=describe(value),
        expected="finite activations",
        got=f"range [{float(low[bad][0])}, {float(high[bad][0])}]",
        remedy="Check the batch, or leave this value in float by a placement rule.",
    )


def _require_observed(owners: list[tuple[fx.Node, FakeQuant]]) -> None:
    missing = [
        str(node.args[0]) for node, module in owners if module.spec.fixed is None and not module.estimator.has_range
    ]
    if missing:
        remedy = "Are these values empty in every batch, or never computed?"
        raise CalibrationError(
            "calibrate", expected="a range for every value", got=f"none for {', '.join(missing)}", remedy=remedy
        )


def require_ranges(program: Program) -> None:
    """CalibrationError that lists the values whose FakeQuant is not off and has no encoding."""
    missing = [
        str(node.args[0])
        for node, module in program.fake_quant_nodes()
        if module.mode is not Mode.OFF and not module.has_encoding
    ]
    if missing:
        names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise CalibrationError(
            "encodings", expected="a range for every value", got=f"none for {names}", remedy="Calibrate first."
        )


def settle(program: Program) -> list[str]:
    """Compute the weights' grids from the weights as they are, and learned ones from their parameters, but for those
    frozen or off; returns the paths of the FakeQuants that it went to.
    """
    paths = _follow_weights(program)
    settle_biases(program)
    return paths


def _settle_at_rest(module: ProgramModule) -> bool:
    """Training moves biases: let eval mode simulate the weight scales that finalize would raise for them."""
    program = Program(module)
    quantizers = [quantizer for _, quantizer in program.fake_quant_nodes()]
    if not any(program.bias_nodes()) or any(quantizer.scale.is_meta for quantizer in quantizers):
        return True
    is_ready = all(one.mode is Mode.OFF or (one.mode.quantizes and one.has_encoding) for one in quantizers)
    if is_ready:
        settle(program)
    return is_ready


AT_REST.append(_settle_at_rest)


def _settle_at_work(module: ProgramModule) -> None:
    """Let training begin at grids that depend on the parameters alone, not on when one has evaluated last.

    A layer in front of a live batch norm computes with another weight and bias in training mode than those deployed,
    whose floor would only coarsen its grid.
    """
    _settle_at_rest(module)
    program = Program(module)
    for node, bias in program.bias_nodes():
        source, weight_quant = _source(node), bias.sources[1]
        is_live = source.op == "call_module" and isinstance(program.submodule(source), BatchNormShift)
        if is_live and not weight_quant.mode.is_settled:
            weight_quant.scale_floor.zero_()


AT_WORK.append(_settle_at_work)


def _follow_weights(program: Program) -> list[str]:
    constants, paths = Constants(program), []
    for node, module in program.fake_quant_nodes():
        if module.mode.is_settled or not (module.follows or module.mode is Mode.LEARN):
            continue
        module.scale_floor.zero_()  # what an earlier bias needed counts no more
        if module.mode is Mode.LEARN:
            module.sync()
        else:
            module.follow(constants.tensor(_source(node)).to(module.scale.device))
        paths.append(str(node.target))
    return paths


def _follow_at_work(program: Program) -> None:
    """Let the grids of weights that are to be learned begin at the weights as training computes them.

    Behind a gamma of nearly 0 those are far larger than the deployed ones (r' for r, numerics/live_batch_norm.py).
    """
    constants = Constants(program, at_work=True)
    for node, module in program.fake_quant_nodes():
        if module.follows and module.mode is Mode.FAKE and module.range is not None:
            module.follow(constants.tensor(_source(node)).to(module.scale.device))


def hold(program: Program) -> None:
    """Settle grids that are about to be frozen, and let them hold what training computes with, too.

    In front of a live batch norm whose gamma is nearly 0, a grid of the deployed weight alone would cut off the weight
    that is trained (r' for r, numerics/live_batch_norm.py). Learned grids stay as they are learned.
    """
    settle(program)
    constants = Constants(program, at_work=True)
    for node, module in program.fake_quant_nodes():
        if module.follows and not (module.mode.is_settled or module.mode is Mode.LEARN):
            scale, zero_point = module.scale.clone(), module.zero_point.clone()
            module.follow(constants.tensor(_source(node)).to(scale.device))
            is_coarser = module.scale > scale
            module.zero_point.copy_(torch.where(is_coarser, module.zero_point, zero_point))
            module.scale.copy_(torch.where(is_coarser, module.scale, scale))


def _source(node: fx.Node) -> fx.Node:
    """The value that a FakeQuant or BiasFakeQuant node quantizes."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _name(value: fx.Node) -> str:
    return str(value.target) if value.op == "get_attr" else value.name


def require_finite_parameters(program: Program) -> None:
    """No NaN in what the graph reads, no Inf in what is quantized, no negative variance; each is refused by name.

    Inf elsewhere is no error: masks are made of it.
    """
    constants = Constants(program)
    quantized = [_source(node) for node, module in program.fake_quant_nodes() if module.follows]
    for value in (*quantized, *(_source(node) for node, _ in program.bias_nodes())):
        _require(constants.tensor(value), torch.isfinite, _name(value), describe(value), "NaN or Inf")
    for node in program.graph.nodes:
        if node.op == "get_attr":
            _require(program.tensor(node), _is_number, _name(node), describe(node), "NaN")
        elif node.op == "call_module" and program.fake_quant(node) is None:
            for name, tensor in program.submodule(node).state_dict().items():
                _require(tensor, torch.isfinite, f"{node.target}.{name}", describe(node), "NaN or Inf")
                if name == "running_var":
                    _require(tensor, _is_not_negative, f"{node.target}.{name}", describe(node), "negative numbers")


def _require(
    tensor: torch.Tensor, is_right: Callable[[torch.Tensor], torch.Tensor], name: str, place: str, wrong: str
) -> None:
    count = int((~is_right(tensor)).sum()) if tensor.is_floating_point() else 0
    if count:
        raise CalibrationError(
            f"calibrate: parameter or buffer '{name}'",
            place=place,
            expected=f"no {wrong}",
            got=f"{count} of {tensor.numel()}",
            remedy="Mend the checkpoint, or leave the layer in float by a placement rule.",
        )


def _is_number(tensor: torch.Tensor) -> torch.Tensor:
    return ~torch.isnan(tensor)


def _is_not_negative(tensor: torch.Tensor) -> torch.Tensor:
    return tensor >= 0


def settle_biases(program: Program) -> None:
    """Raise the weight scales (per channel) at which a bias code would exceed 2^23, and note each layer that needed it.

    int32 could hold more, but the accumulator adds the products to it: |b| / (sx * sw) <= 2^23. A scale that is frozen
    stays as it is, which is noted as well; one that is off has no bias codes.
    """
    constants = Constants(program)
    for node, module in program.bias_nodes():
        bias, weight_quant = _source(node), module.sources[1]
        floor = module.overflow_floor(constants.tensor(bias).to(weight_quant.scale.device))
        raised = floor > weight_quant.scale
        if weight_quant.mode is Mode.OFF or not bool(raised.any()):
            continue
        if weight_quant.mode is Mode.FROZEN:
            text = f"bias codes of {int(raised.sum())} of {raised.numel()} channels exceed 2^23: the weight is frozen"
            program.add_note(Note(NoteKind.BIAS, _name(bias), text))
            continue
        weight_quant.scale_floor.copy_(torch.maximum(weight_quant.scale_floor, floor * raised))
        weight_quant.scale.copy_(torch.maximum(weight_quant.scale, weight_quant.scale_floor))
        text = (
            f"weight scale of {int(raised.sum())} of {raised.numel()} channels raised: its bias codes stay within 2^23"
        )
        program.add_note(Note(NoteKind.BIAS, _name(bias), text))
