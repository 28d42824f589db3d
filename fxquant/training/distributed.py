"""Several processes that train one program (DistributedDataParallel): what is estimated is estimated from all batches.

DistributedDataParallel averages gradients, and with them learned ranges. What does not come from gradients is made the
same by `synchronise`, so that processes with shards of a batch do what one process does with the whole of it:

    calibration       extremes of each batch are those of all shards; histograms are added (numerics/estimators)
    moving averages   the same, step by step (numerics/moving_range.py)
    batch norm        mean and variance of all shards, with their gradients (numerics/peer_statistics.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import _compile, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from fxquant.errors import FxquantError
from fxquant.graph.module import ProgramModule
from fxquant.graph.program import Program, Stage
from fxquant.numerics.fake_quant import FakeQuant, Mode
from fxquant.numerics.live_batch_norm import BatchStatisticsNorm
from fxquant.numerics.peers import Peers
from fxquant.numerics.synchronised_batch_norm import synchronised
from fxquant.numerics.trained_ranges import MovingRange


def synchronise(program: Program, group: dist.ProcessGroup | None = None, *, batch_norm: bool = True) -> None:
    """From now on let the processes of `group` calibrate and train this program together.

    All of them call it, on the same program, before or after calibration and before DistributedDataParallel takes
    `program.module`; then all calibrate, and all train, each with its own shard:

        sim = fxquant.QuantSim(model, example_inputs, "int8_per_channel_qat")
        fxquant.synchronise(sim.program)
        sim.compute_encodings(my_batches)
        model = DistributedDataParallel(sim.model)

    A step in training mode is collective then, and so is a batch of calibration; eval mode and finalize are not. A loss
    that is the mean over shards of one size has the gradients of the mean over the whole batch. Parameters that stand
    still, as learned ranges do once frozen, get gradients of 0: `find_unused_parameters` is not needed for them. An
    optimizer with momentum or weight decay moves such parameters on; nothing reads them: frozen grids are buffers.
    Copies remain synchronised; saved and pickled ones are not, call it again on them. What an earlier call set is
    undone. train_qat is a loop of one process and refuses a synchronised program.

    Arguments:
        group: of torch.distributed; None stands for all processes. A group of one process synchronises nothing.
        batch_norm: normalise by the statistics of all shards. False: each process by its own, as PyTorch's batch norm
            does; processes then end with different statistics, and hence different folded weights.

    Raises FxquantError: no process group, a stage without quantizers or a finalized one, programs that differ.
    """
    if program.stage not in (Stage.INSERTED, Stage.CALIBRATED):
        expected = "a program at stage inserted or calibrated"
        raise FxquantError(
            "synchronise", expected=expected, got=str(program.stage), remedy="Synchronise after prepare."
        )
    found = _peers(group)
    _require_same(program, found)
    peers = found if found.count > 1 else None
    for _, module in program.fake_quant_nodes():
        if not module.follows:
            module.estimator.peers = peers
        if isinstance(module.range, MovingRange):
            module.range.peers = peers
    _synchronise_batch_norms(program, peers if batch_norm else None)
    _watch_idle_parameters(program.module, peers is not None)


def is_synchronised(program: Program) -> bool:
    """Whether `synchronise` made it train together with other processes."""
    return _reach_idle_parameters in program.module._forward_hooks.values()


def _peers(group: dist.ProcessGroup | None) -> Peers:
    if not dist.is_available() or not dist.is_initialized():
        remedy = "Call torch.distributed.init_process_group first (torchrun sets what it asks for)."
        raise FxquantError("synchronise", expected="a process group", got="none in this process", remedy=remedy)
    peers = Peers(group)
    if peers.rank < 0:
        raise FxquantError("synchronise", expected="a group that this process belongs to", got="another one")
    return peers


def _require_same(program: Program, peers: Peers) -> None:
    """Processes whose graphs differ would wait for each other for ever; where weights differ, ranges mean nothing."""
    modes = [module.mode.value for _, module in program.fake_quant_nodes()]
    device = next((tensor.device.type for tensor in program.module.parameters()), "cpu")
    prints = peers.objects((program.fingerprint(), str(program.stage), device, modes))
    other = next((rank for rank, theirs in enumerate(prints) if theirs != prints[0]), None)
    if other is not None:
        raise FxquantError(
            f"synchronise: the programs of processes 0 and {other}",
            expected="the same graph, weights, grids and modes",
            got="different ones",
            remedy="Build them from the same model (torch.manual_seed before it, or one checkpoint) and config.",
        )


def _synchronise_batch_norms(program: Program, peers: Peers | None) -> None:
    twins: dict[int, nn.Module] = {}
    for path, module in list(program.module.named_modules(remove_duplicate=False)):
        if isinstance(module, BatchStatisticsNorm):
            module.peers = peers
        elif isinstance(module, _BatchNorm) and peers is not None:
            twins.setdefault(id(module), synchronised(module, peers))
            program.module.set_submodule(path, twins[id(module)])
    if twins:
        program.recompile()


def _watch_idle_parameters(module: ProgramModule, wanted: bool) -> None:
    hooks = module._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _reach_idle_parameters]:
        del hooks[key]
    if wanted:
        module.register_forward_hook(_reach_idle_parameters)


class _Reached(torch.autograd.Function):
    """The first tensor, from which gradients of 0 reach all the others."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(other.shape, other.dtype, other.device) for other in others]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes)


_reached: Callable[..., torch.Tensor] = _Reached.apply  # torch leaves Function.apply untyped


@_compile._disable_dynamo  # it reads the graph, node by node
def _reach_idle_parameters(module: ProgramModule, _: Any, output: Any) -> Any:
    """A forward hook: DistributedDataParallel waits for every parameter's gradient, be it in use or not."""
    idle = _idle_parameters(module) if torch.is_grad_enabled() else []
    if not idle:
        return output

    def reach(leaf: Any) -> Any:
        return _reached(leaf, *idle) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf

    return pytree.tree_map(reach, output)


def _idle_parameters(module: ProgramModule) -> list[nn.Parameter]:
    """Parameters that ask for a gradient and that no node uses."""
    used: set[int] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            used.add(id(getattr(module.get_submodule(owner), name)))
        elif node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if not isinstance(called, FakeQuant) or called.mode is Mode.LEARN:
                used.update(map(id, called.parameters()))
    return [tensor for tensor in module.parameters() if tensor.requires_grad and id(tensor) not in used]
