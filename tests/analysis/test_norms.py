"""norms.json and norms.safetensors against plain numpy on rows whose norms are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_store import HOOK, KnownStore
from safetensors.numpy import load_file

from nsae_cli import interrupt
from nsae_cli.analysis import norms_artifact
from nsae_cli.analysis.norms_artifact import NormsArtifact, NormsOptions, run_norms
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Workspace

KEYS = {
    "hook", "layer", "rows", "mean", "median", "p1", "p5", "p10", "p25", "p75", "p90", "p95", "p99", "max", "cv",
    "cv_ns", "sinks", "sink_share_sq", "table", "top_tokens", "alpha_eff", "esf", "probe",
}  # fmt: skip


@pytest.fixture
def measured(known: KnownStore, workspace: Workspace) -> NormsArtifact:
    return run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())


@pytest.fixture
def hook(measured: NormsArtifact) -> dict[str, Any]:
    [entry] = measured.document["hooks"]
    return dict(entry)


def test_document(measured: NormsArtifact, known: KnownStore) -> None:
    document = json.loads((measured.artifact.path / "norms.json").read_text(encoding="utf-8"))
    assert document == measured.document
    assert document["format_version"] == 1
    assert document["activations"]["name"] == "known"
    assert [set(entry) for entry in document["hooks"]] == [KEYS]
    assert measured.artifact.name == "known"
    assert {path.name for path in measured.artifact.path.iterdir()} == {
        "norms.json", "norms.safetensors", "norms.png", "norms-position0.png",
    }  # fmt: skip


def test_quantiles_and_spread(hook: dict[str, Any], known: KnownStore) -> None:
    n, ns = known.norm, known.norm[~known.is_sink]
    assert (hook["hook"], hook["layer"], hook["rows"]) == (HOOK, 1, 300)
    assert hook["mean"] == pytest.approx(n.mean())
    assert hook["mean"] == pytest.approx((60 * 40 + 2 * 30 + 1.75 * 240 - (1.5 + 2)) / 300, rel=0.01)
    for key, level in {"median": 50, "p1": 1, "p5": 5, "p10": 10, "p25": 25, "p75": 75, "p90": 90, "p95": 95}.items():
        assert hook[key] == pytest.approx(np.percentile(n, level)), key
    assert (hook["p99"], hook["max"]) == (40, 40)
    assert hook["cv"] == pytest.approx(n.std() / n.mean())
    assert hook["cv_ns"] == pytest.approx(ns.std() / ns.mean())


def test_sinks_by_each_rule_and_what_they_hold(hook: dict[str, Any], known: KnownStore) -> None:
    # 40 > 3 × 1.75 (position), 30 and 40 > 10 × 2 (norm); no coordinate exceeds 100 (massive).
    assert hook["sinks"] == {
        "total": 62, "position": 60, "norm": 62, "massive": 0,
        "overlap": {
            "position": 0, "norm": 2, "massive": 0,
            "position+norm": 60, "position+massive": 0, "norm+massive": 0, "position+norm+massive": 0,
        },
    }  # fmt: skip
    sinks = 60 * 1600 + 2 * 900
    assert hook["sink_share_sq"] == pytest.approx(sinks / (known.norm**2).sum())


def test_position_by_special_token(hook: dict[str, Any], known: KnownStore) -> None:
    special = known.token == 9
    first = known.position == 0
    for name, mask in {
        "position0_special": first & special, "position0_other": first & ~special,
        "other_special": ~first & special, "other": ~first & ~special,
    }.items():  # fmt: skip
        n = known.norm[mask]
        assert hook["table"][name] == {"rows": len(n), "median": np.median(n), "max": n.max()}
    assert [hook["table"][name]["rows"] for name in hook["table"]] == [20, 40, 1, 239]


def test_top_tokens_are_those_of_the_top_one_percent(hook: dict[str, Any], known: KnownStore) -> None:
    # 3 of 300 rows: of equal norms the first rows, which stand at 0, 5 and 10.
    assert [known.token[row] for row in (0, 5, 10)] == [9, 2, 3]
    assert hook["top_tokens"] == [{"token": token, "text": f"#{token}", "count": 1} for token in (2, 3, 9)]


def test_effective_batch_fraction(hook: dict[str, Any], known: KnownStore) -> None:
    for name, power in (("none", 2), ("norm", 1), ("sq", 0)):
        for scope, n in (("all", known.norm), ("ns", known.norm[~known.is_sink])):
            a = n**power
            assert hook["esf"][name][scope] == pytest.approx(a.sum() ** 2 / (len(a) * (a**2).sum())), (name, scope)
    assert hook["esf"]["none"]["all"] < 0.22 < hook["esf"]["none"]["ns"]


def test_relative_sparsity_weight(hook: dict[str, Any], known: KnownStore) -> None:
    sinks, ns = known.norm[known.is_sink], known.norm[~known.is_sink]
    for act, degree in (("relu", 1), ("tanh-relu", 0)):
        for name, power in (("none", 2), ("norm", 1), ("sq", 0)):
            expected = ((sinks**degree).mean() / (sinks**power).mean()) / ((ns**degree).mean() / (ns**power).mean())
            assert hook["alpha_eff"][act][name]["sinks"] == pytest.approx(expected)
            assert hook["alpha_eff"][act][name]["ns"] == pytest.approx(1)
    edges = np.quantile(known.norm[~known.is_sink & ~known.held_out], np.arange(1, 10) / 10)
    top = ns[ns >= edges[-1]]
    expected = (top.mean() / (top**2).mean()) / (ns.mean() / (ns**2).mean())
    assert hook["alpha_eff"]["relu"]["none"]["bins"][9] == pytest.approx(expected)


def test_tensors(measured: NormsArtifact, known: KnownStore) -> None:
    tensors = load_file(measured.artifact.path / "norms.safetensors")
    assert {name: (value.dtype.name, value.shape) for name, value in tensors.items()} == {
        "counts": ("int64", (1, 200)), "position0_counts": ("int64", (1, 200)), "edges": ("float64", (201,)),
        "quantile_levels": ("float64", (11,)), "quantiles": ("float64", (1, 11)),
    }  # fmt: skip
    edges = tensors["edges"]
    assert (edges[0], edges[-1]) == pytest.approx((0, np.log10(40)), abs=1e-6)
    for name, n in (("counts", known.norm), ("position0_counts", known.norm[known.position == 0])):
        assert tensors[name][0].sum() == len(n)
        np.testing.assert_array_equal(tensors[name][0], np.histogram(np.log10(n), bins=edges)[0])
    np.testing.assert_allclose(tensors["quantiles"][0], np.quantile(known.norm, tensors["quantile_levels"]))


def test_store_from_elsewhere(foreign: KnownStore, workspace: Workspace) -> None:
    result = run_norms(open_activations(foreign.path), NormsOptions(), workspace, None, SilentReporter())
    [hook] = result.document["hooks"]
    assert hook["median"] == pytest.approx(np.median(foreign.norm))
    assert hook["max"] == 40
    assert (hook["table"], hook["top_tokens"]) == (None, [])
    assert hook["sinks"]["position"] is None, "rule 1 needs positions"
    # 60 rows of norm 40 and two of norm 30 exceed 10 × the median all the same.
    assert (hook["sinks"]["total"], hook["sinks"]["norm"]) == (62, 62)
    assert not (result.artifact.path / "norms-position0.png").exists()
    assert (result.artifact.path / "norms.png").is_file()
    assert result.document["model"] is None


def test_what_a_store_from_elsewhere_lacks_is_said(foreign: KnownStore, workspace: Workspace) -> None:
    class Reporter(SilentReporter):
        def warn(self, text: str) -> None:
            warnings.append(text)

    warnings: list[str] = []
    run_norms(open_activations(foreign.path), NormsOptions(), workspace, None, Reporter())
    assert warnings == [
        "foreign has no positions: sink rule 1 is off, blocks of 128 rows stand for contexts",
        "foreign has no tokens: nothing can be said of special tokens or of the commonest",
    ]


def test_found_again_and_refused_for_another_store(
    measured: NormsArtifact, known: KnownStore, foreign: KnownStore, workspace: Workspace
) -> None:
    again = run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())
    assert again.already_complete
    assert again.document == measured.document
    with pytest.raises(UsageError, match="--name known holds the norms of known, not of foreign"):
        run_norms(open_activations(foreign.path), NormsOptions(), workspace, "known", SilentReporter())
    manifest = known.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"bos": true', '"bos": false'))
    with pytest.raises(UsageError, match="of an earlier known; choose another --name"):
        run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())


@pytest.mark.parametrize("problem", ["foreign", "no model"])
def test_probe_of_a_store_that_cannot_be_run_again(
    problem: str, known: KnownStore, foreign: KnownStore, workspace: Workspace
) -> None:
    store = open_activations(foreign.path if problem == "foreign" else known.path)
    expected = "has no tokens and positions" if problem == "foreign" else "does not say which model"
    with pytest.raises(UsageError, match=expected):
        run_norms(store, NormsOptions(probe=True), workspace, None, SilentReporter())


def test_signal_while_measuring(known: KnownStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_signum", 2)
    with pytest.raises(Interrupted, match="nothing was written"):
        run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())
    assert not list(workspace.root.rglob("norms.*"))


def test_a_run_that_was_killed_is_measured_again(
    known: KnownStore, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(norms_artifact, "write_norms", killed)
        with pytest.raises(KeyboardInterrupt):
            run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())
    folder = workspace.root / "norms" / "known"
    (folder / ".norms.json.abc.tmp").write_text("{")
    result = run_norms(open_activations(known.path), NormsOptions(), workspace, None, SilentReporter())
    assert not result.already_complete
    assert not list(Path(folder).glob(".*"))
