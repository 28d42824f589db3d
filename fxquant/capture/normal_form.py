"""One spelling for each operation: convolutions, linear, pooling, casts; what computes nothing is erased.

1. conv1d/2d/3d, with lists or 'same'/'valid', and conv_transpose -> aten.convolution(x, w, b, stride, padding,
   dilation, transposed, output_padding, groups) with full-rank lists. An asymmetric 'same' gets constant_pad_nd first.
2. addmm(b, x, W.t()), mm(x, W.t()) -> aten.linear(x, W[, b]); addmm(b, x, W) with a parameter W [in, out] (GPT-2's
   Conv1D) -> aten.linear(x, transpose(W), b), the same product.
3. contiguous, clone, alias, detach, lift_fresh, casts to the same dtype, full slices, assertions -> erased. View ->
   reshape, because a view of what was made contiguous may need a copy now.
4. max_pool and avg_pool with full-rank lists and explicit stride; relu6 -> hardtanh(x, 0.0, 6.0); casts -> to.dtype.
5. Other names of one operation (multiply, true_divide, concat, arccos ...) -> its first name.
6. What `run_decompositions` leaves of batch_norm, layer_norm, max_pool and softmax -> the composite operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxquant.capture.places import place_of
from fxquant.graph.program import Note, NoteKind

aten = torch.ops.aten
Rule = Callable[[fx.Graph, fx.Node], fx.Node | None]

_NOOPS = frozenset(
    {
        aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default,
        aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.resolve_conj.default, aten.resolve_neg.default,
    }
)  # fmt: skip
_CASTS = frozenset(
    {
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
        aten.to.prim_dtype,
    }
)  # fmt: skip
_ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default, aten._assert_async.default, aten._assert_async.msg,
        aten._assert_scalar.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
    }
)  # fmt: skip


_OTHER_NAMES = {
    "abs": "absolute", "neg": "negative", "mul": "multiply", "sub": "subtract", "div": "divide true_divide",
    "cat": "concat concatenate", "gt": "greater", "ge": "greater_equal", "lt": "less", "le": "less_equal",
    "ne": "not_equal", "trunc": "fix", "sigmoid": "special_expit", "erf": "special_erf", "exp2": "special_exp2",
    "expm1": "special_expm1", "log1p": "special_log1p", "acos": "arccos", "asin": "arcsin", "atan": "arctan",
    "acosh": "arccosh", "asinh": "arcsinh", "atanh": "arctanh",
}  # fmt: skip


def _aliases() -> dict[Any, Any]:
    """By overload, the overload of the same name (Tensor, Scalar ...) of the operation's first name (case 5)."""
    found: dict[Any, Any] = {}
    for first, others in _OTHER_NAMES.items():
        packet = getattr(aten, first)
        for other in (getattr(aten, name) for name in others.split()):
            shared = sorted(set(other.overloads()) & set(packet.overloads()))
            found.update((getattr(other, name), getattr(packet, name)) for name in shared)
    return found


ALIASES = _aliases()


def detach_notes(graph: fx.Graph) -> list[Note]:
    """A note for each place where the model itself stops gradients: `normalize` erases detach."""
    text = "detach() is erased: in training, gradients flow through it"
    places = [place_of(node) for node in graph.nodes if node.target is aten.detach.default]
    return [Note(NoteKind.OTHER, place.path, f"{place.source}: {text}") for place in places if place.source]


def normalize(graph: fx.Graph) -> None:
    """Rewrite a functional graph to the normal form; nodes keep their place and fake value."""
    strided = any(node.target is aten.as_strided.default for node in graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function" or node._erased:
            continue
        node.target = ALIASES.get(node.target, node.target)
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif not strided and _is_noop(node):  # as_strided reads the memory order that contiguous and clone make
            _forward(graph, node, node.args[0])
        elif (rule := _RULES.get(node.target)) is not None:
            with graph.inserting_before(node):
                made = rule(graph, node)
            if made is not None:
                _forward(graph, node, made)


def _forward(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _is_noop(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    if node.target in _NOOPS:
        return True
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if node.target in _CASTS:
        return before.dtype is after.dtype and before.device == after.device
    return _is_full_slice(node) if node.target is aten.slice.Tensor else False


def _is_full_slice(node: fx.Node) -> bool:
    start, end, step = (list(node.args[2:]) + [None, None, 1][len(node.args[2:]) :])[:3]
    open_end = end is None or (isinstance(end, int) and end >= 2**62)
    return bool(start in (None, 0) and step == 1 and open_end)


def make(graph: fx.Graph, target: Callable[..., Any], args: Sequence[Any], like: fx.Node, value: Any = None) -> fx.Node:
    """A call_function node at the place of `like`, with its fake value unless `value` is given."""
    node = graph.create_node("call_function", target, tuple(args), {})
    node.meta = dict(like.meta)
    if value is not None:
        node.meta["val"] = value
    return node


def bound(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of its operator's schema, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def rank(value: Any) -> int:
    """Number of axes of a node's tensor."""
    assert isinstance(value, fx.Node)
    return int(value.meta["val"].ndim)


def full_rank(value: Any, axes: int) -> list[int]:
    """An int or a list of one as a list of `axes`."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * axes if len(items) == 1 else items


def _convolution(graph: fx.Graph, node: fx.Node) -> fx.Node:
    a = bound(node)
    axes = rank(a["weight"]) - 2
    stride, dilation = full_rank(a["stride"], axes), full_rank(a["dilation"], axes)
    transposed = "output_padding" in a
    x = a["input"]
    if isinstance(a["padding"], str):
        x, padding = _string_padding(graph, node, x, a["padding"], dilation)
    else:
        padding = full_rank(a["padding"], axes)
    extra = full_rank(a["output_padding"], axes) if transposed else [0] * axes
    rest = (a["weight"], a["bias"], stride, padding, dilation, transposed, extra, a["groups"])
    if rank(a["input"]) == axes + 2:
        return make(graph, aten.convolution.default, (x, *rest), node)
    single = make(graph, aten.unsqueeze.default, (x, 0), node, x.meta["val"].unsqueeze(0))
    made = make(graph, aten.convolution.default, (single, *rest), node, node.meta["val"].unsqueeze(0))
    return make(graph, aten.squeeze.dim, (made, 0), node)


def _string_padding(
    graph: fx.Graph, node: fx.Node, x: fx.Node, mode: str, dilation: list[int]
) -> tuple[fx.Node, list[int]]:
    """'same' pads dilation * (kernel - 1) in all, the odd one at the end (torch's and TensorFlow's rule)."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    kernel = list(weight.meta["val"].shape[2:])
    if mode == "valid":
        return x, [0] * len(kernel)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, [total // 2 for total in totals]
    pad = [amount for total in reversed(totals) for amount in (0, total % 2)]
    shape = list(x.meta["val"].shape)
    for axis, total in zip(range(-len(totals), 0), totals, strict=True):
        shape[axis] += total % 2
    value = x.meta["val"].new_empty(shape)  # pad itself would fix symbolic sizes
    padded = make(graph, aten.constant_pad_nd.default, (x, pad, 0.0), node, value)
    return padded, [total // 2 for total in totals]


def _linear(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    a = bound(node)
    x, weight, bias = (a["mat1"], a["mat2"], a["self"]) if "mat1" in a else (a["self"], a["mat2"], None)
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1 or (bias is not None and rank(bias) != 1):
        return None
    if (source := _transposed(weight)) is not None and source.op == "get_attr":
        return make(graph, aten.linear.default, (x, source) + (() if bias is None else (bias,)), node)
    if weight.op != "get_attr" or bias is None:
        return None
    turned = make(graph, aten.transpose.int, (weight, 0, 1), node, weight.meta["val"].t())
    return make(graph, aten.linear.default, (x, turned, bias), node)


def _transposed(node: fx.Node) -> fx.Node | None:
    """What a matrix is the transpose of, if it is one."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.t.default:
        return source
    if node.target is aten.transpose.int and set(node.args[1:]) in ({0, 1}, {-1, -2}, {0, -1}, {1, -2}):
        return source
    return source if node.target is aten.permute.default and list(node.args[1]) in ([1, 0], [-1, 0]) else None  # type: ignore[arg-type]


def _pool(graph: fx.Graph, node: fx.Node) -> fx.Node:
    a = bound(node)
    axes = int(str(node.target).split("pool")[1][0])
    for key in ("kernel_size", "padding", "dilation"):
        if key in a:
            a[key] = full_rank(a[key], axes)
    a["stride"] = full_rank(a["stride"], axes) if a["stride"] else list(a["kernel_size"])
    assert callable(node.target)
    return make(graph, node.target, list(a.values()), node)


def _pool_without_indices(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    return _single_output(graph, node, aten.max_pool2d.default, list(bound(node).values()), _pool)


def _view(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return make(graph, aten.reshape.default, node.args, node)


def _relu6(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return make(graph, aten.hardtanh.default, (node.args[0], 0.0, 6.0), node)


def _hardtanh(graph: fx.Graph, node: fx.Node) -> fx.Node:
    a = bound(node)
    return make(graph, aten.hardtanh.default, (a["self"], float(a["min_val"]), float(a["max_val"])), node)


def _cast(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    if before.device != after.device or node.target is aten.to.dtype and len(node.args) == 2:
        return None
    return make(graph, aten.to.dtype, (source, after.dtype), node)


def _batch_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    a = bound(node)
    tensors = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"])
    args = (*tensors, False, a["momentum"], a["eps"], False)
    return _single_output(graph, node, aten.batch_norm.default, args)


def _layer_norm(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    return _single_output(graph, node, aten.layer_norm.default, list(bound(node).values()))


def _softmax(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    target = aten.softmax.int if node.target is aten._softmax.default else aten.log_softmax.int
    return None if node.args[2] else make(graph, target, node.args[:2], node)


def _single_output(
    graph: fx.Graph, node: fx.Node, target: Callable[..., Any], args: Sequence[Any], then: Rule | None = None
) -> fx.Node | None:
    """Replace a node of several outputs by one of its first, when nothing reads the others."""
    users = list(node.users)
    if any(user.target is not operator.getitem or user.args[1] != 0 and user.users for user in users):
        return None
    made = make(graph, target, args, node, node.meta["val"][0])
    for user in users:
        _forward(graph, user, made) if user.args[1] == 0 else graph.erase_node(user)
    if then is None:
        return made
    final = then(graph, made)
    assert final is not None
    _forward(graph, made, final)
    return final


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    **dict.fromkeys((aten.conv_transpose1d.default, aten.conv_transpose2d.input), _convolution),
    aten.conv_transpose3d.input: _convolution,
    **dict.fromkeys((aten.addmm.default, aten.mm.default), _linear),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default), _pool),
    **dict.fromkeys((aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default), _pool),
    aten.max_pool2d_with_indices.default: _pool_without_indices,
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default), _view),
    aten.relu6.default: _relu6,
    aten.hardtanh.default: _hardtanh,
    **dict.fromkeys(_CASTS, _cast),
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default), _softmax),
}
