"""top_norms.json on an SAE and a store that can be followed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_store import HOOK, KnownStore, write_known, write_sae
from pydantic import ValidationError
from safetensors.numpy import load_file

from nsae_cli import interrupt
from nsae_cli.analysis.top_norms_artifact import TopNormsAnalysis, TopNormsOptions, run_top_norms
from nsae_cli.errors import ArtifactError, Interrupted, UsageError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Kind, Workspace
from sealed_json import edit_json

ENTRY = {
    "rows", "norm_min", "norm_max", "l0", "l1", "mre", "direction_error", "magnitude_error", "shrinkage", "norm_ratio",
    "l1_share", "loss_share", "tokens", "positions", "exclusive_features",
}  # fmt: skip

# Feature j < 4 is e_j shrunk by 0.25; feature 4 fires on long rows along e_0 only, feature 5 never.
W_ENC = torch.cat([torch.eye(4), torch.tensor([[0.5, 0, 0, 0], [0, 0, 0, 0]])]).T.contiguous()
B_ENC = torch.tensor([-0.25, -0.25, -0.25, -0.25, -10.0, -1.0])
W_DEC = torch.cat([torch.eye(4), torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1]])])
WEIGHTS = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": torch.zeros(4)}


def by_hand(known: KnownStore) -> dict[str, np.ndarray]:
    """Per held-out row: n, row number, acts [N, 6], error ‖x̂ − x‖², ‖x̂‖."""
    row = np.flatnonzero(known.held_out)
    n = known.norm[row]
    x = np.zeros((len(row), 4))
    x[np.arange(len(row)), row % 4] = n
    acts = np.maximum(x @ W_ENC.double().numpy() + B_ENC.double().numpy(), 0)
    x_hat = acts @ W_DEC.double().numpy()
    return {"n": n, "row": row, "acts": acts, "x": x, "x_hat": x_hat, "error": ((x_hat - x) ** 2).sum(1)}


@pytest.fixture
def analysed(known: KnownStore, workspace: Workspace, tmp_path: Path) -> dict[str, Any]:
    return _analyse(known, workspace, tmp_path, top=0.2).results[0].document


def _analyse(
    known: KnownStore, workspace: Workspace, tmp_path: Path, *, top: float, rows: int | None = None, name: str = "sae"
) -> TopNormsAnalysis:
    folder = tmp_path / "my-sae"
    if not folder.exists():
        write_sae(folder, known, WEIGHTS)
    options = TopNormsOptions(top=top, rows=rows)
    return run_top_norms([str(folder)], str(known.path), options, workspace, name, SilentReporter())


def test_document(analysed: dict[str, Any], workspace: Workspace) -> None:
    assert json.loads((workspace.root / "top-norms" / "sae" / "top_norms.json").read_text()) == analysed
    assert (analysed["format_version"], analysed["top"], analysed["rows"]) == (1, 0.2, 15)
    assert (analysed["sae"]["name"], analysed["activations"]["name"]) == ("my-sae", "known")
    assert set(analysed["groups"]) == {"top", "other", "bottom"}
    assert set(analysed["kinds"]) == {"position0", "special", "ordinary"}
    for entry in (*analysed["groups"].values(), *analysed["kinds"].values()):
        assert set(entry) == ENTRY
        assert set(entry["l0"]) == set(entry["l1"]) == {"mean", "median", "p5", "p95"}


def test_groups_are_ranked_by_norm_and_row(analysed: dict[str, Any], known: KnownStore, workspace: Workspace) -> None:
    hand = by_hand(known)
    order = np.lexsort((hand["row"], hand["n"]))  # k = round(0.2 · 15) = 3
    tensors = load_file(workspace.root / "top-norms" / "sae" / "top_norms.safetensors")
    assert set(tensors) == {"norm", "l0", "l1", "rho", "group", "kind", "token", "position", "row"}
    np.testing.assert_array_equal(tensors["row"], hand["row"])
    expected = np.ones(15, dtype=np.uint8)
    expected[order[:3]], expected[order[-3:]] = 0, 2
    np.testing.assert_array_equal(tensors["group"], expected)
    kinds = np.where(known.position[hand["row"]] == 0, 2, 0)
    np.testing.assert_array_equal(tensors["kind"], kinds)
    np.testing.assert_array_equal(tensors["token"], known.token[hand["row"]])
    np.testing.assert_array_equal(tensors["position"], known.position[hand["row"]])
    assert [tensors[name].dtype.name for name in ("norm", "l0", "l1", "rho", "token", "position", "row")] == [
        "float32", "int32", "float32", "float32", "int32", "int32", "int64",
    ]  # fmt: skip
    np.testing.assert_allclose(tensors["l1"], hand["acts"].sum(1), rtol=1e-6)
    np.testing.assert_array_equal(tensors["l0"], (hand["acts"] > 0).sum(1))
    np.testing.assert_allclose(tensors["rho"], hand["error"] / hand["n"] ** 2, rtol=1e-5)
    assert [analysed["groups"][name]["rows"] for name in ("top", "other", "bottom")] == [3, 9, 3]
    assert (analysed["groups"]["top"]["norm_min"], analysed["groups"]["top"]["norm_max"]) == (40, 40)


@pytest.mark.parametrize("name", ["top", "other", "bottom", "position0", "ordinary"])
def test_numbers_of_a_group(name: str, analysed: dict[str, Any], known: KnownStore) -> None:
    hand = by_hand(known)
    order = np.lexsort((hand["row"], hand["n"]))
    first = known.position[hand["row"]] == 0
    masks = {"bottom": order[:3], "other": order[3:-3], "top": order[-3:], "position0": np.flatnonzero(first),
             "ordinary": np.flatnonzero(~first)}  # fmt: skip
    entry = (analysed["groups"] | analysed["kinds"])[name]
    part = {key: value[masks[name]] for key, value in hand.items()}
    l0, l1 = (part["acts"] > 0).sum(1), part["acts"].sum(1)
    for found, values in ((entry["l0"], l0), (entry["l1"], l1)):
        expected = {"mean": values.mean(), "median": np.median(values)}
        expected |= {"p5": np.quantile(values, 0.05), "p95": np.quantile(values, 0.95)}
        assert found == pytest.approx(expected, rel=1e-6)
    x_norm, x_hat_norm = part["n"], np.sqrt((part["x_hat"] ** 2).sum(1))
    dot = (part["x"] * part["x_hat"]).sum(1)
    cosine = dot / (x_norm * x_hat_norm)
    assert entry["mre"] == pytest.approx((part["error"] / x_norm**2).mean(), rel=1e-5)
    assert entry["direction_error"] == pytest.approx((1 - cosine**2).mean(), abs=1e-6)
    assert entry["magnitude_error"] == pytest.approx(((x_hat_norm / x_norm - cosine) ** 2).mean(), rel=1e-5)
    assert entry["mre"] == pytest.approx(entry["direction_error"] + entry["magnitude_error"], rel=1e-5)
    assert entry["norm_ratio"] == pytest.approx(x_hat_norm.sum() / x_norm.sum(), rel=1e-5)
    assert entry["shrinkage"] == pytest.approx((x_hat_norm**2).sum() / dot.sum(), rel=1e-5)
    assert entry["l1_share"] == pytest.approx(l1.sum() / hand["acts"].sum(), rel=1e-5)
    assert entry["loss_share"] == pytest.approx(part["error"].sum() / hand["error"].sum(), rel=1e-5)


def test_shares_add_up(analysed: dict[str, Any]) -> None:
    for side in ("groups", "kinds"):
        assert sum(entry["rows"] for entry in analysed[side].values()) == 15
        for share in ("l1_share", "loss_share"):
            assert sum(entry[share] or 0 for entry in analysed[side].values()) == pytest.approx(1)
    special = analysed["kinds"]["special"]
    assert (special["rows"], special["norm_min"], special["l0"]["mean"], special["mre"]) == (0, None, None, None)
    assert (special["l1_share"], special["loss_share"], special["exclusive_features"]) == (None, None, 0)


def test_features_that_fire_in_one_group_only(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    weights = {key: value.clone() for key, value in WEIGHTS.items()}
    weights["W_enc"][:, 4] = torch.tensor([0, 0, 0, 0.5])  # long rows along e_3: position 0 of held-out contexts
    weights["W_enc"][2, 5], weights["b_enc"][5] = 1, -20.0  # the row of norm 30, along e_2
    folder = write_sae(tmp_path / "x", known, weights)
    run = run_top_norms([str(folder)], str(known.path), TopNormsOptions(top=0.2), workspace, None, SilentReporter())
    document = run.results[0].document
    hand = by_hand(known)
    fired = np.maximum(hand["x"] @ weights["W_enc"].double().numpy() + weights["b_enc"].double().numpy(), 0) > 0
    tensors = load_file(run.results[0].artifact.path / "top_norms.safetensors")
    for side, labels in (("groups", ("bottom", "other", "top")), ("kinds", ("ordinary", "special", "position0"))):
        for label, name in enumerate(labels):
            inside = tensors[side[:-1]] == label
            expected = int((fired[inside].any(0) & ~fired[~inside].any(0)).sum())
            assert document[side][name]["exclusive_features"] == expected, name
    assert document["groups"]["top"]["exclusive_features"] == 1
    assert document["kinds"]["ordinary"]["exclusive_features"] == 4


@pytest.mark.parametrize(
    ("top", "rows", "sizes"),
    [
        (0.01, None, (1, 13, 1)),
        (0.5, None, (8, 0, 7)),
        (0.2, 5, (1, 3, 1)),
        (0.5, 1, (1, 0, 0)),
        (0.1, None, (2, 11, 2)),
    ],
)
def test_sizes_of_the_groups(
    top: float, rows: int | None, sizes: tuple[int, int, int], known: KnownStore, workspace: Workspace, tmp_path: Path
) -> None:
    document = _analyse(known, workspace, tmp_path, top=top, rows=rows).results[0].document
    assert document["rows"] == (rows or 15)
    assert tuple(document["groups"][name]["rows"] for name in ("top", "other", "bottom")) == sizes


def test_weighted_loss_share(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "sq", known, WEIGHTS, l2_norm="sq")
    run = run_top_norms([str(folder)], str(known.path), TopNormsOptions(top=0.2), workspace, None, SilentReporter())
    hand = by_hand(known)
    order = np.lexsort((hand["row"], hand["n"]))
    rho = hand["error"] / hand["n"] ** 2
    found = run.results[0].document["groups"]["top"]["loss_share"]
    assert found == pytest.approx(rho[order[-3:]].sum() / rho.sum(), rel=1e-5)


def test_store_from_elsewhere(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "x", known, WEIGHTS)
    foreign = write_known(tmp_path / "foreign", foreign=True, contexts=600)
    run = run_top_norms([str(folder)], str(foreign.path), TopNormsOptions(), workspace, None, SilentReporter())
    document = run.results[0].document
    assert document["rows"] == 128, "without positions blocks of 128 rows stand for contexts, of 24 one is held out"
    tensors = load_file(run.results[0].artifact.path / "top_norms.safetensors")
    np.testing.assert_array_equal(tensors["row"], np.arange(19 * 128, 20 * 128))
    np.testing.assert_allclose(tensors["norm"], foreign.norm[19 * 128 : 20 * 128])
    assert set(tensors["token"]) == set(tensors["position"]) == {-1}
    assert [document["kinds"][kind]["rows"] for kind in ("position0", "special", "ordinary")] == [0, 0, 128]
    assert document["groups"]["top"]["tokens"] == document["groups"]["top"]["positions"] == []
    small = write_known(tmp_path / "small", foreign=True)
    with pytest.raises(UsageError, match="small has fewer than 20 contexts"):
        run_top_norms([str(folder)], str(small.path), TopNormsOptions(), workspace, "n", SilentReporter())


def test_rows_of_no_length_are_left_out(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    path = known.path / "s0.safetensors"
    tensors = load_torch(path)
    tensors["norms"][96] = 1e-7  # held out; ñ is 1.7
    save_file(tensors, path)
    assert _analyse(known, workspace, tmp_path, top=0.2).results[0].document["rows"] == 14


def test_names_and_refusals(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    first = _analyse(known, workspace, tmp_path, top=0.2)
    assert not first.already_complete
    assert [path.name for path in first.figures] == ["l0.png", "l1.png"]
    assert _analyse(known, workspace, tmp_path, top=0.2).already_complete
    with pytest.raises(UsageError, match=r"--name sae holds another analysis \(--top 0.2 -> 0.3\)"):
        _analyse(known, workspace, tmp_path, top=0.3)
    with pytest.raises(UsageError, match=r"\(--rows none -> 5\)"):
        _analyse(known, workspace, tmp_path, top=0.2, rows=5)
    other = write_sae(tmp_path / "other", known, WEIGHTS)
    with pytest.raises(UsageError, match=r"\(SAE my-sae -> other\)"):
        run_top_norms([str(other)], str(known.path), TopNormsOptions(top=0.2), workspace, "sae", SilentReporter())
    with pytest.raises(UsageError, match="'known' that my-sae was trained on are not in"):
        run_top_norms([str(tmp_path / "my-sae")], None, TopNormsOptions(), workspace, "n", SilentReporter())


def test_several_saes(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    group = workspace.folder(Kind.SAE, "g")
    for cell in ("L1-a", "L1-b"):
        write_sae(group / cell, known, WEIGHTS)
    known.path.rename(tmp_path / "moved")
    (workspace.root / "activations").mkdir()
    (tmp_path / "moved").rename(workspace.folder(Kind.ACTIVATIONS, "known"))
    run = run_top_norms(["g", "g/L1-a"], None, TopNormsOptions(top=0.2), workspace, None, SilentReporter())
    assert [result.artifact.name for result in run.results] == ["g-L1-a", "g-L1-b"], "one SAE named twice is one"
    assert [path.name for path in run.comparison] == ["g-l0.png", "g-l1.png"]
    before = [path.stat().st_mtime_ns for path in run.comparison]
    again = run_top_norms([], None, TopNormsOptions(top=0.2), workspace, None, SilentReporter())
    assert again.already_complete
    assert [path.stat().st_mtime_ns for path in again.comparison] == before
    named = run_top_norms(["g"], None, TopNormsOptions(top=0.3), workspace, "n", SilentReporter())
    assert [result.artifact.name for result in named.results] == ["n-L1-a", "n-L1-b"]
    assert [path.name for path in named.comparison] == ["n-l0.png", "n-l1.png"]


def test_misfits(known: KnownStore, workspace: Workspace, tmp_path: Path) -> None:
    narrow = write_sae(tmp_path / "narrow", known, {
        "W_enc": torch.ones(3, 6), "b_enc": B_ENC, "W_dec": torch.ones(6, 3), "b_dec": torch.zeros(3)})  # fmt: skip
    with pytest.raises(ArtifactError, match="width 3, known holds width 4"):
        run_top_norms([str(narrow)], str(known.path), TopNormsOptions(), workspace, None, SilentReporter())
    folder = write_sae(tmp_path / "hook", known, WEIGHTS)
    edit_json(folder / "run.json", hook="blocks.7.hook_resid_pre")
    with pytest.raises(ArtifactError, match=rf"reads blocks.7.hook_resid_pre, known holds {HOOK}"):
        run_top_norms([str(folder)], str(known.path), TopNormsOptions(), workspace, None, SilentReporter())
    assert not (workspace.root / "top-norms").exists()


def test_signal(known: KnownStore, workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "_signum", 15)
    with pytest.raises(Interrupted, match="run the same command again"):
        _analyse(known, workspace, tmp_path, top=0.2)
    assert not list(workspace.root.rglob("top_norms.*"))


@pytest.mark.parametrize("top", ["0", "51%", "-1%", "nan", True])
def test_shares_that_are_none(top: object) -> None:
    with pytest.raises(ValidationError):
        TopNormsOptions(top=top)  # type: ignore[arg-type]
