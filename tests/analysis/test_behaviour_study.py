"""Autoencoders whose effect on the model is known: the identity, zero, the mean, and what a hook by hand does."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from nsae_cli.analysis import behaviour
from nsae_cli.analysis.behaviour import BehaviourStudy, Evaluation, Subject
from nsae_cli.errors import ArtifactError, NumericalError
from nsae_cli.lm.evaluated_rows import EvaluatedRows, RowRules
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.splice import Splicer
from nsae_cli.lm.texts import Text
from nsae_cli.metrics.groups import N_GROUPS
from nsae_cli.metrics.sinks import fit_thresholds
from nsae_cli.reporter import SilentReporter
from nsae_cli.training.measure import evaluate_reconstruction

D, VOCABULARY = 16, 97
HOOK = "blocks.1.hook_resid_post"
#: Position 0 is a sink by decree, the rest is cut in two bins of norms.
RULES = RowRules(fit_thresholds(1e6, 10.0, 1.0), (11.0, *[1e9] * 8), 1.0, "rows")
NO_SINKS = RowRules(fit_thresholds(1e6, None, None), None, 1.0, "rows")


@dataclass(frozen=True)
class Made:
    """An autoencoder that is a function; two features, x's mean of the positive and of the negative part."""

    function: Callable[[torch.Tensor], torch.Tensor]
    d_in: int = D
    d_sae: int = 2

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        acts = torch.stack([x.clamp(min=0).mean(-1), (-x).clamp(min=0).mean(-1)], dim=-1)
        return acts, self.function(x)


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_embd=D, n_head=2, n_positions=24, vocab_size=VOCABULARY, initializer_range=0.4, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def text() -> Text:
    """Nine contexts of unequal length, one of a single token."""
    draw = np.random.default_rng(0)
    lengths = [20, 20, 5, 24, 1, 11, 20, 2, 17]
    contexts = [draw.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
    return Text(contexts, [19 + 20 * i for i in range(len(lengths))])


def study(model: GPT2LMHeadModel, text: Text, rules: RowRules | None = RULES, **changes: Any) -> BehaviourStudy:
    options: dict[str, Any] = {"bins": True, "batch_size": 4, "reporter": SilentReporter()}
    return BehaviourStudy(model, FAMILIES["gpt2"], HOOK, text, rules, **options | changes)


def subject(function: Callable[[torch.Tensor], torch.Tensor], **changes: Any) -> Subject:
    sae = Made(function, **changes)
    return Subject("made", sae, lambda rows: evaluate_reconstruction(sae, rows).metrics)


def evaluate(one: BehaviourStudy, function: Callable[[torch.Tensor], torch.Tensor]) -> Evaluation:
    [evaluation] = one.evaluate([subject(function)])
    return evaluation


def test_the_identity_changes_nothing_exactly(model: GPT2LMHeadModel, text: Text) -> None:
    evaluation = evaluate(study(model, text), lambda x: x)
    measured, tensors = evaluation.behaviour, evaluation.tensors
    for name in ("delta_ce", "delta_ce_all", "delta_ce_ns", "kl"):
        assert measured[name] == {"value": 0, "low": 0, "high": 0}
    assert measured["ce_recovered_zero"]["value"] == measured["ce_recovered_mean"]["value"] == 1
    assert [part["delta_ce"]["value"] for part in measured["bins"][:2]] == [0, 0]
    assert measured["sinks"]["delta_ce"]["value"] == 0
    assert torch.equal(tensors["ce_clean"], tensors["ce_with_sae"])
    assert evaluation.metrics["all"]["fvu_p0"] == 0


def test_clean_and_zero_against_a_loop_without_batches(model: GPT2LMHeadModel, text: Text) -> None:
    evaluation = evaluate(study(model, text), torch.zeros_like)
    tensors = evaluation.tensors
    assert torch.equal(tensors["ce_with_sae"], tensors["ce_zero"]), "a reconstruction of 0 is the zero ablation"
    assert evaluation.behaviour["ce_recovered_zero"]["value"] == 0

    def loop(zero: bool) -> list[float]:
        sums = []
        for context in text.contexts:
            ids = torch.from_numpy(context).long().unsqueeze(0)
            handle = model.transformer.h[1].register_forward_hook(lambda _, __, x: x * 0 if zero else x)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0]
            handle.remove()
            sums.append(float(functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")))
        return sums

    assert tensors["ce_clean"].tolist() == pytest.approx(loop(zero=False), rel=1e-5, abs=1e-4)
    assert tensors["ce_zero"].tolist() == pytest.approx(loop(zero=True), rel=1e-5, abs=1e-4)
    assert tensors["predicted"].tolist() == [len(context) - 1 for context in text.contexts]
    assert tensors["context"].tolist() == list(text.numbers)


def test_the_mean_of_the_non_sinks_is_the_mean_ablation(model: GPT2LMHeadModel, text: Text) -> None:
    one = study(model, text)
    splicer = Splicer(model, FAMILIES["gpt2"], HOOK)
    rows = [splicer.residual(torch.from_numpy(c).long().unsqueeze(0))[0, 1:].double() for c in text.contexts]
    torch.testing.assert_close(one.mean_ns, torch.cat(rows).mean(dim=0), rtol=1e-6, atol=1e-6)
    evaluation = evaluate(one, lambda x: one.mean_ns.float().expand_as(x))
    assert torch.equal(evaluation.tensors["ce_with_sae"], evaluation.tensors["ce_mean"])
    assert evaluation.behaviour["ce_recovered_mean"]["value"] == 0
    assert evaluation.metrics["ns"]["fvu_p0"] == pytest.approx(1)


def test_non_sinks_only_leaves_the_sinks_as_they_are(model: GPT2LMHeadModel, text: Text) -> None:
    tensors = evaluate(study(model, text, bins=False), lambda x: x * 0.5).tensors
    expected = []
    for context in text.contexts:
        ids = torch.from_numpy(context).long().unsqueeze(0)

        def halve(_: Any, __: Any, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1], x[:, 1:] * 0.5], dim=1)

        handle = model.transformer.h[1].register_forward_hook(halve)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        handle.remove()
        expected.append(float(functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")))
    assert tensors["ce_ns"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert not torch.allclose(tensors["ce_ns"], tensors["ce_with_sae"])


def test_groups_are_disjoint_and_hold_every_row(model: GPT2LMHeadModel, text: Text) -> None:
    evaluation = evaluate(study(model, text), lambda x: x * 0.5)
    rows = evaluation.tensors["rows_groups"]
    assert rows.sum(dim=1).tolist() == [len(context) for context in text.contexts]
    assert rows[:, N_GROUPS - 1].tolist() == [1] * len(text.contexts)
    assert min(rows[:, 0].sum(), rows[:, 1].sum()) > 10


def test_one_group_of_all_rows_is_the_splice_everywhere(model: GPT2LMHeadModel, text: Text) -> None:
    evaluation = evaluate(study(model, text, rules=NO_SINKS), lambda x: x * 0.5)
    measured, tensors = evaluation.behaviour, evaluation.tensors
    assert torch.equal(tensors["ce_groups"][:, 0], tensors["ce_with_sae"])
    assert torch.equal(tensors["ce_ns"], tensors["ce_with_sae"])
    per_row = measured["delta_ce_all"]["value"] * (text.tokens - len(text.contexts)) / text.tokens
    assert measured["bins"][0]["delta_ce"]["value"] == pytest.approx(per_row)
    assert measured["sinks"]["rows"] == 0
    assert measured["sinks"]["delta_ce"]["value"] is None


def test_neither_batches_nor_company_nor_room_change_the_result(
    model: GPT2LMHeadModel, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: x * 0.5, lambda x: x.clamp(min=0)] * 2
    alone = [evaluate(study(model, text), function) for function in functions[:2]]
    monkeypatch.setattr(behaviour, "_TOGETHER", 3)
    together = list(study(model, text).evaluate(map(subject, functions)))
    for found, expected in zip(together, alone * 2, strict=True):
        assert found.behaviour == expected.behaviour
        assert found.metrics == expected.metrics
        for name, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[name], tensor), name
    single = evaluate(study(model, text, batch_size=1), functions[0])
    torch.testing.assert_close(single.tensors["ce_with_sae"], alone[0].tensors["ce_with_sae"], rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(EvaluatedRows.__init__, "__defaults__", (0, lambda contexts: None))
    again = evaluate(study(model, text), functions[0])
    assert again.behaviour == alone[0].behaviour
    assert again.metrics == alone[0].metrics


def test_logits_live_as_long_as_their_batch(
    model: GPT2LMHeadModel, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all logits ever computed two are alive at a time, besides the log-probabilities of one batch."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    original = Splicer.logits

    def watched(self: Splicer, ids: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in made))
        logits = original(self, ids, residual)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(Splicer, "logits", watched)
    list(study(model, text).evaluate([subject(lambda x: x * 0.5), subject(torch.zeros_like)]))
    assert len(made) > 30
    assert max(alive) <= 1


def test_rules_are_fitted_where_none_are_given(model: GPT2LMHeadModel, text: Text) -> None:
    one = study(model, text, rules=None)
    assert one.rules.source == "rows"
    assert one.rules.edges is not None
    norms = torch.cat([one.rows.norms(block) for block in range(len(one.rows))])
    assert one.rules.thresholds.median == pytest.approx(float(norms.double().quantile(0.5)))
    measured = evaluate(one, lambda x: x * 0.5).behaviour
    assert sum(part["rows"] for part in [*measured["bins"], measured["sinks"]]) == text.tokens


def test_what_is_not_finite_is_refused(model: GPT2LMHeadModel, text: Text) -> None:
    with pytest.raises(NumericalError, match=r"made: its reconstruction of context 19 .* NaN or infinity"):
        evaluate(study(model, text), lambda x: x / 0)
    with pytest.raises(
        NumericalError, match=r"made: with it spliced in at blocks.1.hook_resid_post the model's logits"
    ):
        evaluate(study(model, text), lambda x: torch.full_like(x, 3e38))
    damaged = GPT2LMHeadModel(model.config).eval()
    damaged.transformer.h[0].mlp.c_proj.bias.data[0] = float("nan")
    with pytest.raises(NumericalError, match=r"residual at blocks.1.hook_resid_post is not finite at position 0 of"):
        study(damaged, text)
    damaged = GPT2LMHeadModel(model.config).eval()
    damaged.transformer.h[2].mlp.c_proj.bias.data[0] = float("nan")
    with pytest.raises(NumericalError, match="the model's own logits are not finite"):
        evaluate(study(damaged, text), lambda x: x)


def test_another_width_is_refused(model: GPT2LMHeadModel, text: Text) -> None:
    wide = dataclasses.replace(subject(lambda x: x), sae=Made(lambda x: x, d_in=12))
    with pytest.raises(ArtifactError, match=r"width 12, the model's blocks.1.hook_resid_post has width 16"):
        list(study(model, text).evaluate([wide]))
