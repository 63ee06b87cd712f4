"""Features of an SAE against a second implementation that looks at one feature and one row at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from hand_store import HOOK, Rows, make_rows, write_foreign, write_full
from nsae_cli.analysis import features as module
from nsae_cli.analysis.features import FeatureOptions, FeaturesResult, measure_features
from nsae_cli.errors import UsageError
from nsae_cli.kernels.types import Weights
from nsae_cli.lm.unembedding import Unembedding
from nsae_cli.reporter import SilentReporter
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store.sae_folder import SavedSae
from nsae_cli.store.shards import open_activations

CONTEXT, D_IN, D_SAE = 8, 12, 10


@pytest.fixture(scope="module")
def sae() -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(1)
    W_enc = torch.randn(D_IN, D_SAE, generator=generator)
    b_enc = torch.randn(D_SAE, generator=generator) - 1.0
    b_enc[3] = -1e6  # never fires
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    return SparseAutoencoder("relu", Weights(W_enc, b_enc, W_dec, torch.zeros(D_IN)))


@pytest.fixture(scope="module")
def rows() -> Rows:
    return make_rows(contexts=130, context=CONTEXT, d_in=D_IN)


def measure(folder: Path, sae: SparseAutoencoder, **options: int) -> FeaturesResult:
    saved = SavedSae(sae, {"hook": HOOK, "weights_sha256": {"W_enc": "00"}}, folder)
    chosen = FeatureOptions(**{"contexts": 4, **options})  # type: ignore[arg-type]
    return measure_features(saved, "mine", open_activations(folder), chosen, str, None, SilentReporter())


@pytest.fixture(scope="module")
def folder(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A shard boundary inside the store, but between contexts.
    return write_full(tmp_path_factory.mktemp("features") / "store", rows, [60 * CONTEXT, 70 * CONTEXT])


def held_out(rows: Rows) -> list[int]:
    """Row numbers of the contexts 19, 39, …"""
    total = len(rows.positions)
    return [row for row in range(total) if row // CONTEXT % 20 == 19]


def test_sums_are_those_of_the_held_out_rows(folder: Path, rows: Rows, sae: SparseAutoencoder) -> None:
    result = measure(folder, sae)
    chosen = held_out(rows)
    x = rows.x[HOOK][chosen].float()
    acts = sae.encode(x)
    norm = x.norm(dim=1).double()
    sinks = rows.positions[chosen] == 0
    assert (result.document["rows"], result.document["sink_rows"]) == (len(chosen), int(sinks.sum()))
    assert result.document["dead"] == 1
    for feature in range(D_SAE):
        values = acts[:, feature].double()
        fired = values > 0
        assert result.tensors["density"][feature] == pytest.approx(float(fired.double().mean()))
        mean = float(values[fired].mean()) if fired.any() else 0.0
        assert result.tensors["mean_act"][feature] == pytest.approx(mean, rel=1e-5)
        share = float(values[sinks].sum() / values.sum()) if fired.any() else 0.0
        assert result.tensors["sink_share"][feature] == pytest.approx(share, rel=1e-5)
        both = torch.stack([fired[~sinks].double(), norm[~sinks]])
        correlation = torch.corrcoef(both)[0, 1] if 0 < fired[~sinks].sum() < (~sinks).sum() else 0.0
        assert result.tensors["norm_correlation"][feature] == pytest.approx(float(correlation), abs=1e-5)
    assert torch.allclose(result.tensors["decoder_norm"], sae.weights.W_dec.norm(dim=1))


def test_strongest_contexts_with_the_tokens_around(folder: Path, rows: Rows, sae: SparseAutoencoder) -> None:
    result = measure(folder, sae)
    acts = sae.encode(rows.x[HOOK].float())
    for feature in range(D_SAE):
        best = []
        for context in sorted({row // CONTEXT for row in held_out(rows)}):
            inside = range(context * CONTEXT, (context + 1) * CONTEXT)
            peak = max(inside, key=lambda row: float(acts[row, feature]))
            if acts[peak, feature] > 0:
                best.append((-float(acts[peak, feature]), peak))
        best = sorted(best)[:4]
        expected = [row for _, row in best] + [-1] * (4 - len(best))
        assert result.tensors["top_row"][feature].tolist() == expected
        for slot, (_, peak) in enumerate(best):
            first = peak // CONTEXT * CONTEXT
            window = range(peak - module.BEFORE, peak + module.AFTER + 1)
            inside = [first <= row < first + CONTEXT for row in window]
            assert result.tensors["window_inside"][feature, slot].tolist() == inside
            tokens = [int(rows.positions[row]) * 7 if ok else -1 for row, ok in zip(window, inside, strict=True)]
            assert result.tensors["window_tokens"][feature, slot].tolist() == tokens
            values = [float(acts[row, feature]) if ok else 0.0 for row, ok in zip(window, inside, strict=True)]
            assert result.tensors["window_acts"][feature, slot].tolist() == pytest.approx(values, rel=1e-5)
    assert result.document["tokens"] == {str(7 * place): str(7 * place) for place in range(CONTEXT)}


@pytest.mark.parametrize("batch", [1, 9, 30])
def test_batches_change_nothing(
    folder: Path, sae: SparseAutoencoder, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(folder, sae)
    monkeypatch.setattr(module, "evaluation_batch", lambda d_sae: batch)
    parts = measure(folder, sae)
    assert parts.document == whole.document
    for name, tensor in whole.tensors.items():
        assert torch.allclose(parts.tensors[name].double(), tensor.double(), rtol=1e-5), name


def test_long_contexts_are_looked_at_in_pieces(
    folder: Path, sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_PIECE", 5)
    result = measure(folder, sae, contexts=50)
    rows = result.tensors["top_row"]
    pieces = {(row // CONTEXT, row % CONTEXT // 5) for row in rows[0][rows[0] >= 0].tolist()}
    assert len(pieces) == int((rows[0] >= 0).sum()), "one entry per piece"
    assert torch.allclose(result.tensors["density"], measure(folder, sae).tensors["density"])


def test_rows_are_limited_in_whole_contexts(folder: Path, sae: SparseAutoencoder) -> None:
    assert measure(folder, sae, rows=CONTEXT + 1).document["rows"] == 2 * CONTEXT
    assert measure(folder, sae, rows=1).document["rows"] == CONTEXT


def test_a_store_without_tokens_still_has_rows(rows: Rows, sae: SparseAutoencoder, tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "foreign", make_rows(contexts=400, d_in=D_IN), [400 * CONTEXT])
    result = measure(folder, sae)
    assert result.document["has_tokens"] is False
    assert result.document["tokens"] == {}
    assert (result.tensors["top_row"][0] >= 0).any()


def test_too_few_contexts(sae: SparseAutoencoder, tmp_path: Path) -> None:
    folder = write_full(tmp_path / "small", make_rows(contexts=19, d_in=D_IN), [19 * CONTEXT])
    with pytest.raises(UsageError, match="fewer than 20 contexts"):
        measure(folder, sae)


def test_effects_on_the_logits(sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    W_U, gain = torch.randn(D_IN, 30, generator=generator), torch.rand(D_IN, generator=generator) + 0.5
    monkeypatch.setattr(module, "_LOGIT_ENTRIES", 70)  # two features at a time
    with SilentReporter().task("", None, "") as task:
        effects = module._logit_effects(sae.weights.W_dec, Unembedding(W_U, gain), task)
    # The change of LN(x)·σ when d is added, in float64 and for one feature at a time.
    norm = torch.nn.functional.layer_norm
    for feature in range(D_SAE):
        d = sae.weights.W_dec[feature].double()
        sigma = math.sqrt(float(d.var(unbiased=False)) + 1e-5)
        logits = norm(d, (D_IN,), gain.double(), eps=1e-5) * sigma @ W_U.double()
        order = logits.argsort(descending=True)
        assert effects["raised"][feature].tolist() == order[: module.LOGITS].tolist()
        assert effects["lowered"][feature].tolist() == order.flip(0)[: module.LOGITS].tolist()
        assert effects["raised_by"][feature].tolist() == pytest.approx(
            logits[order[: module.LOGITS]].tolist(), rel=1e-4
        )
