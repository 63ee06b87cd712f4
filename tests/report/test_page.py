"""The report page as text: its size, what it holds, and that no data becomes markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from nsae_cli.report.arms import arm_name, pareto_point
from nsae_cli.report.page import LARGEST_PAGE, render_page
from nsae_cli.report.page_comparison import comparison_section
from nsae_cli.report.page_content import FeaturesContent, ReportContent
from nsae_cli.report.page_features import features_section
from nsae_cli.report.page_sections import curves_section, embedded_bytes, embedded_json, rounded
from nsae_cli.report.summary import summary_sentences

Contents = Callable[..., ReportContent]
Features = Callable[..., FeaturesContent]


class _Reader(HTMLParser):
    """Every element with its attributes, and the text of the data element."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    return reader


def data_of(page: str) -> dict[str, Any]:
    value = json.loads(read(page).data, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    return value


def test_a_page_holds_everything_and_fetches_nothing(content_of: Contents) -> None:
    page, left_out = render_page(content_of())
    assert len(page.encode("utf-8")) <= LARGEST_PAGE
    assert not any(left_out.values())
    reader = read(page)
    assert [attrs for tag, attrs in reader.tags if tag in ("link", "img", "iframe", "object")] == []
    assert all("src" not in attrs and not any(key.startswith("on") for key in attrs) for _, attrs in reader.tags)
    assert ("html", {"lang": "en"}) in reader.tags
    assert [tag for tag, _ in reader.tags].count("script") == 3, "data, plotly.js and the page's own: nothing else"
    data = data_of(page)
    assert len(data["norms"][0]["layers"]) == 12
    assert len(data["saes"]["rows"]) == len(data["curves"]) == len(data["pareto"]["points"]) == 4
    assert len(data["histograms"]) == 2
    assert [key for key, _ in data["pareto"]["errors"]] == ["fvu", "mre", "delta_ce"]
    assert data["pareto"]["points"][1]["delta_ce"] == 0.04
    assert len(data["features"][0]["features"]) == 39


def test_equal_content_gives_equal_bytes(content_of: Contents) -> None:
    assert render_page(content_of())[0] == render_page(content_of())[0]


def test_an_empty_page(content_of: Contents) -> None:
    page, _ = render_page(ReportContent("nothing"))
    assert data_of(page)["saes"] is None


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\ud800", "\u2028", "\x00", "@@data@@", "&amp;"])
def test_any_text_survives_the_way_into_the_page(text: str) -> None:
    written = embedded_json({text: [text]})
    assert not set("<>&") & set(written)
    assert json.loads(written.encode("utf-8")) == {text: [text]}


def test_tokens_of_a_stranger_come_out_as_they_are(content_of: Contents, features_of: Features) -> None:
    page, _ = render_page(content_of())
    shown = set(data_of(page)["features"][0]["tokens"])
    assert set(features_of().document["tokens"].values()) >= shown
    assert "</script><script>window.attacked = 1</script>" in shown
    assert "window.attacked = 1</script>" not in page
    assert "<test>" not in page
    assert "<title>Norm bias in &lt;test&gt; &amp; co</title>" in page


@pytest.mark.parametrize("d_sae", [2_000, 12_000])
def test_what_does_not_fit_is_left_out_and_counted(content_of: Contents, d_sae: int) -> None:
    page, left_out = render_page(content_of(features=2, d_sae=d_sae))
    size = len(page.encode("utf-8"))
    assert 0.9 * LARGEST_PAGE < size <= LARGEST_PAGE
    for section in data_of(page)["features"]:
        assert section["contexts"] == 4, "fewer contexts before fewer features"
        assert section["left_out"] == d_sae - 1 - len(section["features"])
        assert [feature[0] for feature in section["features"]] == list(range(1, len(section["features"]) + 1))
    assert left_out["features"] == sum(section["left_out"] for section in data_of(page)["features"]) > 0


def test_contexts_are_given_up_before_features(features_of: Features) -> None:
    features = features_of(300)
    full = features_section(features, 10**9)
    size = embedded_bytes(full)
    assert (full["contexts"], full["left_out"]) == (10, 0)
    smaller = features_section(features, int(size * 0.7))
    assert smaller["left_out"] == 0
    assert smaller["contexts"] in (5, 6)
    assert embedded_bytes(smaller) <= size * 0.7
    assert features_section(features, 0)["features"] == []


def test_a_feature_is_written_as_measured(features_of: Features) -> None:
    content = features_of()
    arrays = content.arrays
    section = features_section(content, 10**9)
    number, numbers, contexts, (raised, lowered) = section["features"][4]
    assert number == 5
    assert numbers[0] == pytest.approx(arrays["density"][5], rel=0.01)
    assert [section["tokens"][place] for place, _ in raised] == [
        content.document["tokens"][str(token)] for token in arrays["raised"][5]
    ]
    assert lowered[0][1] == -2
    act, row, first, tokens, shades = contexts[1]
    assert (row, first, len(tokens)) == (arrays["top_row"][5, 1], 10, 15)
    assert act == pytest.approx(arrays["top_act"][5, 1], rel=0.01)
    largest = arrays["top_act"][5, 0]
    padded = [*shades, *[0] * (15 - len(shades))]
    expected = np.ceil(arrays["window_acts"][5, 1, 10:].astype(float) / largest * section["shades"])
    assert padded == expected.tolist()
    bits = bin(int("1" + section["alive"], 16))[3:]
    assert [bit == "1" for bit in bits[:40]] == (arrays["density"] > 0).tolist()


def test_curves_are_thinned_and_end_with_the_last_step(content_of: Contents) -> None:
    sae = content_of().saes[0]
    curves = curves_section(sae, 30)
    assert curves is not None
    assert len(curves["tokens"]) == len(curves["bias"][0]) == 30
    assert curves["tokens"][-1] == sae.curves[-1]["tokens"]
    assert curves["bias"][10][-1] == rounded(sae.curves[-1]["bias_ratio"][10], 3)


@pytest.mark.parametrize(
    "table", [None, [], {}, {"rows": 3}, {"rows": [1, "a", None]}, {"rows": [{}]}, {"groups": [3, {"rows": None}]}]
)
def test_a_comparison_table_that_says_nothing_is_left_out(table: Any) -> None:
    assert comparison_section("x", table) is None


def test_a_comparison_of_groups() -> None:
    metrics = {"fvu_p0_ns": {"mean": 0.123456, "sd": 0.0123, "by_seed": {}}, "nbi": {"mean": None, "sd": None}}
    compared = {"with": "relu none", "kind": "p=0", "status": "matched",
                "metrics": {"fvu_p0_ns": {"mark": "worse"}, "nbi": None}}  # fmt: skip
    rows = [
        {"arm": "relu sq", "level": "8", "seeds": [0, 1], "saes": ["a", "b"], "metrics": metrics,
         "comparisons": [compared]},
        {"arm": "relu none", "level": "8", "seeds": [0], "metrics": {"fvu_p0_ns": {"mean": 0.1, "sd": None}},
         "comparisons": [{"with": "x", "metrics": {}, "status": "unmatched L0"}]},
    ]  # fmt: skip
    document = {
        "groups": [{"label": "layer 1", "rows": rows}], "conclusion": ["Nothing differs."],
        "predictions": [{"id": "P1", "verdict": "refuted", "statement": "s"}, {"id": "P2", "no_data": True}],
    }  # fmt: skip
    section = comparison_section("x", document)
    assert section is not None
    [table] = section["groups"]
    heads = ["arm", "level", "seeds", "fvu p0 ns", "fvu p0 ns against p=0", "compared with"]
    assert [column["label"] for column in table["columns"]] == heads
    assert table["rows"] == [
        ["relu sq", "8", 2.0, [0.1235, "0.123 ± 0.012"], "worse", "–"],
        ["relu none", "8", 1.0, [0.1, "0.100"], "–", "x: unmatched L0"],
    ]
    assert (section["sentences"], section["predictions"]) == (["Nothing differs."], ["P1 refuted: s"])


def test_a_comparison_table_of_any_shape() -> None:
    rows = [{"arm": "a", "n": 3, "fvu": {"mean": 0.123456, "sd": None}}, {"arm": None, "marks": ["<", 1.5, None]}]
    section = comparison_section("x", {"rows": rows})
    assert section is not None
    [table] = section["groups"]
    assert [column["label"] for column in table["columns"]] == ["arm", "n", "fvu mean", "marks"]
    assert [column["kind"] for column in table["columns"]] == ["text", "number", "number", "text"]
    assert table["rows"] == [["a", 3.0, 0.1235, "–"], ["–", None, None, "<, 1.5, –"]]


def test_summary_says_what_the_numbers_say(content_of: Contents) -> None:
    content = content_of()
    runs = [(sae.name, sae.run) for sae in content.saes]
    evaluations = [(sae.name, sae.evaluation) for sae in content.saes if sae.evaluation]
    text = " ".join(summary_sentences([norms.document for norms in content.norms], runs, [], evaluations))
    assert "0.784 % of the tokens at layer 1 and hold 88.1 % of Σ‖x‖²" in text
    assert "11.2 × as long as an ordinary one" in text
    assert "L0 20–80, FVU 0.05–0.2" in text
    assert "reads 0.987 on all tokens and 0.8 without sinks" in text
    assert "costs 0.02 nats, the least of 4 evaluated SAEs" in text
    assert summary_sentences([], [], [], []) == []
    empty = [("a", {"hook": "h", "config": {}, "metrics": {}, "warnings": ["Look out."]})]
    assert summary_sentences([], empty, [("a", {})], [("a", {})]) == ["1 SAE at h.", "a: Look out."]


def test_arms_name_what_is_unusual(content_of: Contents) -> None:
    config = {"act": "relu", "l2_norm": "sq", "l1_norm": "none", "decoder": "unit", "sparsity": "l1", "noise": 0.0}
    assert arm_name({"config": config | {"alpha": 0.3, "seed": 2}}) == "relu, l2 sq"
    assert arm_name({"config": config | {"sinks": "drop", "noise": 0.1}}) == "relu, l2 sq, noise 0.1, sinks drop"
    assert arm_name({"config": {"act": "tanh-relu", "l2_norm": "none", "decoder": "free"}}) == "tanh-relu, l2 none"
    assert arm_name({"config": None}) == "other"
    point = pareto_point("x", {"metrics": None}, {"behaviour": {"delta_ce_ns": 0.5}})
    assert (point.l0, point.delta_ce) == (None, 0.5)


def test_the_script_never_makes_markup_of_data() -> None:
    from nsae_cli.report.page import _PARTS, _part

    for name in _PARTS:
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", _part(name))
