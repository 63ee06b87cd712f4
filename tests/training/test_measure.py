"""Measurements of autoencoders that are not nsae's own: only `reconstruct` is asked of them."""

from collections.abc import Iterator

import pytest
import torch

from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training.evaluate import evaluate
from nsae_cli.training.measure import Measurements, RowSource, evaluate_reconstruction, reconstruct


class Halving:
    """x̂ = x/2 by one feature that is always on with f = ‖x‖²: no weights, no loss, no activation with a name."""

    d_in, d_sae = 6, 3

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = x.new_zeros(*x.shape[:-1], self.d_sae)
        acts[..., 1] = x.square().sum(-1)
        return acts, x / 2


def rows_of(count: int, groups: int = SINKS + 1) -> tuple[HookRows, torch.Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 5, count)[:, None]
    group = torch.arange(count) % groups
    return HookRows(x, x.norm(dim=1), group, torch.zeros(count, dtype=torch.bool)), torch.arange(count) // 8


def source(rows: HookRows, contexts: torch.Tensor) -> RowSource:
    def batches(size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
        for start in range(0, len(contexts), size):
            part = slice(start, start + size)
            yield rows.select(part), contexts[part]

    return batches


def test_an_autoencoder_of_any_kind_gets_every_number_that_needs_no_objective() -> None:
    rows, contexts = rows_of(200)
    result = evaluate_reconstruction(Halving(), source(rows, contexts), l2_power=1, batch=64)
    everything, ns, sinks = (result.metrics[scope] for scope in ("all", "ns", "sinks"))
    assert everything["mre"] == pytest.approx(0.25)
    assert everything["magnitude_error"] == pytest.approx(0.25)
    assert everything["shrinkage"] == pytest.approx(0.5)
    assert everything["l0"] == 1.0
    assert everything["dead_fraction"] == pytest.approx(2 / 3)
    assert ns["nbi"] == pytest.approx(0, abs=1e-6)
    sq = rows.x.double().square().sum(1)
    is_sink = rows.group == SINKS
    # n^(−1)·‖x/2‖² is proportional to n; the penalty that nobody gave is Σ f = n².
    assert sinks["loss_share"] == pytest.approx(float(sq.sqrt()[is_sink].sum() / sq.sqrt().sum()))
    assert sinks["l1_share"] == pytest.approx(float(sq[is_sink].sum() / sq.sum()))
    assert everything["esf"] == pytest.approx(float(sq.sqrt().sum() ** 2 / (200 * sq.sum())))
    assert result.density.tolist() == [0, 1, 0]
    # ρ does not depend on n, so n^(−1)‖e‖² is of degree 1; Σ f = n² of degree 2, whatever a loss would predict.
    assert ns["exponents"]["loss"] == {"measured": pytest.approx(1.0), "predicted": 1}
    assert ns["exponents"]["sparsity"] == {"measured": pytest.approx(2.0), "predicted": None}
    assert {"grad_share", "G", "alpha_eff"}.isdisjoint(everything)


def test_batches_of_any_size_give_the_same_numbers() -> None:
    rows, contexts = rows_of(150)
    sizes = [evaluate_reconstruction(Halving(), source(rows, contexts), batch=size).metrics for size in (150, 7)]
    for name, found in sizes[0]["ns"].pop("exponents").items():
        assert found == pytest.approx(sizes[1]["ns"]["exponents"][name])
    del sizes[1]["ns"]["exponents"]
    for scope in ("all", "ns", "sinks"):
        assert sizes[0][scope] == pytest.approx(sizes[1][scope])


def test_a_stream_that_is_read_once_leaves_out_only_what_needs_the_mean_beforehand() -> None:
    rows, contexts = rows_of(100)
    once = Measurements(6, 3)
    once.update(reconstruct(Halving(), rows, contexts))
    twice = evaluate_reconstruction(Halving(), source(rows, contexts))
    assert once.compute().metrics["all"] == twice.metrics["all"] | {"saelens_explained_variance_legacy": None}


def test_with_its_objective_an_sae_keeps_the_numbers_that_it_has_without() -> None:
    rows, contexts = rows_of(120)
    g = torch.Generator().manual_seed(5)
    weights = Weights(*(torch.randn(shape, generator=g) for shape in ((6, 9), (9,), (9, 6), (6,))))
    sae = SparseAutoencoder("relu", weights)
    objective = Objective("relu", 1, 0, "l1", 0.3, 1.0)
    trained = evaluate(sae, objective, False, source(rows, contexts)).metrics
    plain = evaluate_reconstruction(sae, source(rows, contexts), l2_power=1).metrics
    exponents, without = trained["ns"].pop("exponents"), plain["ns"].pop("exponents")
    for scope in ("all", "ns", "sinks"):
        assert {key: trained[scope][key] for key in plain[scope]} == pytest.approx(plain[scope])
        assert set(trained[scope]) > set(plain[scope])
    assert exponents["loss"] == without["loss"]
    assert exponents["sparsity"] == without["sparsity"] | {"predicted": 1}
    assert set(exponents) == {"loss", "sparsity", "grad_W_enc", "grad_W_dec"}
    assert exponents["grad_W_dec"]["predicted"] == 1


def test_an_sae_that_scales_along_with_its_input_has_the_predicted_exponents() -> None:
    """Without biases relu's x̂ and f grow as x does: every term has exactly the degree that is predicted for it."""
    directions = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = torch.Generator().manual_seed(5)
    W_enc, W_dec = torch.randn(6, 9, generator=g), torch.randn(9, 6, generator=g)
    sae = SparseAutoencoder("relu", Weights(W_enc, torch.zeros(9), W_dec, torch.zeros(6)))
    sizes = torch.logspace(0, 2, 50, dtype=torch.float64)
    x = (directions / directions.norm(dim=1, keepdim=True))[:1] * sizes[:, None]
    rows = HookRows(x.float(), x.norm(dim=1).float(), torch.arange(50) % SINKS, torch.zeros(50, dtype=torch.bool))
    for p, q in ((0, 0), (1, 0), (2, 1)):
        # Beside a small β the gradient's degree is that of the error, 2 − p.
        objective = Objective("relu", p, q, "l1", 1e-9, 1.0)
        found = evaluate(sae, objective, False, source(rows, torch.arange(50) // 8)).metrics["ns"]["exponents"]
        predicted = {"loss": 2 - p, "sparsity": 1 - q, "grad_W_enc": 2 - p, "grad_W_dec": 2 - p}
        assert {name: each["predicted"] for name, each in found.items()} == predicted
        assert {name: each["measured"] for name, each in found.items()} == pytest.approx(predicted, abs=1e-5)
