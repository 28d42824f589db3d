"""Parity: what a program simulates against what onnxruntime computes."""

from fxquant.numerics.runtime import Level, RuntimeOptions
from fxquant.parity.check import check_parity
from fxquant.parity.report import ParityReport, Row, Verdict

__all__ = ["Level", "ParityReport", "Row", "RuntimeOptions", "Verdict", "check_parity"]
