"""What an algorithm has won for a layer, in words: signal-to-noise ratio of its output, before and after."""

from __future__ import annotations

import math

import torch


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two sums of squares; infinite without noise, -infinite without signal."""
    if noise <= 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def deviation(difference: torch.Tensor) -> float:
    """How far the sum of channels' differences may be off by chance: sqrt(channels var d), 0 of a single channel.

    Given a layer's inputs its channels are rounded independently of each other.
    """
    count = difference.numel()
    return float(difference.std()) * math.sqrt(count) if count > 1 else 0.0


def gain_text(signal: float, before: float, after: float) -> str:
    """ "output error 0.0123 -> 0.0045 (SQNR 19.1 -> 23.5 dB)": errors relative to the output, sums of squares given."""
    if signal <= 0.0:
        return "its output is 0 on all batches"
    errors = f"{math.sqrt(before / signal):.3g} -> {math.sqrt(after / signal):.3g}"
    return f"output error {errors} (SQNR {decibels(signal, before):.1f} -> {decibels(signal, after):.1f} dB)"
