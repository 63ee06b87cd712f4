"""Whole small trainings with each kernel, and the change between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import contents
from nsae_cli import interrupt, load_sae
from nsae_cli.errors import Interrupted, UsageError
from nsae_cli.kernels.native import library
from nsae_cli.kernels.select import AdaptiveKernel

#: Sparse enough to pass the cross-over on the way.
FALLING = {"alpha": "3", "d_sae": "96", "tokens": "7680", "lr": "0.01"}


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """Names of the kernels that took the steps."""
    names: list[str] = []
    backward = AdaptiveKernel.backward

    def spy(self, *arguments, **options):
        names.append(self.name)
        return backward(self, *arguments, **options)

    monkeypatch.setattr(AdaptiveKernel, "backward", spy)
    return names


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("act", ["relu", "tanh-relu"])
@pytest.mark.parametrize("options", [{}, {"l2_norm": "sq", "l1_norm": "norm", "sparsity": "l1-decoder-norm"}])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_whole_training_agrees_with_every_kernel(run, workspace, monkeypatch, act, options, compiled):
    """Losses and final weights of 120 steps: as near to the dense run as float32 lets two orders of summation be."""
    options = {"alpha": "0.5", "d_sae": "96", "tokens": "7680", "act": act} | options
    if not compiled:
        monkeypatch.setattr(library, "load", lambda isa=None: None)
    run("dense", kernel="dense", **options)
    expected = losses(workspace.root / "saes/dense")
    weights = load_sae(workspace.root / "saes/dense").weights
    for precision in ("fp32", "certified") if compiled else ("fp32",):
        run(precision, kernel="sparse", precision=precision, **options)
        folder = workspace.root / "saes" / precision
        assert losses(folder) == pytest.approx(expected, rel=1e-4)
        for name, tensor in load_sae(folder).weights.named().items():
            of_dense = weights.named()[name]
            assert (tensor - of_dense).norm() <= 0.01 * of_dense.norm(), name


def test_steps_are_dense_first_and_sparse_once_few_features_are_active(run, workspace, taken, listener):
    result = run("sae", **FALLING)
    first_sparse = next(i for i, name in enumerate(taken) if name != "dense")
    assert 1 < first_sparse < 100
    assert set(taken[first_sparse:]) == {result.runs[0]["kernel"]["sparse"]}
    assert result.runs[0]["kernel"]["crossover_density"] > 0
    assert any("dense or sparse by density" in note for note in listener.notes)


@pytest.mark.parametrize("clip", [None, "0.5"])
def test_cut_at_any_step_a_run_goes_on_with_the_same_kernels_and_bits(run, workspace, taken, monkeypatch, clip):
    options = FALLING | ({"clip": clip} if clip else {})
    run("whole", **options)
    whole, names = contents(workspace.root / "saes/whole"), list(taken)
    change = next(i for i, name in enumerate(names) if name != "dense")
    for cut in (1, change - 1, change, change + 1, len(names) - 1):
        taken.clear()
        polls = iter(range(cut))
        monkeypatch.setattr(
            interrupt, "stop_requested", lambda polls=polls: None if next(polls, None) is not None else 2
        )
        with pytest.raises(Interrupted):
            run(f"cut-{cut}", **options)
        monkeypatch.setattr(interrupt, "stop_requested", lambda: None)
        run(f"cut-{cut}", **options)
        assert taken == names
        assert contents(workspace.root / "saes" / f"cut-{cut}") == whole


def test_another_kernel_is_the_same_sae_and_not_another_one(run):
    first = run("sae", kernel="dense")
    again = run("sae", kernel="sparse")
    assert again.already_complete
    assert again.runs == first.runs


def test_what_the_machine_lacks_is_refused_before_anything_is_written(run, workspace, monkeypatch):
    monkeypatch.setattr(library, "load", lambda isa=None: None)
    with pytest.raises(UsageError, match="--precision certified needs"):
        run("sae", precision="certified")
    assert not (workspace.root / "saes/sae").exists()
