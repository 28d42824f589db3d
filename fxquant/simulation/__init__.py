"""Simulations: what a program's integers are, computed as onnxruntime's kernels compute them.

    float     fake quantization in float32: cheap, and off by single codes
    exact     on integer-valued float32, requantized as onnxruntime does, with straight-through gradients: for training
    integer   on int64, with onnxruntime's int32 wrap: the reference

`program.simulate` chooses which one `program.module` computes; importing this package is what makes it able to.
"""

from fxquant.graph.module import FORMS
from fxquant.graph.program import Program
from fxquant.simulation.accumulate import Strategy
from fxquant.simulation.exact import ExactArithmetic, strategies
from fxquant.simulation.executor import Executor
from fxquant.simulation.integer import IntegerArithmetic

FORMS["exact"] = lambda module, target: Executor(Program(module, target=target), ExactArithmetic()).forward
FORMS["integer"] = lambda module, target: Executor(Program(module, target=target), IntegerArithmetic()).forward

__all__ = ["ExactArithmetic", "Executor", "IntegerArithmetic", "Strategy", "strategies"]
