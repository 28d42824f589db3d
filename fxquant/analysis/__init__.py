"""Sensitivity analysis: which layers, weights and activations a quantized program loses accuracy by.

units.py          the layers that are judged: a weight and the activation that its layer gives
route.py          a graph cut at its quantizers, so that two runs go along it side by side
sweep.py          one batch: quantize one layer alone, and leave one layer alone in float
totals.py         the sums over batches, and their records
value_meter.py    errors, ranges, codes and histograms of one value
scores.py         the same sweeps by a user's `evaluate`
report.py         what was found; table.py, page.py and suggestions.py show it
"""

from __future__ import annotations

from fxquant.analysis.analyze import analyze
from fxquant.analysis.report import AnalysisReport, Score, UnitRow, ValueRow

__all__ = ["AnalysisReport", "Score", "UnitRow", "ValueRow", "analyze"]
