"""The comparison of hand-made SAEs: effects that were planted are found, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_saes import write_eval, write_sae

from nsae_cli.analysis.comparison import CompareOptions
from nsae_cli.analysis.comparison_artifact import run_compare
from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Workspace

P0, P1, P2 = "relu p=0", "relu p=1", "relu p=2"


def compared(workspace: Path, *references: str, **options: Any) -> dict[str, Any]:
    """table.json of a comparison."""
    name = options.pop("name", "t")
    found = run_compare(references or ["g"], CompareOptions(**options), Workspace(workspace), name, SilentReporter())
    return found.document


def plant(
    workspace: Path, l2_norm: str, fvu: list[float], *, evaluated: bool = True, l0: float = 8.0, spread: float = 0.01
) -> None:
    """One SAE per seed with these FVU_ns, on run.json and in its evaluation."""
    for seed, value in enumerate(fvu):
        name = f"g/{l2_norm}-{seed}"
        write_sae(
            workspace, name, config={"l2_norm": l2_norm, "seed": seed}, ns={"fvu_p0": value, "mre": value, "l0": l0}
        )
        if evaluated:
            write_eval(workspace, name, fvu=value, mre=value, ce_ns=value / 2, spread=spread, seed=seed)


def row(document: dict[str, Any], arm: str) -> dict[str, Any]:
    [found] = [row for group in document["groups"] for row in group["rows"] if row["arm"] == arm]
    return found


def fvu_difference(document: dict[str, Any], arm: str) -> dict[str, Any]:
    [comparison] = row(document, arm)["comparisons"]
    difference: dict[str, Any] = comparison["metrics"]["fvu_p0_ns"]
    return difference


def test_a_planted_effect_is_better(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201])
    plant(tmp_path, "sq", [0.180, 0.183, 0.181])
    document = compared(tmp_path)
    found = fvu_difference(document, P2)
    assert found["mark"] == "better"
    # Differences −.020, −.019, −.020: mean −.059/3, sd 1e-3/√3, t(2) = 4.30265.
    assert found["difference"] == pytest.approx(-0.059 / 3)
    assert found["relative"] == pytest.approx(-0.059 / 0.603)
    half = 4.30265 * 1e-3 / 3
    assert found["t_interval"]["low"] == pytest.approx(-0.059 / 3 - half, abs=1e-6)
    assert found["t_interval"]["high"] == pytest.approx(-0.059 / 3 + half, abs=1e-6)
    low, high = found["bootstrap"]["interval"].values()
    assert low < found["bootstrap"]["difference"] < high < 0
    assert found["margin"] == pytest.approx(0.02 * 0.201)
    assert row(document, P0)["comparisons"] == []
    assert row(document, P2)["metrics"]["fvu_p0_ns"]["mean"] == pytest.approx(0.544 / 3)


def test_the_other_way_round_is_worse(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.180, 0.183, 0.181])
    plant(tmp_path, "sq", [0.200, 0.202, 0.201])
    assert fvu_difference(compared(tmp_path), P2)["mark"] == "worse"


def test_no_effect_and_little_noise_is_equivalent(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201])
    plant(tmp_path, "sq", [0.2002, 0.2019, 0.2011])
    found = compared(tmp_path)
    assert fvu_difference(found, P2)["mark"] == "equivalent"
    assert any("may be chosen freely" in sentence for sentence in found["conclusion"])


def test_no_effect_and_much_noise_is_undecided(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.230, 0.180])
    plant(tmp_path, "sq", [0.220, 0.190, 0.215])
    found = compared(tmp_path)
    assert fvu_difference(found, P2)["mark"] == "undecided"
    assert any("is undecided" in sentence for sentence in found["conclusion"])


def test_noise_between_contexts_alone_leaves_it_undecided(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201], spread=2.0)
    for seed, value in enumerate([0.196, 0.198, 0.197]):
        write_sae(tmp_path, f"g/sq-{seed}", config={"l2_norm": "sq", "seed": seed}, ns={"fvu_p0": value})
        write_eval(tmp_path, f"g/sq-{seed}", fvu=value, spread=2.0, seed=10 + seed)
    found = fvu_difference(compared(tmp_path), P2)
    assert found["t_interval"]["high"] < 0
    assert (found["mark"], found["reason"]) == ("undecided", "the interval over contexts holds 0")


def test_margins_are_options(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201])
    plant(tmp_path, "sq", [0.180, 0.183, 0.181])
    wide = compared(tmp_path, fvu_margin="15%", ce_margin=0.02)
    entry = row(wide, P2)["comparisons"][0]["metrics"]
    assert (entry["fvu_p0_ns"]["mark"], entry["delta_ce_ns"]["mark"]) == ("equivalent", "equivalent")
    narrow = compared(tmp_path, name="u")
    assert row(narrow, P2)["comparisons"][0]["metrics"]["delta_ce_ns"]["mark"] == "better"


def test_unmatched_l0_is_refused(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201])
    plant(tmp_path, "sq", [0.180, 0.183, 0.181], l0=8.5)
    document = compared(tmp_path)
    [comparison] = row(document, P2)["comparisons"]
    assert comparison["status"] == "unmatched L0"
    assert comparison["metrics"] == {}
    assert len(document["missed_l0"]) == 3
    text = (tmp_path / "tables" / "t" / "table.md").read_text()
    assert "unmatched L0 (8.50 vs 8.00)" in text
    assert "−9" not in text.partition("## Differences")[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "matched"),
    [
        (7.85, 8.15, True),  # each within 2 % of the target 8, though 3.8 % apart
        (8.4, 8.5, True),  # off target, 1.2 % apart
        (8.0, 8.17, False),
        (7.7, 7.9, False),
    ],
)
def test_what_counts_as_matched(tmp_path: Path, ours: float, theirs: float, matched: bool) -> None:
    plant(tmp_path, "none", [0.2, 0.2], l0=ours, evaluated=False)
    plant(tmp_path, "sq", [0.2, 0.2], l0=theirs, evaluated=False)
    [comparison] = row(compared(tmp_path), P2)["comparisons"]
    # 8.17 is 2.1 % off the target and from 8; 7.7 is off the target and 2.5 % from 7.9.
    assert comparison["status"] == ("matched" if matched else "unmatched L0")


def test_seeds_that_do_not_match_are_left_out(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.2, 0.2, 0.2])
    plant(tmp_path, "sq", [0.19, 0.19])
    write_sae(tmp_path, "g/sq-2", config={"l2_norm": "sq", "seed": 2}, ns={"l0": 9.0, "fvu_p0": 0.1})
    [comparison] = row(compared(tmp_path), P2)["comparisons"]
    assert (comparison["common_seeds"], comparison["seeds"]) == ([0, 1, 2], [0, 1])
    assert comparison["metrics"]["fvu_p0_ns"]["difference"] == pytest.approx(-0.01)


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.2])
    plant(tmp_path, "sq", [0.1])
    found = fvu_difference(compared(tmp_path), P2)
    assert found["t_interval"] is None
    assert (found["mark"], found["reason"]) == ("undecided", "fewer than 2 seeds: no t-interval")


def test_without_evaluations_nothing_is_marked(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202, 0.201], evaluated=False)
    plant(tmp_path, "sq", [0.180, 0.183, 0.181], evaluated=False)
    document = compared(tmp_path)
    found = fvu_difference(document, P2)
    assert found["t_interval"]["high"] < 0
    assert found["bootstrap"] is None
    assert found["mark"] == "undecided"
    assert "no ΔCE" in document["notes"][0]
    assert row(document, P2)["metrics"]["delta_ce_ns"]["mean"] is None


def test_evaluations_of_other_contexts_are_not_paired(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.200, 0.202])
    plant(tmp_path, "sq", [0.180, 0.183], evaluated=False)
    for seed in range(2):
        write_eval(tmp_path, f"g/sq-{seed}", fvu=0.18, contexts=30)
    assert fvu_difference(compared(tmp_path), P2)["bootstrap"] is None


def test_arms_are_named_by_what_varies(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"l2_norm": "norm"}, {"l2_norm": "sq", "l1_norm": "norm"}, {"l2_norm": "sq", "row_weights": "permuted"},
        {"sparsity": "l1-decoder-norm", "decoder": "free"}, {"act": "topk", "k": 8, "target_l0": None, "alpha": 0.0,
         "aux_k": 32},
        {"act": "tanh-relu", "decoder": "free", "l2_norm": "sq", "noise": 0.1}, {"l2_norm": "cosine"},
        {"clip": 1.0}, {"alpha_scale": "note"}, {"act": "jumprelu", "sparsity": "l0", "bandwidth": 0.05},
        {"act": "topk", "k": 8, "target_l0": None, "alpha": 0.0, "aux_k": None}, {"tokens": 2_000_000, "lr": 2e-3},
    ]  # fmt: skip
    for number, config in enumerate(changes):
        write_sae(tmp_path, f"g/{number}", config={"clip": None, "aux_k": None, "bandwidth": None} | config)
    [group] = compared(tmp_path)["groups"]
    assert group["usual"] == {"tokens": "1M", "lr": "0.001", "aux_k": "32"}
    assert {(row["arm"], row["level"]) for row in group["rows"]} == {
        ("relu p=0", "8"), ("relu p=1", "8"), ("relu p=2 q=1", "8"),
        ("relu p=2 permuted", "8"), ("relu p=0 l1-decoder-norm free", "8"), ("topk", "8"),
        ("tanh-relu p=2 noise=0.1", "8"), ("relu cosine", "8"), ("relu p=0 clip=1", "8"),
        ("relu p=0 scale=note", "8"), ("jumprelu p=0", "8"), ("topk aux_k=off", "8"),
        ("relu p=0 tokens=2M lr=0.002", "8"),
    }  # fmt: skip


def test_what_an_arm_is_compared_with(tmp_path: Path) -> None:
    for number, config in enumerate(
        [
            {},
            {"l2_norm": "sq"},
            {"l2_norm": "sq", "row_weights": "permuted"},
            {"noise": 0.1},
            {"l2_norm": "sq", "noise": 0.1},
            {"act": "topk", "k": 8, "target_l0": None, "alpha": 0.0},
            {"tokens": 4_000_000, "noise": 0.1},
            {"tokens": 4_000_000},
            {"tokens": 9_000_000, "l2_norm": "sq"},
        ]
    ):
        write_sae(tmp_path, f"g/{number}", config=config)
    document = compared(tmp_path, baseline=P0)
    found = {row["arm"]: {c["kind"]: c["with"] for c in row["comparisons"]} for row in document["groups"][0]["rows"]}
    assert found == {
        "relu p=0": {},
        "relu p=2": {"p=0": P0},
        "relu p=2 permuted": {"p=0": P0},
        "relu p=0 noise=0.1": {"p=0": P0},
        "relu p=2 noise=0.1": {"p=0": "relu p=0 noise=0.1", "baseline": P0},
        "topk": {"baseline": P0},
        "relu p=0 noise=0.1 tokens=4M": {"p=0": "relu p=0 tokens=4M", "baseline": P0},
        "relu p=0 tokens=4M": {"baseline": P0},
        "relu p=2 tokens=9M": {"baseline": P0},
    }


def test_groups_are_never_mixed(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_sae(tmp_path, "g/1", config={"l2_norm": "sq"}, store="mini")
    write_sae(tmp_path, "g/2", config={"l2_norm": "sq", "hook": "blocks.1.hook_resid_post"})
    write_sae(tmp_path, "g/3", config={"l2_norm": "sq", "sinks": "drop"})
    groups = compared(tmp_path)["groups"]
    assert len(groups) == 4
    assert not any(row["comparisons"] for group in groups for row in group["rows"])


def test_nbi_rel_is_the_distance_from_the_scale_free_loss(tmp_path: Path) -> None:
    for seed, (own, reference, l0) in enumerate([(-0.5, 0.3, 8.0), (-0.4, 0.2, 8.1), (0.0, 0.3, 9.0)]):
        write_sae(tmp_path, f"g/a{seed}", config={"seed": seed}, ns={"nbi": own, "l0": l0})
        config = {"seed": seed, "l2_norm": "sq", "l1_norm": "norm"}
        write_sae(tmp_path, f"g/b{seed}", config=config, ns={"nbi": reference})
    write_sae(tmp_path, "g/c", config={"seed": 7}, ns={"nbi": 1.0})
    found = row(compared(tmp_path), P0)["metrics"]["nbi_rel"]
    # Seed 2 has another L0, seed 7 no reference.
    assert found["by_seed"] == {"0": pytest.approx(-0.8), "1": pytest.approx(-0.6), "2": None, "7": None}
    assert found["mean"] == pytest.approx(-0.7)


def test_without_targets_the_nearest_l0_is_taken(tmp_path: Path) -> None:
    for number, (l2_norm, alpha, l0) in enumerate(
        [("none", 0.1, 20.0), ("none", 0.2, 10.0), ("sq", 0.5, 10.1), ("sq", 0.05, 30.0)]
    ):
        write_sae(
            tmp_path, f"g/{number}", config={"l2_norm": l2_norm, "alpha": alpha, "target_l0": None}, ns={"l0": l0}
        )
    rows = compared(tmp_path)["groups"][0]["rows"]
    found = {row["level"]: row["comparisons"][0] for row in rows if row["arm"] == P2}
    assert (found["α 0.5"]["status"], found["α 0.5"]["l0_ns_with"]) == ("matched", 10.0)
    assert (found["α 0.05"]["status"], found["α 0.05"]["l0_ns_with"]) == ("unmatched L0", 20.0)


def test_two_saes_for_one_cell_are_refused_unless_equal(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/a")
    write_sae(tmp_path, "h/a", run={"weights_sha256": {"W_enc": "of g/a"}})
    assert len(compared(tmp_path, "g", "h")["groups"][0]["rows"]) == 1
    write_sae(tmp_path, "i/a")
    with pytest.raises(UsageError, match="g/a and i/a are both relu p=0 at L0 8 with seed 0"):
        compared(tmp_path, "g", "i", name="u")


def test_matrix_of_trained_and_evaluated_p(tmp_path: Path) -> None:
    for number, l2_norm in enumerate(("none", "norm", "sq")):
        for seed in range(2):
            ns = {f"fvu_p{p}": 0.2 + 0.01 * abs(p - number) + 0.002 * seed for p in range(3)}
            write_sae(tmp_path, f"g/{l2_norm}{seed}", config={"l2_norm": l2_norm, "seed": seed}, ns=ns)
    matrix = compared(tmp_path)["groups"][0]["matrix"]
    assert [line["arm"] for line in matrix] == [P0, P1, P2]
    means = [[line[f"fvu_p{p}_ns"]["mean"] for p in range(3)] for line in matrix]
    assert means[0] == pytest.approx([0.201, 0.211, 0.221])
    assert means[2] == pytest.approx([0.221, 0.211, 0.201])


def test_a_missed_target_says_why(tmp_path: Path) -> None:
    why = "L0 8.2 misses --target-l0 8 by +2.5% at α 0.2: it was still moving at the end"
    write_sae(tmp_path, "g/0", ns={"l0": 8.1})
    write_sae(tmp_path, "g/1", config={"seed": 1}, ns={"l0": 8.2}, run={"warnings": ["gamed", why]})
    [missed] = compared(tmp_path)["missed_l0"]
    assert (missed["sae"], missed["why"]) == ("g/1", why)


def test_conclusion_speaks_of_sinks_that_were_given_up(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_sae(tmp_path, "g/1", config={"l2_norm": "sq"}, sinks={"mre": 0.97})
    found = " ".join(compared(tmp_path)["conclusion"])
    assert "gave them up: relu p=2 in 1 of 1 cells (relative error 0.97)" in found
    assert "--sinks drop" in found
    write_sae(tmp_path, "h/0")
    write_sae(tmp_path, "h/1", config={"l2_norm": "sq"}, sinks={"mre": 0.03})
    found = " ".join(compared(tmp_path, "h", name="h")["conclusion"])
    assert "No arm trained with sinks gave them up" in found
    assert "--sinks drop" not in found


def test_conclusion_leaves_out_a_sweep_of_alpha(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.2, 0.2], evaluated=False)
    plant(tmp_path, "sq", [0.19, 0.19], evaluated=False)
    for number, l2_norm in enumerate(("none", "sq")):
        write_sae(tmp_path, f"g/sweep{number}", config={"l2_norm": l2_norm, "target_l0": None, "alpha": 0.1 + number})
    document = compared(tmp_path)
    assert document["conclusion"][0].startswith("4 SAEs in 1 group; 1 of 1 comparison could be made")
    assert sum(len(row["comparisons"]) for row in document["groups"][0]["rows"]) == 2


def test_complete_until_an_input_changes(tmp_path: Path) -> None:
    plant(tmp_path, "none", [0.2, 0.2])
    plant(tmp_path, "sq", [0.19, 0.19], evaluated=False)

    def again() -> Any:
        return run_compare(["g"], CompareOptions(), Workspace(tmp_path), "t", SilentReporter())

    first, second = again(), again()
    assert (first.already_complete, second.already_complete) == (False, True)
    assert second.document == first.document
    for seed in range(2):
        write_eval(tmp_path, f"g/sq-{seed}", fvu=0.19)
    third = again()
    assert not third.already_complete
    assert fvu_difference(third.document, P2)["bootstrap"] is not None
    with pytest.raises(UsageError, match=r"--name t holds another comparison \(--fvu-margin 0.02 -> 0.05\)"):
        compared(tmp_path, fvu_margin=0.05)
    write_sae(tmp_path, "g/new", config={"seed": 5})
    with pytest.raises(UsageError, match=r"--name t compares other SAEs \(1 new, such as g/new"):
        compared(tmp_path)


def test_the_order_of_groups_does_not_matter(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_sae(tmp_path, "h/0", config={"l2_norm": "sq"})
    first = compared(tmp_path, "g", "h")
    again = run_compare(["h", "g"], CompareOptions(), Workspace(tmp_path), "t", SilentReporter())
    assert again.already_complete
    assert again.document == first


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    contents = []
    for place in ("a", "b"):
        plant(tmp_path / place, "none", [0.2, 0.21])
        plant(tmp_path / place, "sq", [0.19, 0.2])
        compared(tmp_path / place)
        folder = tmp_path / place / "tables" / "t"
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"table.json", "table.md", "fronts.png", "differences.png"}


def test_an_evaluation_of_other_weights_is_ignored(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_eval(tmp_path, "g/0", weights="another")
    assert row(compared(tmp_path), P0)["metrics"]["delta_ce_ns"]["mean"] is None


def test_which_of_two_evaluations(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_eval(tmp_path, "g/0", ce_ns=0.1)
    write_eval(tmp_path, "g/0", ce_ns=0.3, name="long-0")
    assert row(compared(tmp_path), P0)["metrics"]["delta_ce_ns"]["mean"] == pytest.approx(0.1)
    chosen = compared(tmp_path, name="u", evals="long")
    assert row(chosen, P0)["metrics"]["delta_ce_ns"]["mean"] == pytest.approx(0.3)
    with pytest.raises(UsageError, match="--evals none"):
        compared(tmp_path, name="v", evals="none")


def test_damaged_inputs_are_refused(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0")
    write_eval(tmp_path, "g/0")
    (tmp_path / "evals" / "g-0" / "contexts.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"contexts.safetensors cannot be read .*nsae verify --repair"):
        compared(tmp_path)
    write_sae(tmp_path, "h/0", run={"config": {"act": "relu"}})
    with pytest.raises(ArtifactError, match="config lacks l2_norm"):
        compared(tmp_path, "h")


def test_rows_that_differ_from_the_training_s_are_noted(tmp_path: Path) -> None:
    write_sae(tmp_path, "g/0", ns={"fvu_p0": 0.2})
    write_eval(tmp_path, "g/0", fvu=0.25)
    assert "Evaluated rows are others" in " ".join(compared(tmp_path)["notes"])


def test_an_arm_without_sinks_is_compared_with_itself_trained_on_them(tmp_path: Path) -> None:
    for seed, (kept, dropped) in enumerate([(0.20, 0.19), (0.21, 0.20), (0.20, 0.19)]):
        for sinks, fvu in (("keep", kept), ("drop", dropped)):
            name = f"g/{sinks}-{seed}"
            write_sae(tmp_path, name, config={"sinks": sinks, "seed": seed}, ns={"fvu_p0": fvu})
            write_eval(tmp_path, name, fvu=fvu)
    document = compared(tmp_path)
    kept_group, dropped_group = document["groups"]
    assert (
        "Trained without sinks, FVU of ordinary tokens against the same with sinks: relu p=0 1 better (−4.9 %)."
        in document["conclusion"]
    )
    assert (kept_group["sinks"], dropped_group["sinks"]) == ("keep", "drop")
    assert kept_group["rows"][0]["comparisons"] == []
    [found] = dropped_group["rows"][0]["comparisons"]
    assert (found["kind"], found["with"], found["seeds"]) == ("sinks kept", "relu p=0, sinks kept", [0, 1, 2])
    assert found["metrics"]["fvu_p0_ns"]["difference"] == pytest.approx(-0.01)
    assert found["metrics"]["fvu_p0_ns"]["mark"] == "better"


def test_delta_ce_by_bin_is_the_mean_over_the_seeds_that_have_it(tmp_path: Path) -> None:
    for seed, values in enumerate([range(11), range(2, 13), None]):
        write_sae(tmp_path, f"g/{seed}", config={"seed": seed})
        write_eval(tmp_path, f"g/{seed}")
        mark = tmp_path / "evals" / f"g-{seed}" / "eval.json"
        document = json.loads(mark.read_text())
        if values is not None:
            parts = [{"rows": 5, "delta_ce": {"value": value / 100, "low": None, "high": None}} for value in values]
            document["behaviour"] |= {"bins": parts[:10], "sinks": parts[10]}
            mark.write_text(json.dumps(document))
    by_bin = row(compared(tmp_path), P0)["delta_ce_by_bin"]
    assert [part["mean"] for part in by_bin] == pytest.approx([(number + 1) / 100 for number in range(11)])
    assert by_bin[3]["sd"] == pytest.approx(2**0.5 / 100)
    assert "| relu p=0 | 8 | 10.0 | 20.0 |" in (tmp_path / "tables" / "t" / "table.md").read_text()
