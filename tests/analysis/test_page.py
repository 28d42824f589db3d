"""The HTML page: parsed, and opened in a real browser."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fxquant.errors import FxquantError
from tests.analysis.browser import browser
from tests.analysis.cases import synthetic

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">&amp;"
PLOTS = ("plot-sorted", "plot-order", "plot-sqnr", "plot-ranges", "plot-histogram")


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] == "script":
            place = len(self.found) - 1
            self.texts[place] = self.texts.get(place, "") + data

    def data(self) -> Any:
        place = next(index for index, (_, attrs) in enumerate(self.found) if attrs.get("id") == "report")
        return json.loads(self.texts[place])


def page_of(layers: int, name: str, path: Path) -> str:
    synthetic(layers, name).save_html(path)
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    elements = Elements(page_of(3, "net", tmp_path / "page.html"))
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 3 and "iframe" not in tags and "img" not in tags
    for _, attrs in elements.found:
        assert "src" not in attrs and "srcset" not in attrs
        assert (attrs.get("href") or "#").startswith(("#", "data:"))
    styles = (Path(sys.modules["fxquant.analysis"].__path__[0]) / "page.css").read_text()
    assert "url(" not in styles and "@import" not in styles


def test_names_stay_text_and_come_back_as_they_were(tmp_path: Path) -> None:
    elements = Elements(page_of(2, HOSTILE, tmp_path / "page.html"))
    assert [tag for tag, _ in elements.found].count("script") == 3
    assert "img" not in [tag for tag, _ in elements.found]
    data = elements.data()
    assert data["program"] == HOSTILE and data["units"][0]["name"] == f"{HOSTILE}_0"


def test_a_missing_plotly_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(FxquantError, match="plotly cannot be imported.*pip install plotly"):
        synthetic(1).save_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_plots_are_drawn_and_tables_sort_filter_and_choose_in_a_browser(tmp_path: Path) -> None:
    page_of(20, "net", tmp_path / "page.html")
    with browser(tmp_path / "profile") as session:
        session.get((tmp_path / "page.html").as_uri())
        assert _ready(session)
        for plot in PLOTS:
            size = session.execute_script(
                "const box = document.querySelector(`#${arguments[0]} svg.main-svg`).getBoundingClientRect();"
                "return [box.width, box.height, document.querySelectorAll("
                "`#${arguments[0]} .point path, #${arguments[0]} path.point`).length]",
                plot,
            )
            assert size[0] > 300 and size[1] > 150 and size[2] >= 20, (plot, size)
        layers = _column(session, "layers", 5)
        assert layers == sorted(layers, key=_figure, reverse=True) and len(set(layers)) > 5
        session.find_element("css selector", "#layers-table th:nth-child(5)").click()
        assert _column(session, "layers", 5) == sorted(layers, key=_figure)
        session.find_element("css selector", "#layers-table th:nth-child(1)").click()
        names = _column(session, "layers", 1)
        assert names == [f"net_{index}" for index in range(20)]  # numbers in names count as numbers
        session.find_element("id", "values-filter").send_keys("net_7 weight")
        assert _column(session, "values", 1) == ["net_7_weight"]
        session.find_element("css selector", "#values-table tbody tr[data-index='14']").click()
        assert session.execute_script("return document.getElementById('value-name').value") == "net_7_weight"
        assert session.execute_script("return document.querySelectorAll('#plot-channels path').length") >= 16
        session.execute_script("document.getElementById('scheme').click()")
        assert "{ node =" in session.find_element("id", "suggestions").text
        assert _complaints(session) == []


def test_hostile_names_do_nothing_in_a_browser_and_nothing_is_fetched(tmp_path: Path) -> None:
    page_of(3, HOSTILE, tmp_path / "page.html")
    with browser(tmp_path / "profile", 420) as session:
        session.get((tmp_path / "page.html").as_uri())
        assert _ready(session)
        assert session.title == f"fxquant analysis of {HOSTILE}"
        assert session.find_element("id", "title").text == f"Analysis of {HOSTILE}"
        assert session.find_elements("css selector", "img[onerror]") == []
        width = session.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0  # nothing sticks out of a narrow window
        messages = [json.loads(entry["message"])["message"] for entry in session.get_log("performance")]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert any(url.endswith("/page.html") for url in urls)
        assert [url for url in urls if not url.startswith(("file:", "data:", "blob:", "chrome:"))] == []
        assert _complaints(session) == []


@pytest.mark.slow
def test_a_net_of_two_hundred_layers_does_not_freeze_a_browser(tmp_path: Path) -> None:
    page_of(200, "backbone.stage.block.conv", tmp_path / "page.html")
    with browser(tmp_path / "profile") as session:
        session.set_page_load_timeout(60)
        session.get((tmp_path / "page.html").as_uri())
        assert _ready(session)
        session.execute_script(
            "const count = document.getElementById('damage-count'); count.value = 'all';"
            "count.dispatchEvent(new Event('change'))"
        )
        bars = session.execute_script("return document.querySelectorAll('#plot-sorted .point path').length")
        assert bars == 400 and _complaints(session) == []


def _ready(session: Any) -> bool:
    return bool(session.execute_script("return document.documentElement.dataset.ready") == "yes")


def _complaints(session: Any) -> list[str]:
    return [entry["message"] for entry in session.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def _column(session: Any, table: str, place: int) -> list[str]:
    """The text of a column's cells in the rows that are shown, from the top."""
    found: list[str] = session.execute_script(
        "return [...document.querySelectorAll(`#${arguments[0]}-table tbody tr:not([hidden])`)]"
        ".map(row => row.children[arguments[1] - 1].textContent)",
        table,
        place,
    )
    return found


def _figure(text: str) -> float:
    return float(text.removesuffix(" %"))
