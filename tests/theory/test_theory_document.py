"""The documents say what the tests check, and the other way round."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_saes import make, random_rows, random_weights

from nsae_cli.kernels.types import Weights
from nsae_cli.metrics.groups import SINKS
from nsae_cli.metrics.training_batch import batch_metrics
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store.batches import HookRows
from nsae_cli.training.evaluate import evaluate

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
THEORY = (DOCS / "theory.md").read_text(encoding="utf-8")
METRICS = (DOCS / "metrics.md").read_text(encoding="utf-8")
CONTEXT = 128


def test_every_test_named_in_the_theory_exists_and_every_identity_has_its_test_named() -> None:
    named = set(re.findall(r"`(test_\w+)`", THEORY))
    here = {
        name
        for file in HERE.glob("test_*.py")
        if file != Path(__file__)
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    own = {"test_the_tables_ratios_and_shares_are_those_of_its_norms", "test_quoted_shares_follow_from_the_table"}
    not_identities = {"test_the_names_of_the_options_stand_for_these_powers"}
    assert named == (here | own) - not_identities


def norms_of_gpt2() -> dict[str, tuple[float, float, str, str]]:
    rows = re.findall(r"^\| `(blocks\S+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) % \|$", THEORY, re.MULTILINE)
    return {hook: (float(elsewhere), float(first), ratio, share) for hook, elsewhere, first, ratio, share in rows}


def share_of_position_0(elsewhere: float, first: float) -> float:
    return first**2 / (first**2 + (CONTEXT - 1) * elsewhere**2)


def test_the_tables_ratios_and_shares_are_those_of_its_norms() -> None:
    table = norms_of_gpt2()
    assert len(table) == 13
    for elsewhere, first, ratio, share in table.values():
        assert float(ratio) == pytest.approx(first / elsewhere, abs=0.6 if first > 10 * elsewhere else 0.06)
        assert float(share) / 100 == pytest.approx(share_of_position_0(elsewhere, first), abs=0.0051)


def test_quoted_shares_follow_from_the_table() -> None:
    table = norms_of_gpt2()
    layer3 = share_of_position_0(*table["blocks.3.hook_resid_pre"][:2])
    assert layer3 == pytest.approx(0.9335, abs=5e-4)  # the share that the worked number .80 → .987 takes
    ratios = [first / elsewhere for elsewhere, first, _, _ in table.values()]
    inflation = [[(127 + ratio**power) / 128 for ratio in ratios] for power in (1, 2)]
    assert max(inflation[0]) == pytest.approx(1.3, abs=0.05)
    assert max(inflation[1]) == pytest.approx(15, abs=0.5)
    with_sinks = [round(ratio) for ratio in ratios[2:12]]
    assert (min(with_sinks), max(with_sinks)) == (11, 42)


def keys_of(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {key for inner in value.values() for key in keys_of(inner)}
    return {key for inner in value for key in keys_of(inner)} if isinstance(value, list) else set()


def test_every_metric_of_an_evaluation_is_in_the_reference() -> None:
    x = random_rows(300).float()
    group = torch.arange(300) % (SINKS + 1)
    rows = HookRows(x, x.norm(dim=1), group, torch.zeros(300, dtype=torch.bool))
    weights = Weights(*(tensor.float() for tensor in random_weights().tensors()))
    sae = SparseAutoencoder("relu", weights)
    found = keys_of(evaluate(sae, make(), False, lambda _: iter([(rows, torch.arange(300) // 30)])).metrics)
    assert {"fvu_p2", "nbi_low", "G", "grad_share", "esf"} <= found
    assert found - set(re.findall(r"`(\w+)`", METRICS)) == set()


def test_every_number_of_the_training_log_is_in_the_reference() -> None:
    x = random_rows(50)
    ones = torch.ones(50)
    batch = batch_metrics(
        x=x,
        norm=x.norm(dim=1),
        group=torch.arange(50) % (SINKS + 1),
        sq_error=ones,
        dot=ones,
        x_sq=x.square().sum(1),
        x_hat_sq=ones,
        l0=ones,
        l1=ones,
        weight_error=ones,
    )
    rest = {"step", "tokens", "loss", "loss_l2", "loss_sparsity", "dead_fraction_window", "alpha", "lr"}
    assert (set(batch) | rest) - set(re.findall(r"`(\w+)`", METRICS)) == set()
