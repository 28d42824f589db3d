"""Placement: which values are quantized, and how: by rules (rules.py), or by AIMET's sections (sections.py)."""

from __future__ import annotations

from fxquant.placement.checks import check_rules
from fxquant.placement.rules import Choice, Decision, Rule, Source, defaults, settle

__all__ = ["Choice", "Decision", "Rule", "Source", "check_rules", "defaults", "settle"]
