"""Hypothesis runs the same examples every time; torch runs on one thread, as workers share the cores."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", derandomize=True, deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

torch.set_num_threads(1)
