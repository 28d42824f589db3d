"""Capture: torch.export to one torch.fx graph in normal form."""

from fxquant.capture.api import capture

__all__ = ["capture"]
