"""ProgramModule: a GraphModule that copies, pickles and moves without losing names, ties or meta.

torch's own GraphModule drops aliased root modules when copied, and pickles by re-tracing its code, which renames nodes
and loses their meta. Here the graph is written as a list of records (`graph_to_records`): plain values that JSON can
hold, except `meta`.

    {"op": "call_function", "name": "conv1", "target": "aten.convolution.default",
     "args": {"tuple": [{"node": "x"}, {"node": "conv1_weight"}, None, [1, 1], ...]}, "kwargs": {}, "meta": {...}}
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import _compile, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

import fxquant.numerics.live_batch_norm
import fxquant.numerics.padded_convolution  # noqa: F401  (register operators that a pickled graph may name)
from fxquant.errors import FxquantError
from fxquant.graph.running_graph import running_graph
from fxquant.numerics.estimators import Estimator
from fxquant.numerics.fake_quant import FakeQuant
from fxquant.spec import Target

# What GraphModule derives from the graph, or keeps for tools that do not survive a copy; the rest of __dict__ is state.
_DERIVED = frozenset(
    "_graph _code _lineno_map _prologue_start _in_spec _out_spec _tracer_cls _tracer_extras shape_env "
    "_replace_hooks _create_node_hooks _erase_node_hooks _deepcopy_hooks _form _watched _settled".split()
)

FLOAT = "float"
Form = Callable[..., Any]
# By name, what computes a program's outputs instead of the compiled graph; fxquant.simulation fills it.
FORMS: dict[str, Callable[[ProgramModule, Target], Form]] = {}
# What is done to a program's module in eval mode, before it computes; False: it is not ready for it.
# fxquant.calibration fills it.
AT_REST: list[Callable[[ProgramModule], bool]] = []
# What is done to it when it is put into training mode; fxquant.calibration fills it.
AT_WORK: list[Callable[[ProgramModule], None]] = []


class ProgramModule(fx.GraphModule):
    """The module that computes a graph; its parameters, buffers and submodules are those of `root`, all of them.

    Arguments:
        root: module whose parameters, buffers and submodules the graph refers to by dotted path; shared, not copied.
        graph: what `forward` computes.
        class_name: name that error messages and `print` show.

    Attributes:
        simulation, target: which of FORMS `forward` computes ("float": the graph as compiled), and for which runtime;
            `Program.simulate` sets them. All forms read the same parameters and buffers.
    """

    simulation: str = FLOAT
    target: Target = Target.ONNXRUNTIME_X64

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "ProgramModule") -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name)
        for key, value in root.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                self.__dict__[key] = dict(value)
            elif key == "_non_persistent_buffers_set":
                self.__dict__[key] = set(value)
        self.training = root.training
        self.graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> ProgramModule:
        twin = _build(_plain_class(self), type(self).__name__, copy_graph(self.graph))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin

    def __copy__(self) -> ProgramModule:
        twin = _build(_plain_class(self), type(self).__name__, copy_graph(self.graph))
        twin.__setstate__(self._state())
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (_plain_class(self), type(self).__name__, graph_to_records(self.graph))
        return _rebuild, arguments, self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.recompile()  # what runs depends on the modules that the graph calls

    def recompile(self) -> Any:
        """Compile `forward` from the graph; what other forms derived from the old graph is dropped."""
        graph = self._graph
        self._graph = running_graph(graph, self, copy_graph)
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        compiled = type(self).forward

        @functools.wraps(compiled)
        def forward(self: ProgramModule, *args: Any, **kwargs: Any) -> Any:
            if not self.training and not torch.compiler.is_compiling():
                self._settle_changes()
            if self.simulation == FLOAT:
                return compiled(self, *args, **kwargs)
            return self._run_form(*args, **kwargs)

        type(self).forward = forward
        for derived in ("_form", "_watched", "_settled"):
            self.__dict__.pop(derived, None)
        return code

    @_compile._disable_dynamo  # torch.compile runs a form as it is: it interprets the graph, node by node
    def _run_form(self, *args: Any, **kwargs: Any) -> Any:
        return self._current_form()(*args, **kwargs)

    def _current_form(self) -> Form:
        wanted = (self.simulation, self.target)
        if self.__dict__.get("_form", (None, None))[0] != wanted:
            self.__dict__["_form"] = (wanted, FORMS[self.simulation](self, self.target))
        form: Form = self.__dict__["_form"][1]
        return form

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}

    def train(self, mode: bool = True) -> ProgramModule:
        """Set the mode; eval mode settles what finalize would settle, so that it computes what finalize emits."""
        super().train(mode)
        for begin in AT_WORK if mode else ():
            begin(self)
        self.settle()
        return self

    def settle(self) -> None:
        """In eval mode, settle now what finalize would settle.

        eval() does, and each forward in eval mode that finds a parameter, buffer or range changed; what does not show
        in a tensor's version (`tensor.data.copy_`), or happens between two calls of a compiled module, needs this call.
        """
        if not self.training and sum(settle(self) for settle in AT_REST) == len(AT_REST):  # all of them run
            self.__dict__["_settled"] = self._versions()

    def _settle_changes(self) -> None:
        if self.__dict__.get("_settled") != self._versions():
            self.settle()

    def _versions(self) -> list[tuple[int, int]]:
        """What tells whether a parameter, buffer or range was changed or replaced: identities and versions."""
        if "_watched" not in self.__dict__:
            self.__dict__["_watched"] = [place for module in self.modules() for place in _watched(module)]
        tensors = [table.get(name) for table, name in self.__dict__["_watched"]]
        return [(id(tensor), tensor._version) for tensor in tensors if tensor is not None and not tensor.is_inference()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ProgramModule:
        before = _device_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it without annotations
        after = _device_of(self)
        if before is not None and after is not None and before != after:
            self._move_literals(before, after)
        return self

    def _move_literals(self, before: torch.device, after: torch.device) -> None:
        """Devices that tracing baked into the graph (`arange(..., device="cpu")`) follow the parameters."""

        def move(value: Any) -> Any:
            return after if isinstance(value, torch.device) and value == before else value

        changed = False
        for node in self.graph.nodes:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), move)
            if (args, kwargs) != (node.args, node.kwargs):
                node.args, node.kwargs = args, kwargs
                changed = True
        if changed:
            self.recompile()


def graph_to_records(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes of a graph, in order, as records (see the module's docstring), then one of its calling convention.

    `meta` is a shallow copy of the node's; all else is None, bool, int, float, str, list and dict.
    An argument or target that cannot be written raises FxquantError with the node's name.
    """
    records = [_node_to_record(node) for node in graph.nodes]
    codegen = graph._codegen
    if isinstance(codegen, _PyTreeCodeGen):
        info = codegen.pytree_info
        out_spec = (
            None if info.out_spec is None else [_encode_spec(info.out_spec)]
        )  # in a list: a leaf is written as None
        in_spec = _encode_spec(info.in_spec)
        records.append({"op": "codegen", "names": list(info.orig_args), "in": in_spec, "out": out_spec})
    elif type(codegen) is not CodeGen:
        raise FxquantError("graph", expected="the default or the pytree code generation", got=type(codegen).__name__)
    return records


def graph_from_records(records: Iterable[dict[str, Any]]) -> fx.Graph:
    """The graph that `graph_to_records` wrote: same names, arguments and meta, new nodes."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for record in records:
        if record["op"] == "codegen":
            out_spec = None if record["out"] is None else _decode_spec(record["out"][0])
            graph._codegen = _PyTreeCodeGen(_PyTreeInfo(list(record["names"]), _decode_spec(record["in"]), out_spec))
            continue
        node = _node_from_record(graph, record, nodes)
        nodes[node.name] = node
    return graph


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that shares no node with it; meta dicts are copied, their values (frozen) are shared."""
    return graph_from_records(graph_to_records(graph))


def _node_to_record(node: fx.Node) -> dict[str, Any]:
    try:
        return {
            "op": node.op,
            "name": node.name,
            "target": _encode_target(node.target),
            "args": _encode(node.args),
            "kwargs": _encode(node.kwargs),
            "meta": dict(node.meta),
        }
    except FxquantError as err:
        raise FxquantError(f"node '{node.name}' cannot be written", got=str(err)) from err


def _node_from_record(graph: fx.Graph, record: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    target = _decode_target(record["target"]) if record["op"] == "call_function" else record["target"]
    args, kwargs = _decode(record["args"], nodes), _decode(record["kwargs"], nodes)
    node = graph.create_node(record["op"], target, args, kwargs, name=record["name"])
    if node.name != record["name"]:
        raise FxquantError(
            f"graph records: node '{record['name']}'", expected="a free, legal name", got=f"'{node.name}'"
        )
    node.meta = dict(record["meta"])
    return node


def _encode_target(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if callable(target) and hasattr(target, "__qualname__"):
        return _encode_global(target)
    raise FxquantError("target", expected="an operator overload or an importable function", got=repr(target))


def _decode_target(text: str) -> Any:
    if ":" in text:
        return _decode_global(text)
    namespace, name, overload = text.split(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError as err:
        raise FxquantError(
            f"operator '{text}' is not registered", remedy="Import the library that registers it, then load again."
        ) from err


def _encode_global(value: Any) -> str:
    text = f"{value.__module__}:{value.__qualname__}"
    try:
        found = None if "<" in text else _decode_global(text)
    except (ImportError, AttributeError):
        found = None
    if found is not value:
        raise FxquantError("graph value", expected="something importable by name", got=repr(value))
    return text


def _decode_global(text: str) -> Any:
    module, _, path = text.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_encode(key), _encode(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_encode(item) for item in (value.start, value.stop, value.step)]}
    return _encode_rare(value)


def _encode_rare(value: Any) -> dict[str, Any]:
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, EllipsisType):
        return {"ellipsis": None}
    if isinstance(value, type):
        return {"class": _encode_global(value)}
    raise FxquantError("value", expected="a number, string, node, dtype, device or a nest of them", got=repr(value))


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, item),) = value.items()
    if kind == "node":
        return nodes[item]
    if kind == "dict":
        return {_decode(key, nodes): _decode(entry, nodes) for key, entry in item}
    if kind == "tuple":
        return tuple(_decode(entry, nodes) for entry in item)
    if kind == "slice":
        return slice(*(_decode(entry, nodes) for entry in item))
    return _DECODERS[kind](item)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "torch": lambda name: getattr(torch, name),
    "device": torch.device,
    "complex": lambda parts: complex(*parts),
    "ellipsis": lambda _: ...,
    "class": _decode_global,
}


def _encode_spec(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return None
    children = [_encode_spec(child) for child in spec.children()]
    return {"type": _encode_global(spec.type), "context": _encode(spec.context), "children": children}


def _decode_spec(record: Any) -> pytree.TreeSpec:
    if record is None:
        return pytree.treespec_leaf()
    kind = _decode_global(record["type"])
    if kind not in pytree.SUPPORTED_NODES:
        raise FxquantError(
            f"type '{record['type']}' of a program's inputs or outputs is not registered with torch's pytrees",
            remedy="Call torch.export.register_dataclass (or what registered it at capture) on it, then load again.",
        )
    return pytree.TreeSpec(kind, _decode(record["context"], {}), [_decode_spec(child) for child in record["children"]])


def _plain_class(module: ProgramModule) -> type[ProgramModule]:
    """The class that was instantiated: fx puts a private subclass in front of it for each instance."""
    return next(c for c in type(module).__mro__ if not c.__qualname__.endswith("GraphModuleImpl"))


def _build(kind: type[ProgramModule], class_name: str, graph: fx.Graph) -> ProgramModule:
    module = kind.__new__(kind)
    ProgramModule.__init__(module, nn.Module(), graph, class_name)
    return module


def _rebuild(kind: type[ProgramModule], class_name: str, records: list[dict[str, Any]]) -> ProgramModule:
    return _build(kind, class_name, graph_from_records(records))


def _watched(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the tensors of one module stand that decide what it computes; a grid that follows a weight does not."""
    if isinstance(module, FakeQuant):
        yield from () if module.follows else ((module._buffers, "scale"),)
    elif not isinstance(module, Estimator):
        yield from ((table, name) for table in (module._parameters, module._buffers) for name in table)


def _device_of(module: nn.Module) -> torch.device | None:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None
