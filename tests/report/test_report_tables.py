from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from nsae_cli.report import tables
from nsae_cli.report.layout import Column, WideTable

Artifact = tuple[dict[str, Any], dict[str, np.ndarray]]
MakeArtifact = Callable[..., Artifact]
MakeRun = Callable[..., dict[str, Any]]
WIDTHS = (50, 80, 110, 120)


def printed(renderable: RenderableType, width: int = 120) -> str:
    """What a terminal of that width shows; no line may be longer, and nothing may read nan."""
    console = Console(width=width, color_system=None, highlight=False, file=io.StringIO())
    with console.capture() as capture:
        console.print(renderable)
    text = capture.get()
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "…" not in text
    return text


def row(text: str, start: str) -> list[str]:
    """The cells of the first line that begins with `start`."""
    found = next(line for line in text.splitlines() if line.startswith(start))
    return re.split(r"\s{2,}", found.strip())


def test_norms_of_every_layer_with_their_sinks(norms: Artifact) -> None:
    text = printed(tables.norms_table(norms[0]))
    assert row(text, "6  ") == [
        "6", "87.0", "64.4", "132", "3,272", "2.31", "0.187", "15,641", "15,625", "15,633", "15,600", "88.1 %",
    ]  # fmt: skip
    assert row(text, "11 ")[-5:] == ["0", "0", "0", "0", "0 %"]
    assert "gpt2" in text
    assert "context 128, packed" in text
    assert "'<|endoftext|>' 15,625  ' the' 312  '\\n' 41" in text
    assert "layer 0–11" in text
    assert "layer 1–10  position only 8  norm only 16  position and norm only 17" in text


def test_the_two_by_two_names_its_empty_cell(norms: Artifact) -> None:
    text = printed(tables.norms_table(norms[0]))
    part = text[text.index("Position 0 × special") :]
    assert row(part, "6  ") == ["6", "3,027", "3,272", "3,058", "3,119", "87.0", "209"]
    assert "15,500 rows" in part
    assert "No token in: elsewhere × special." in part
    assert "cannot be told apart" not in part


def test_with_bos_position_and_token_cannot_be_told_apart(norms_of: MakeArtifact) -> None:
    artifact, _ = norms_of(2)
    for hook in artifact["hooks"]:
        hook["table"]["position0_other"] = {"rows": 0, "median": None, "max": None}
    text = printed(tables.norms_table({**artifact, "bos": True}))
    assert "No token in: position 0 × other token, elsewhere × special." in text
    assert "cannot be told apart here" in text


def test_pre_flight_and_probe(norms: Artifact) -> None:
    text = printed(tables.norms_table(norms[0]), 150)
    part = text[text.index("sparsity weight ÷ error weight") :]
    assert row(part, "6  ")[:7] == ["6", "0.810", "0.0291", "1.00", "1.00", "1.23", "34.4"]
    assert row(part, "11 ")[:3] == ["11", "0.810", "–"]
    part = text[text.index("share of a batch") :]
    assert row(part, "6  ") == ["6", "0.930 %", "96.2 %", "14.1 %", "99.1 %", "100 %", "100 %"]
    part = text[text.index("Probe") :]
    assert row(part, "6  ") == ["6", "35.5", "35.4", "35.3", "1.18", "the position"]


def test_other_shapes_of_pre_flight_and_probe_are_printed(norms_of: MakeArtifact) -> None:
    artifact, _ = norms_of(1)
    artifact["hooks"][0] |= {
        "alpha_eff": {"relu_sq": [34.4, *[1.0] * 9, 1.23]}, "esf": 0.25,
        "probe": {"verdict": "position", "kept": {"token": 0.994}, "sure": True},
    }  # fmt: skip
    text = printed(tables.norms_table(artifact))
    assert row(text[text.index("relu sq") :], "0  ") == ["0", "1.23", "34.4"]
    assert "25.0 %" in text
    assert "verdict: position · kept token 0.994 · sure: yes" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_of_a_foreign_store_and_one_hook(norms_of: MakeArtifact, width: int) -> None:
    artifact, _ = norms_of(1, positions=False)
    empty = dict.fromkeys(artifact["hooks"][0])
    text = printed(tables.norms_table({"hooks": [{**empty, "hook": "layer7", "rows": 10}]}), width)
    assert "layer7" in text
    assert "no positions or tokens" in " ".join(text.split())
    assert "context length and packing not recorded" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_is_torn_at_any_width(
    norms: Artifact, run_of: MakeRun, top_norms_of: MakeArtifact, width: int
) -> None:
    reports = [top_norms_of(f"gpt2/L6-{name}", rows=2_000)[0] for name in ("relu-none", "tanh-relu-sq")]
    runs = [run_of(act) for act in ("relu", "tanh-relu")]
    expected = {
        "15,641": tables.norms_table(norms[0]), "0.000214": tables.train_table(runs),
        "2,870–3,310": tables.top_norms_table(reports), "0.00210": tables.top_norms_table(reports[:1]),
    }  # fmt: skip
    for number, renderable in expected.items():
        assert re.search(rf"(?m)(^|\s){re.escape(number)}(\s|$)", printed(renderable, width)), number


def test_the_norms_table_is_one_block_in_80_columns(norms: Artifact) -> None:
    lines = printed(tables.norms_table(norms[0]), 80).splitlines()
    assert any(line.startswith("6 ") and "87.0" in line and "88.1 %" in line for line in lines)


def test_each_sae_is_one_row(run_of: MakeRun, norms: Artifact) -> None:
    runs = [run_of(act, l2) for act in ("relu", "tanh-relu") for l2 in ("none", "sq")]
    text = printed(tables.train_table(runs, source=norms[0]))
    assert row(text, "6  ") == [
        "6", "relu", "none", "42.3", "9.12", "0.200", "0.987", "0.800", "0.000214", "0.913", "2.87 %", "0.620", "1.43",
        "104",
    ]  # fmt: skip
    assert len(re.findall(r"(?m)^6 ", text)) == 4
    assert "seed" not in text
    assert "context 128, packed" in text


def test_explained_variance_of_all_never_stands_without_ns(run_of: MakeRun) -> None:
    for width in range(30, 130, 7):
        text = printed(tables.train_table([run_of()]), width)
        assert any("0.987  0.800" in line or "0.987 0.800" in line for line in text.splitlines()) or width < 50


def test_options_that_differ_get_a_column(run_of: MakeRun) -> None:
    text = printed(tables.train_table([run_of(seed=0, noise=0.0), run_of(seed=1, noise=0.1)], ["g/a", "g/b"]))
    assert "Trained SAEs g\n" in text
    assert row(text, "name")[:6] == ["name", "layer", "act", "l2-norm", "noise", "seed"]
    assert row(text, "b ")[:6] == ["b", "6", "relu", "none", "0.1", "1"]


def test_a_decoder_that_follows_from_the_activation_needs_no_column(run_of: MakeRun) -> None:
    usual = [run_of("relu", decoder="unit"), run_of("tanh-relu", decoder="free")]
    assert "decoder" not in printed(tables.train_table(usual, ["x", "y/z"]))
    assert "decoder" in printed(tables.train_table([*usual, run_of("tanh-relu", decoder="bounded")]))


def test_later_blocks_of_a_grid_repeat_only_the_names(run_of: MakeRun) -> None:
    text = printed(
        tables.train_table([run_of("relu"), run_of("tanh-relu")], ["group/L6-relu", "group/L6-tanh-relu"]), 80
    )
    assert row(text, "L6-relu")[:4] == ["L6-relu", "6", "relu", "none"]
    second = text[text.index("bias") :]
    assert row(second, "L6-relu")[-3:] == ["0.620", "1.43", "104"]
    assert "none" not in row(second, "L6-relu")
    assert "Trained SAE only-one" in printed(tables.train_table([run_of()], ["only-one"]))


def test_a_run_without_metrics_prints_dashes(run_of: MakeRun) -> None:
    run = run_of()
    run["metrics"] = {"all": None, "ns": {"l0": None}, "sinks": {}, "bins": []}
    text = printed(tables.train_table([run]))
    assert row(text, "6  ") == ["6", "relu", "none", *["–"] * 11]
    assert "no trained SAE" in printed(tables.train_table([]))


def test_one_sae_has_a_column_per_group(top_norms_of: MakeArtifact) -> None:
    report, arrays = top_norms_of(rows=20_000)
    text = printed(tables.top_norms_table([report], source={"context_size": 128, "packing": True}))
    assert row(text, "by norm") == ["by norm", "top 1 %", "other", "bottom 1 %"]
    assert row(text, "tokens") == ["tokens", "200", "19,600", "200"]
    assert row(text, "MRE") == ["MRE", "0.00210", "0.121", "0.121"]
    share = float(arrays["l1"][arrays["group"] == 2].sum() / arrays["l1"].sum())
    assert row(text, "share of all L1")[1] == f"{share * 100:.1f} %"
    assert row(text, "by kind") == ["by kind", "position 0", "other special", "ordinary"]
    assert "20,000 held-out tokens of gpt2-resid_post-3f9a1c" in text
    assert "context 128, packed" in text
    assert "top 1 % by norm, positions: 0 (156)" in text


@pytest.mark.parametrize("many", [2, 6])
def test_saes_stand_side_by_side(top_norms_of: MakeArtifact, many: int) -> None:
    reports = [top_norms_of(f"gpt2/L6-sae{place}", rows=2_000)[0] for place in range(many)]
    text = printed(tables.top_norms_table(reports), 120)
    assert row(text, "by norm")[1:] == [f"sae{place}" for place in range(many)]
    assert row(text, "MRE")[1:] == ["top 1 %", *["0.00210"] * many]


def test_a_kind_without_tokens_is_named(top_norms_of: MakeArtifact) -> None:
    report, _ = top_norms_of(rows=2_000)
    nothing = dict.fromkeys(report["kinds"]["special"]) | {"rows": 0, "exclusive_features": 0}
    report = {**report, "kinds": {**report["kinds"], "special": nothing}}
    assert "No token: other special." in printed(tables.top_norms_table([report, report]))
    single = printed(tables.top_norms_table([report]))
    assert row(single[single.index("by kind") :], "MRE")[2] == "–"


def group(**values: Any) -> dict[str, Any]:
    return {"rows": 98_000, "l0": {"mean": None}, **values}


def findings(
    top: dict[str, Any], other: dict[str, Any], bottom: dict[str, Any] | None = None, **more: Any
) -> list[str]:
    report = {"top": 0.01, "rows": 100_000, "groups": {"top": top, "other": other, "bottom": bottom or {}}, **more}
    return tables.top_norms_findings(report)


def test_findings_of_easy_sinks() -> None:
    top = group(
        rows=1000, norm_min=2870.0, norm_max=3310.0, l0={"mean": 9.1}, l1_share=0.31, loss_share=0.97, mre=0.002,
        magnitude_error=0.0015, direction_error=0.0005, norm_ratio=0.96,
        positions=[{"position": 0, "count": 780}, {"position": 3, "count": 12}],
        tokens=[{"text": "<|endoftext|>", "count": 612}, {"text": " the", "count": 30}],
    )  # fmt: skip
    assert findings(top, group(l0={"mean": 45.5}, mre=0.15), group(mre=0.21)) == [
        "The top 1 % by norm (1,000 tokens, norm 2,870–3,310) are 78 % position 0; their most frequent token is "
        "'<|endoftext|>' (61.2 %).",
        "They are 1 % of the tokens and hold 31 % of all L1 and 97 % of the squared-error loss; they activate 9.1 "
        "features per token (L0), 0.2 × the others' 45.5.",
        "Their relative error (MRE) is 0.002, against 0.15 for the others and 0.21 for the bottom 1 %: for their size "
        "they are reconstructed better than the others; 75 % of their error is length, the rest direction.",
    ]


def test_findings_of_expensive_ordinary_tokens() -> None:
    top = group(
        rows=1000, l0={"mean": 240.0}, l1_share=0.06, loss_share=None, mre=0.4, norm_ratio=0.7,
        positions=[{"position": 17, "count": 20}, {"position": 40, "count": 19}], tokens=[],
    )  # fmt: skip
    assert findings(top, group(l0={"mean": 40.0}, mre=0.2), group(mre=None)) == [
        "The top 1 % by norm (1,000 tokens) do not have position 0 among their most frequent positions.",
        "They are 1 % of the tokens and hold 6 % of all L1; they activate 240 features per token (L0), 6 × the "
        "others' 40.",
        "Their relative error (MRE) is 0.4, against 0.2 for the others: for their size they are reconstructed worse "
        "than the others.",
    ]


def test_findings_of_sinks_given_up() -> None:
    top = group(
        rows=1000, l0={"mean": 0.0}, mre=0.98, norm_ratio=0.02, positions=[{"position": 0, "count": 1000}], tokens=None
    )
    found = findings(top, group(l0={"mean": 40.0}, mre=0.2))
    assert found[0] == "The top 1 % by norm (1,000 tokens) are 100 % position 0."
    assert found[1] == "They activate 0 features per token (L0), 0 × the others' 40."
    assert found[2].endswith("the SAE has given them up, their reconstruction has 2 % of their length.")


def test_findings_of_an_sae_of_directions_say_nothing_of_lengths() -> None:
    top = group(rows=1000, loss_share=0.02, mre=0.95, norm_ratio=0.03, direction_error=0.08, tokens=None)
    of_cosine = {"config": {"l2_norm": "cosine"}}
    found = findings(top, group(mre=0.9, direction_error=0.05), group(direction_error=0.04), **of_cosine)
    assert found[1] == "They are 1 % of the tokens and hold 2 % of the cosine loss."
    assert found[2] == (
        "Their direction error is 0.08, against 0.05 for the others and 0.04 for the bottom 1 %; how long a "
        "reconstruction is was not trained (--l2-norm cosine)."
    )
    assert len(findings(group(rows=1000, tokens=None), group(), **of_cosine)) == 1


def test_findings_without_positions_or_difference() -> None:
    top = group(rows=1000, l0={"mean": 41.0}, mre=0.2, positions=[], tokens=None)
    found = findings(top, group(l0={"mean": 40.0}, mre=0.2))
    assert found[0].endswith("have no recorded positions.")
    assert "about the same as the others' 40" in found[1]
    assert "about as well as the others" in found[2]


def test_findings_never_claim_position_0_that_is_not_there() -> None:
    every = [{"position": 5, "count": 600}, {"position": 9, "count": 400}]
    assert "never at position 0" in findings(group(rows=1000, positions=every), {})[0]
    listed = [{"position": 0, "count": 0}, {"position": 9, "count": 400}]
    assert "never at position 0" in findings(group(rows=1000, positions=listed), {})[0]
    few = [{"position": 9, "count": 400}]
    assert "never" not in findings(group(rows=1000, positions=few), {})[0]
    assert "never" in findings(group(rows=1000, positions=few), {}, kinds={"position0": {"rows": 0}})[0]


def test_findings_of_nothing() -> None:
    assert tables.top_norms_findings({}) == ["There is no token in the top group."]
    assert findings({"rows": 3}, {}) == ["The top 1 % by norm (3 tokens) have no recorded positions."]


def test_the_workspace_keeps_names_whole() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "activations", "name": "gpt2-resid_post-3f9a1c", "status": "complete", "size": 3_145_728_000,
         "detail": "2,000,000 tokens"},
        {"kind": "sae", "name": "gpt2-resid_post-3f9a1c-L6-relu-none/L6-tanh-relu-sq-seed1", "status": "unfinished",
         "size": None, "detail": None},
    ]  # fmt: skip
    wide, narrow = printed(tables.workspace_table(rows), 130), printed(tables.workspace_table(rows), 70)
    for text in (wide, narrow):
        assert rows[1]["name"] in text
        assert "2.93 GiB" in text
    assert row(wide, "activations") == ["activations", rows[0]["name"], "complete", "2.93 GiB", "2,000,000 tokens"]
    assert "unfinished · –" in narrow
    assert "empty" in printed(tables.workspace_table([]))


def test_markup_in_names_is_printed_as_it_stands(run_of: MakeRun) -> None:
    assert "[bold]x[/bold]" in printed(tables.train_table([run_of()], ["[bold]x[/bold]"]))
    assert "[/red]" in printed(tables.workspace_table([{"kind": "sae", "name": "[/red]", "status": "complete"}]))


def test_columns_that_do_not_fit_go_below_with_their_keys() -> None:
    columns = [[Column(f"c{number}", ["1234567"])] for number in range(6)]
    text = printed(WideTable([Column("key", ["row"])], columns), 40)
    assert [line.split() for line in text.splitlines() if line.startswith("row")] == [
        ["row", "1234567", "1234567", "1234567", "1234567"], ["row", "1234567", "1234567"],
    ]  # fmt: skip
