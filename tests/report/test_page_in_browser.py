"""The report page in a real browser: drawn, quiet, offline, searchable, at any width, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("selenium")

from browser import MISSING, Browser, wait_for

from nsae_cli.report.page import render_page
from nsae_cli.report.page_content import ReportContent

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

PLOTS = 6  # norms, L0, L1, training, Pareto, features


@pytest.fixture(scope="module")
def page(content_of: Callable[..., ReportContent], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(content_of(saes=5, features=2, d_sae=120))[0], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    width: int
    dark: bool


@pytest.fixture(
    scope="module", params=[View(380, False), View(380, True), View(1280, True), View(1280, False)], ids=str
)
def view(request: pytest.FixtureRequest, browser: Browser, page: Path) -> View:
    """The page, loaded once for all tests of a view."""
    chosen: View = request.param
    browser.open(page, width=chosen.width, dark=chosen.dark, touch=chosen.width < 600)
    return chosen


@pytest.fixture(scope="module")
def loaded(browser: Browser, page: Path) -> Browser:
    browser.open(page)
    return browser


@pytest.fixture
def opened(loaded: Browser) -> Browser:
    """The page in the usual view, loaded once, with an empty search."""
    loaded.run(
        "const s = document.querySelector('input[type=search]'); s.value = ''; s.dispatchEvent(new Event('input'))"
    )
    return loaded


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_drawn_quiet_and_offline(browser: Browser, view: View) -> None:
    marks = "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('.main-svg').length &&" \
        " p.querySelectorAll('.trace, .point, image, .js-line').length)"  # fmt: skip
    assert len(browser.find(".plot")) == PLOTS
    wait_for(lambda: all(browser.run(marks)))
    assert browser.console() == []
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert browser.run("return document.documentElement.scrollWidth") <= view.width, "no sideways scrolling of the page"
    assert browser.run("return Math.max(...[...document.querySelectorAll('section')].map(s => s.scrollWidth -"
                       " s.clientWidth))") <= 0, "nothing sticks out of its section"  # fmt: skip
    background, ink = browser.run("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
    assert (luminance(background) < 0.05) is view.dark
    assert contrast(background, ink) > 7


def test_text_stands_out_from_what_is_behind_it(browser: Browser, view: View) -> None:
    """WCAG AA: 4.5 for text, on shaded tokens and in plots too."""
    card = browser.run("return getComputedStyle(document.querySelector('section')).backgroundColor")
    for selector in ("figcaption", ".soft", "td button", "nav a", "th button", ".up", ".down"):
        [colour] = browser.run(
            "return [...document.querySelectorAll(arguments[0])].slice(0, 1).map(e => getComputedStyle(e).color)",
            selector,
        )
        assert contrast(card, colour) > 4.5, selector
    for colour in browser.run("return [...document.querySelectorAll('.plot text')].map(t => getComputedStyle(t).fill)"):
        assert contrast(card, colour) > 4.5, colour
    shaded = browser.run(
        "return [...document.querySelectorAll('.tok.on')].map(e => [getComputedStyle(e).backgroundColor,"
        " getComputedStyle(e).color])"
    )
    assert shaded
    for background, colour in shaded:
        red, green, blue, alpha = (float(part) for part in background[5:-1].split(","))
        under = [int(part) for part in card[4:-1].split(",")]
        mixed = [round(alpha * top + (1 - alpha) * low) for top, low in zip((red, green, blue), under, strict=True)]
        assert contrast(f"rgb({mixed[0]}, {mixed[1]}, {mixed[2]})", colour) > 4.5


def test_plots_follow_a_change_of_mode(opened: Browser) -> None:
    def axis_colour() -> str:
        return str(opened.run("return getComputedStyle(document.querySelector('#norms .plot text')).fill"))

    wait_for(lambda: opened.find("#norms .plot text"))
    light = axis_colour()
    opened.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    wait_for(lambda: axis_colour() != light)
    assert luminance(axis_colour()) > 0.5
    opened.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    wait_for(lambda: axis_colour() == light)


def test_data_stand_in_the_plots(opened: Browser) -> None:
    heat = opened.run("return document.querySelector('#norms .plot').data[0]")
    assert len(heat["x"]) == 12
    assert len(heat["y"]) == len(heat["z"]) + 1
    bars = opened.run("return document.querySelector('#top-norms .plot').data.map(t => t.y.reduce((a, b) => a + b))")
    assert bars == [1000, 1000, 98_000]
    lines = opened.run("return document.querySelector('#training .plot').data.map(t => t.name)")
    assert lines == ["bin 0 (shortest)", *(f"bin {n}" for n in range(1, 9)), "bin 9 (longest)", "sinks"]
    points = opened.run("return document.querySelector('#pareto .plot').data.flatMap(t => t.x)")
    assert sorted(points) == [16, 20, 26.67, 40, 80]


def test_choices_redraw(opened: Browser) -> None:
    [error] = [field for field in opened.find("#pareto select") if field.is_displayed()]
    assert [option.text for option in error.find_elements("tag name", "option")][-1].startswith("ΔCE")
    before = opened.run("return document.querySelector('#pareto .plot').data[0].y")
    error.find_elements("tag name", "option")[-1].click()
    assert opened.run("return document.querySelector('#pareto .plot').data[0].y") != before
    key = opened.find("#pareto .keys button")[0]
    key.click()
    key = opened.find("#pareto .keys button")[0]
    assert key.get_attribute("aria-pressed") == "false"
    assert opened.run("return document.activeElement === arguments[0]", key), "the keyboard stays where it was"
    assert opened.run("return document.querySelector('#pareto .plot').data[0].visible") is False


def test_the_table_sorts(opened: Browser) -> None:
    def column(place: int) -> list[str]:
        return [cell.text for cell in opened.find(f"#saes tbody tr > :nth-child({place + 1})")]

    heads = [head.text for head in opened.find("#saes thead th")]
    place = heads.index("FVU ns")
    button = opened.find("#saes thead th button")[place]
    for falling in (False, True):
        opened.run("arguments[0].click()", button)
        values = [float(text) for text in column(place)]
        assert values == sorted(values, reverse=falling)
        said = opened.find("#saes thead th")[place].get_attribute("aria-sort")
        assert said == ("descending" if falling else "ascending")
    assert opened.find("#comparison td")[0].text == "8"


def test_search_and_sort_of_features(opened: Browser) -> None:
    def listed() -> list[int]:
        return [int(row.get_attribute("data-feature") or -1) for row in opened.find(".list tbody tr")]

    def status() -> str:
        return opened.find(".pager [role=status]")[0].text

    assert listed() == list(range(1, 51))
    assert status() == "1–50 of 119"
    opened.run("[...document.querySelectorAll('.pager button')].at(-1).click()")
    assert listed()[0] == 51
    search = opened.find("input[type=search]")[0]
    search.send_keys("17")
    assert listed()[0] == 17, "the feature of that number comes first"
    search.clear()
    search.send_keys("0")
    assert "feature 0 never fires here" in status()
    search.clear()
    search.send_keys("no such token anywhere")
    assert (listed(), status()) == ([], "no feature matches")
    search.clear()
    search.send_keys("WORD7")
    found = listed()
    assert 0 < len(found) <= 50
    words = opened.run("return [...document.querySelectorAll('.text-run')].map(e => e.textContent).join('')")
    search.clear()
    search.send_keys(" ", "\b")  # clear() tells no listener
    order = next(field for field in opened.find("#features select") if "sinks" in field.text)
    next(option for option in order.find_elements("tag name", "option") if "sinks" in option.text).click()
    assert listed()[0] == 1
    assert words


def test_a_feature_opens_by_mouse_and_keyboard(opened: Browser) -> None:
    row = opened.find(".list tbody tr")[3]
    opened.run("arguments[0].click()", row)
    assert opened.find(".detail h3")[0].text == "Feature 4"
    assert row.get_attribute("aria-selected") == "true"
    button = opened.find(".list tbody button")[5]
    opened.run("arguments[0].focus()", button)
    button.send_keys("\n")
    assert opened.find(".detail h3")[0].text == "Feature 6"
    assert len(opened.find(".detail .contexts li")) == 10
    assert len(opened.find(".detail .tok.peak")) == 10
    assert len(opened.find(".detail .logits li")) == 16


def test_hostile_tokens_are_text(opened: Browser) -> None:
    search = opened.find("input[type=search]")[0]
    search.send_keys("</script>")
    assert opened.find(".list tbody tr")
    opened.run("for (const row of document.querySelectorAll('.list tbody tr')) row.click()")
    opened.run(  # every feature of every SAE, and hovering over what has a name
        "for (const s of document.querySelectorAll('select')) for (const o of s.options)"
        " { s.value = o.value; s.dispatchEvent(new Event('change')); }"
    )
    assert opened.run("return window.attacked") is None
    assert opened.find("section img, section script, section b, section i:not(.legend i)") == []
    tokens = opened.run("return [...document.querySelectorAll('.detail .tok')].map(e => e.textContent)")
    assert not [
        text for text in tokens if any(ord(character) < 32 or character in "\u202e\u2028" for character in text)
    ]
    every = opened.run(
        "const all = new Set(); for (const row of document.querySelectorAll('.list tbody tr')) { row.click();"
        " document.querySelectorAll('.detail .tok').forEach(t => all.add(t.textContent)); } return [...all]"
    )
    assert {"⟨202E⟩esrever", "⟨0000⟩", "<!--", "&lt;b&gt;", "@@data@@", "↵"} <= set(every)
    assert any("</script><script>window.attacked = 1</script>" in text for text in every)
    assert [entry for entry in opened.console() if entry["level"] == "SEVERE"] == []


def test_no_button_sends_data_anywhere(opened: Browser) -> None:
    wait_for(lambda: opened.find(".modebar-btn"))
    titles = {button.get_attribute("data-title") for button in opened.find(".modebar-btn")}
    assert titles == {"Download plot", "Zoom", "Pan", "Reset axes"}


def test_an_empty_page_says_so(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(render_page(ReportContent("Nothing"))[0], encoding="utf-8")
    browser.open(path)
    assert browser.console() == []
    assert browser.find("#summary p")[0].text == "Nothing was measured yet."
    assert browser.find(".plot") == []
