"""Each prediction on results that satisfy it, that violate it, and that say nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_saes import HOOK, write_eval, write_sae
from safetensors.numpy import load_file

from hand_store import make_rows, write_full
from nsae_cli.analysis.comparison import CompareOptions, compare
from nsae_cli.analysis.comparison_cells import Sae
from nsae_cli.analysis.predictions import check_predictions

SEEDS = range(3)


def saes(workspace: Path, altered: Mapping[str, list[dict[str, Any]]] | None = None) -> list[Sae]:
    """Everything that was written, with what was done to the stores by name."""
    found = []
    for path in sorted(workspace.glob("saes/*/*/run.json")):
        run = json.loads(path.read_text())
        name = f"{path.parent.parent.name}/{path.parent.name}"
        evaluation = workspace / "evals" / name.replace("/", "-")
        document = contexts = None
        if evaluation.is_dir():
            document = json.loads((evaluation / "eval.json").read_text())
            contexts = load_file(evaluation / "contexts.safetensors")
        store = run["inputs"]["activations"]["name"]
        folder = workspace / "activations" / store
        found.append(
            Sae(
                name,
                path.parent,
                run,
                document,
                contexts,
                (altered or {}).get(store, []),
                folder if folder.is_dir() else None,
            )
        )
    return found


def check(workspace: Path, which: str, altered: Mapping[str, list[dict[str, Any]]] | None = None) -> dict[str, Any]:
    predictions = check_predictions(compare(saes(workspace, altered), CompareOptions()))
    [found] = [prediction for prediction in predictions if prediction["id"] == which]
    return found


@pytest.mark.parametrize("which", ["P1", "P2", "P3", "P4", "P5", "P6", "P7"])
def test_nothing_to_look_at(tmp_path: Path, which: str) -> None:
    write_sae(tmp_path, "g/0", run={"sinks": {"total": 0, "position": 0}}, sinks={"mre": None})
    found = check(tmp_path, which)
    assert (found["verdict"], found["no_data"]) == ("undecided", True)
    assert found["needs"]


# P1

LOSSES = {(0, 0): ("none", "none"), (1, 0): ("norm", "none"), (2, 0): ("sq", "none"), (2, 1): ("sq", "norm")}


def slopes(
    workspace: Path, nbi: Mapping[tuple[int, int], float], store: str = "mini-sink", wobble: float = 0.01
) -> None:
    for (p, q), value in nbi.items():
        for seed in SEEDS:
            name = f"{store}/{p}{q}{seed}"
            config = {"l2_norm": LOSSES[p, q][0], "l1_norm": LOSSES[p, q][1], "seed": seed}
            own = value + wobble * (seed - 1) * (1 + p)
            write_sae(workspace, name, config=config, ns={"nbi": own}, store=store)
            write_eval(workspace, name, nbi=own, spread=0.05, seed=seed)


ALTERED = {"shuffled": [{"change": "permute-norms", "seed": 0, "activations": "mini-sink"}]}


def test_p1(tmp_path: Path) -> None:
    slopes(tmp_path, {(0, 0): -0.6, (1, 0): 0.25, (2, 0): 1.0, (2, 1): 0.2})
    alone = check(tmp_path, "P1", ALTERED)
    assert alone["verdict"] == "undecided"
    assert alone["clauses"] == {"confirmed": 3, "refuted": 0, "undecided": 0}
    assert "permuted over directions" in alone["needs"][0]
    # With permuted norms −.1, .05, .1: for p = 1 no further from 0 and no nearer than before.
    slopes(tmp_path, {(0, 0): -1.3, (1, 0): -1.15, (2, 0): -1.1, (2, 1): -1.2}, "shuffled", wobble=0.03)
    both = check(tmp_path, "P1", ALTERED)
    assert (both["verdict"], both["clauses"]) == ("undecided", {"confirmed": 5, "refuted": 0, "undecided": 1})


def test_p1_confirmed(tmp_path: Path) -> None:
    slopes(tmp_path, {(0, 0): -0.6, (1, 0): 0.32, (2, 0): 1.0, (2, 1): 0.2}, wobble=0.004)
    slopes(tmp_path, {(0, 0): -1.3, (1, 0): -1.19, (2, 0): -1.1, (2, 1): -1.2}, "shuffled", wobble=0.004)
    found = check(tmp_path, "P1", ALTERED)
    assert (found["verdict"], found["clauses"]["confirmed"]) == ("confirmed", 6)
    assert "nbi_rel −0.8" in found["evidence"][0]
    assert found["needs"] == []


def test_p1_refuted_by_one_loss(tmp_path: Path) -> None:
    slopes(tmp_path, {(0, 0): -0.6, (1, 0): 0.6, (2, 0): 1.0, (2, 1): 0.2})
    found = check(tmp_path, "P1")
    assert found["verdict"] == "refuted"
    assert found["clauses"] == {"confirmed": 2, "refuted": 1, "undecided": 0}


def test_p1_undecided_where_seeds_straddle(tmp_path: Path) -> None:
    slopes(tmp_path, {(0, 0): 0.1, (1, 0): 0.2, (2, 0): 1.0, (2, 1): 0.2}, wobble=0.3)
    assert check(tmp_path, "P1")["clauses"]["undecided"] >= 1


# P2


def given_up(workspace: Path, *, mre: float = 0.97, ratio: float = 0.03, ns: float = 0.1, all_: float = 1.5) -> None:
    for seed in SEEDS:
        for l2_norm, beta in (("norm", 0.2), ("sq", 0.05)):
            name = f"g/{l2_norm}{seed}"
            sinks = {"mre": mre, "norm_ratio": ratio} if l2_norm == "sq" else None
            write_sae(workspace, name, config={"l2_norm": l2_norm, "seed": seed}, sinks=sinks, run={"beta": beta})
            own = ns * (1 + 0.002 * seed) if l2_norm == "sq" else 0.1
            write_eval(workspace, name, ce_ns=own, ce_all=all_ if l2_norm == "sq" else 0.12)


def test_p2_confirmed(tmp_path: Path) -> None:
    given_up(tmp_path)
    found = check(tmp_path, "P2")
    assert (found["verdict"], found["clauses"]["confirmed"]) == ("confirmed", 4)
    assert "β·n₀ 4.08" in found["evidence"][0]  # .05 · 81.5


@pytest.mark.parametrize("change", [{"mre": 0.5}, {"ratio": 0.4}, {"all_": 0.5}, {"ns": 0.13, "all_": 2.0}])
def test_p2_refuted(tmp_path: Path, change: dict[str, float]) -> None:
    given_up(tmp_path, **change)
    found = check(tmp_path, "P2")
    assert (found["verdict"], found["clauses"]["refuted"]) == ("refuted", 1)


def test_p2_says_nothing_below_2(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_sae(tmp_path, f"g/{seed}", config={"l2_norm": "sq", "seed": seed}, run={"beta": 0.02})
    found = check(tmp_path, "P2")
    assert found["no_data"]
    assert "β·n₀ 1.63" in found["evidence"][0]


# P3


def with_sinks(workspace: Path, name: str, fvu_sinks: float, *, mre: float = 0.001) -> None:
    """1000 rows, 8 sinks that hold 90 % of Σ‖x − μ‖²; FVU_ns .2."""
    v_ns, v_sinks = 100.0, 900.0
    error_ns, error_sinks = 0.2 * v_ns, fvu_sinks * v_sinks
    total = error_ns + error_sinks
    all_ = {"tokens": 1000, "mse": total / 1000, "fvu_p0": total / 1000.0, "dead_fraction": 0}
    ns = {"tokens": 992, "l0": 8.0, "mse": error_ns / 992, "fvu_p0": 0.2, "mre": 0.2, "nbi": 0.0}
    sinks = {"tokens": 8, "mse": error_sinks / 8, "fvu_p0": fvu_sinks, "mre": mre}
    write_sae(workspace, name, run={"metrics": {"all": all_, "ns": ns, "sinks": sinks, "bins": []}})


def test_p3(tmp_path: Path) -> None:
    with_sinks(tmp_path, "g/0", 0.001)
    found = check(tmp_path, "P3")
    assert found["verdict"] == "confirmed"
    # EV_all − EV_ns = s(FVU_ns − FVU_sinks): off by s·FVU_sinks = .9 · .001.
    assert "s = 0.9" in found["evidence"][0]
    assert "is 0.0009 " in found["evidence"][0]
    with_sinks(tmp_path / "b", "g/0", 0.05)
    assert check(tmp_path / "b", "P3")["verdict"] == "refuted"
    with_sinks(tmp_path / "c", "g/0", 0.05, mre=0.02)
    assert check(tmp_path / "c", "P3")["no_data"]


# P4


def stretched(workspace: Path, exponent: float, wobble: float = 0.01) -> dict[str, list[dict[str, Any]]]:
    altered = {f"by{k}": [{"change": "stretch-norms", "k": k, "activations": "mini-sink"}] for k in (0, 2, 4)}
    for k, store in ((1, "mini-sink"), *((k, f"by{k}") for k in (0, 2, 4))):
        for seed in SEEDS:
            for p, l2_norm in enumerate(("none", "norm", "sq")):
                gap = 0.01 * p * k**exponent * (1 + wobble * (seed - 1) * k)
                config = {"l2_norm": l2_norm, "seed": seed}
                fvu = {"fvu_p0": 0.2 * math.exp(gap)}
                write_sae(workspace, f"{store}/{l2_norm}{seed}", config=config, ns=fvu, store=store)
    return altered


def test_p4_confirmed(tmp_path: Path) -> None:
    found = check(tmp_path, "P4", stretched(tmp_path, 2.0))
    assert (found["verdict"], found["clauses"]["confirmed"]) == ("confirmed", 3)
    assert "0.32 (k 4); exponent 2" in found["evidence"][1]


def test_p4_refuted_and_undecided(tmp_path: Path) -> None:
    assert check(tmp_path / "a", "P4", stretched(tmp_path / "a", 1.0))["verdict"] == "refuted"
    assert check(tmp_path / "b", "P4", stretched(tmp_path / "b", 2.0, wobble=0.2))["verdict"] == "undecided"


# P5, P6


def sweep(workspace: Path, spreads: Mapping[tuple[str, str, str], float], wobble: float = 0.01) -> None:
    """L0 of 16 on five layers with ñ 4, 5, 6, 7, 8, times ñ^spread by (act, l2_norm, rule)."""
    for (act, l2_norm, rule), spread in spreads.items():
        for seed in SEEDS:
            for layer in range(5):
                scale = (4.0 + layer) / 6
                hook = f"blocks.{layer}.hook_resid_post"
                config = {
                    "act": act, "decoder": "unit" if act == "relu" else "free", "l2_norm": l2_norm, "alpha_scale": rule,
                    "seed": seed, "hook": hook, "target_l0": None, "alpha": 0.2,
                }  # fmt: skip
                l0 = 16 * scale ** (spread + wobble * (seed - 1))
                run = {"norm_scale": 6 * scale, "beta": 0.2 * scale**2}
                write_sae(workspace, f"g/{act}{l2_norm}{rule}{seed}{layer}", config=config, ns={"l0": l0}, run=run)


def test_p5_and_p6_confirmed(tmp_path: Path) -> None:
    sweep(
        tmp_path,
        {
            ("relu", "none", "layer-norm"): 0.1, ("relu", "none", "none"): 0.8, ("relu", "none", "note"): 0.9,
            ("tanh-relu", "none", "layer-norm"): 0.1, ("tanh-relu", "none", "none"): 1.0,
            ("tanh-relu", "none", "note"): 0.05,
        },
    )  # fmt: skip
    own, note = check(tmp_path, "P5"), check(tmp_path, "P6")
    assert (own["verdict"], own["clauses"]["confirmed"]) == ("confirmed", 3)
    assert any("decides nothing" in sentence for sentence in own["evidence"])  # tanh-relu: note has its own exponent
    assert (note["verdict"], note["clauses"]["confirmed"]) == ("confirmed", 1)
    assert "5 layers, 3 seeds" in note["evidence"][0]
    assert "β ∝ ñ^2" in note["evidence"][0]


def test_p5_and_p6_refuted(tmp_path: Path) -> None:
    sweep(
        tmp_path,
        {("relu", "none", "layer-norm"): 0.9, ("relu", "none", "none"): 0.2, ("relu", "none", "note"): 0.1},
    )
    assert check(tmp_path, "P5")["verdict"] == "refuted"
    assert check(tmp_path, "P6")["verdict"] == "refuted"


def test_p5_and_p6_undecided(tmp_path: Path) -> None:
    sweep(tmp_path, {("relu", "sq", "layer-norm"): 0.5, ("relu", "sq", "note"): 0.5}, wobble=0.2)
    assert check(tmp_path, "P6")["verdict"] == "undecided"
    # Spreads that do not differ are not larger.
    assert check(tmp_path, "P5")["clauses"]["confirmed"] == 0


def test_relu_at_p_1_needs_no_rule(tmp_path: Path) -> None:
    sweep(tmp_path, {("relu", "norm", "layer-norm"): 0.5, ("relu", "norm", "none"): 0.1})
    found = check(tmp_path, "P5")
    assert found["no_data"]
    assert "decides nothing" in found["evidence"][0]


# P7


def gradients(workspace: Path, first: list[float], last: float, steps: int = 4000) -> None:
    """Logs of one SAE per seed on a store of 480 rows whose 60 sinks at position 0 are 30 times as long."""
    write_full(workspace / "activations" / "s", make_rows(), [300, 180])
    for seed, share in enumerate(first):
        log = [
            {"step": step, "grad_share": {"W_dec": {"sinks": share if step == 1 else last}, "W_enc": {"sinks": 0.5}}}
            for step in (1, *range(steps // 50, steps + 1, steps // 50))
        ]
        write_sae(
            workspace, f"g/{seed}", config={"seed": seed, "hook": HOOK}, store="s", log=log,
            run={"counts": {"steps": steps}},
        )  # fmt: skip


def sinks_share() -> float:
    """Share of position 0 in Σ‖x‖² of the contexts that are trained on."""
    rows = make_rows()
    n2 = rows.x[HOOK].double().square().sum(1)
    trained = (rows.positions.new_tensor(range(len(n2))) // 8) % 20 != 19
    return float(n2[trained & (rows.positions == 0)].sum() / n2[trained].sum())


def test_p7_confirmed(tmp_path: Path) -> None:
    share = sinks_share()
    gradients(tmp_path, [share * 0.98, share, share * 0.99], 0.03)
    found = check(tmp_path, "P7")
    assert (found["verdict"], found["clauses"]["confirmed"]) == ("confirmed", 2)
    assert f"in the batch of step 1 sinks hold {share:.3g} of" in found["evidence"][0]


def test_p7_goes_by_the_sinks_in_the_batch(tmp_path: Path) -> None:
    gradients(tmp_path, [0.9, 0.9, 0.9], 0.03)
    rows = make_rows()
    n2 = rows.x[HOOK].double().square().sum(1)
    trained = (torch.arange(len(n2)) // 8) % 20 != 19
    sink, other = float(n2[trained & (rows.positions == 0)].mean()), float(n2[trained & (rows.positions > 0)].mean())
    for seed, part in enumerate((0.05, 0.1, 0.2)):
        share = part * sink / (part * sink + (1 - part) * other)
        path = tmp_path / "saes" / "g" / str(seed) / "metrics.jsonl"
        lines = path.read_text().splitlines()
        first = json.loads(lines[0])
        first |= {"grad_share": {"W_dec": {"sinks": 1.02 * share}}, "loss_share": {"sinks": 0.8}}
        first["bias_ratio"] = [0.8 / part] + [0.3] * 10
        path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    found = check(tmp_path, "P7")
    assert found["verdict"] == "confirmed"
    assert "off by 2 % [2, 2]" in found["evidence"][0]


def test_p7_refuted(tmp_path: Path) -> None:
    gradients(tmp_path / "a", [0.5, 0.51, 0.5], 0.03)
    assert check(tmp_path / "a", "P7")["clauses"] == {"confirmed": 1, "refuted": 1, "undecided": 0}
    share = sinks_share()
    gradients(tmp_path / "b", [share, share * 0.99, share], 0.4)
    assert check(tmp_path / "b", "P7")["clauses"] == {"confirmed": 1, "refuted": 1, "undecided": 0}


def test_p7_undecided_after_a_short_run(tmp_path: Path) -> None:
    share = sinks_share()
    gradients(tmp_path, [share, share * 0.99, share], 0.4, steps=1000)
    found = check(tmp_path, "P7")
    assert found["verdict"] == "undecided"
    assert "training ended there" in found["evidence"][1]


def test_p7_says_what_is_missing(tmp_path: Path) -> None:
    gradients(tmp_path, [0.9, 0.9, 0.9], 0.03)
    for path in (tmp_path / "activations" / "s").iterdir():
        path.unlink()
    found = check(tmp_path, "P7")
    assert found["verdict"] == "undecided"
    assert "the store s" in found["needs"][0]
