"""The report as one HTML page that needs no network: data, style, script and plotly.js are inside it.

Names from the model never become markup: they are JSON inside the page, with "<" escaped, and the script writes them as
text.
"""

from __future__ import annotations

import html
import importlib
import json
import re
from importlib import resources

from fxquant.analysis.report import AnalysisReport
from fxquant.errors import FxquantError

_SUGGESTED = 5


def page(report: AnalysisReport) -> str:
    """The page's text. Raises FxquantError where plotly is not installed."""
    parts = {
        "title": html.escape(f"fxquant analysis of {report.program}"),
        "style": _asset("page.css"),
        "plotly": _harmless(_plotly_script()),
        "report": _data(report),
        "script": _harmless(_asset("page.js")),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def _data(report: AnalysisReport) -> str:
    content = {**report.to_dict(), "suggestions": report.suggestions(_SUGGESTED)}
    content["order"] = [unit.name for unit in report.by_damage]
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _plotly_script() -> str:
    try:
        offline = importlib.import_module("plotly.offline")
    except ImportError as err:
        raise FxquantError(
            "analysis page: plotly cannot be imported",
            got=str(err),
            remedy="pip install plotly, or take the JSON and the table, which need it not.",
        ) from err
    return str(offline.get_plotlyjs())


def _harmless(script: str) -> str:
    """A script that does not end the element it stands in."""
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)


def _asset(name: str) -> str:
    return resources.files("fxquant.analysis").joinpath(name).read_text(encoding="utf-8")
