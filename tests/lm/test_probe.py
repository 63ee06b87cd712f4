"""The probe on models whose sink is planted: at a token, at the first position, at both, at neither."""

from __future__ import annotations

import json

import pytest
import torch
from own_forward import own_forward
from tiny_gpt2 import D_MODEL, N_LAYERS, build_model
from tiny_models import TINY
from torch import Tensor

from nsae_cli import interrupt
from nsae_cli.errors import Interrupted
from nsae_cli.lm.families import FAMILIES
from nsae_cli.lm.probe import ProbeSubject, _NormRunner, probe_sinks

HOOK = "blocks.1.hook_resid_post"


def subject_with_sink(carried_by: str) -> ProbeSubject:
    """A sink of norm 1000 after block 1, where the embedding of token 0 and/or of position 0 is found."""
    model = build_model()
    base = model.transformer
    token, position = torch.zeros(2, D_MODEL), None
    token = base.wte.weight[0].detach().clone()
    position = base.wpe.weight[0].detach().clone()
    current: dict[str, Tensor] = {}
    base.wte.register_forward_hook(lambda _m, _i, out: current.update(token=(out - token).norm(dim=-1) < 1e-4))
    base.wpe.register_forward_hook(lambda _m, _i, out: current.update(position=(out - position).norm(dim=-1) < 1e-4))

    def add_sink(_m: object, _i: object, output: Tensor) -> Tensor:
        first = torch.zeros(output.shape[:2], dtype=torch.bool)
        first[:, 0] = True
        where = {
            "token": current["token"],
            "position": current["position"].expand(output.shape[:2]),
            "both": current["token"] & current["position"],
            "neither": first,
            "nothing": torch.zeros_like(first),
        }[carried_by]
        return output + where[..., None] * 1000 / D_MODEL**0.5

    base.h[1].register_forward_hook(add_sink)
    return ProbeSubject(model, FAMILIES["gpt2"], separator=0, ordinary_tokens=torch.arange(1, 257))


def contexts(count: int = 12, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 257, (count, size), generator=generator)
    ids[:, 0] = 0
    return ids


@pytest.mark.parametrize("cause", ["token", "position", "both", "neither"])
def test_planted_cause_is_found(cause: str) -> None:
    found = probe_sinks(subject_with_sink(cause), contexts(), range(N_LAYERS), "resid_post")[HOOK]
    assert found["verdict"] == cause
    assert found["as_is"]["position0"] == pytest.approx(1000, rel=0.1)
    assert found["as_is"]["ratio"] == pytest.approx(found["as_is"]["position0"] / found["as_is"]["elsewhere"])
    assert found["bos"] == found["as_is"], "these contexts start with <|endoftext|> already"


def test_another_position_in_a_family_whose_embedding_begins_later() -> None:
    """OPT's position 0 is row 2 of its table."""
    model = TINY["opt"].build()
    own = own_forward(model, "opt")
    contexts = torch.randint(1, 257, (2, 8), generator=torch.Generator().manual_seed(0))
    subject = ProbeSubject(model, FAMILIES["opt"], 0, torch.arange(1, 257))
    found = _NormRunner(subject, (0, 2), "resid_mid").norms_with_position(contexts, 5)
    table = own.weights["decoder.embed_positions.weight"]
    table[2] = table[2 + 5]
    for row, context in enumerate(contexts):
        sites = own.run(context.tolist()).sites
        expected = torch.stack([sites[layer, "resid_mid"].norm(dim=1) for layer in (0, 2)])
        torch.testing.assert_close(found[:, row].double(), expected, rtol=1e-4, atol=1e-4)


def test_no_sink_no_verdict() -> None:
    found = probe_sinks(subject_with_sink("nothing"), contexts(), [1], "resid_post")
    assert found[HOOK]["verdict"] is None
    assert found[HOOK]["kept_other_token"] is None
    json.dumps(found, allow_nan=False)


def test_model_and_contexts_are_left_as_they_were() -> None:
    subject, ids = subject_with_sink("position"), contexts()
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    copy = ids.clone()
    probe_sinks(subject, ids, [0], "resid_pre")
    assert torch.equal(ids, copy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in subject.model.state_dict().items())


def test_probe_is_a_function_of_its_seed() -> None:
    subject = subject_with_sink("token")
    runs = [probe_sinks(subject, contexts(), [1], "resid_post", seed)[HOOK]["other_token"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_probe_polls_for_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "stop_requested", lambda: 2)
    with pytest.raises(Interrupted, match="stopped while probing"):
        probe_sinks(subject_with_sink("token"), contexts(), [1], "resid_post")
