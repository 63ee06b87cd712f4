"""Stores with other norms and the same directions."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from command import contents
from hand_store import HOOKS, make_rows, write_foreign, write_full
from listener import Listener
from nsae_cli import interrupt
from nsae_cli.errors import ArtifactError, Interrupted, NumericalError, UsageError
from nsae_cli.reporter import SilentReporter
from nsae_cli.store import commit
from nsae_cli.store.alter import AlteredStore, AlterOptions, alter_store, stretch
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Workspace
from nsae_cli.values import validate_options

SHARDS = [200, 120, 0, 200]
HALF = 2.0**-11  # relative error of a value that is rounded to float16


@pytest.fixture
def store(tmp_path: Path) -> ActivationStore:
    return open_activations(write_full(tmp_path / "activations" / "two", make_rows(65, 8, hooks=HOOKS), SHARDS))


def alter(
    store: ActivationStore, name: str | None = None, reporter: SilentReporter | None = None, **options: Any
) -> AlteredStore:
    chosen = validate_options(AlterOptions, options)
    return alter_store(store, chosen, Workspace(store.path.parent.parent), name, reporter or SilentReporter())


def whole(store: ActivationStore, hook: str) -> dict[str, torch.Tensor]:
    """All rows of a hook: vectors, norms, which are sinks; tokens and positions."""
    shards = range(len(store.manifest.shards))
    profile = profile_hook(store, hook, Contexts(store))
    norms = [store.norms(shard, hook) for shard in shards]
    return {
        "x": torch.cat([store.read(shard, [hook])[hook] for shard in shards]),
        "norms": torch.cat(norms),
        "sinks": torch.cat([profile.flags(shard, norms[shard]).any for shard in shards]),
        "tokens": torch.cat([store.read(shard, ["tokens"])["tokens"] for shard in shards]),
        "positions": torch.cat([store.read(shard, ["positions"])["positions"] for shard in shards]),
        "documents": torch.cat([store.read(shard, ["documents"])["documents"] for shard in shards]),
    }


def assert_same_directions(before: torch.Tensor, after: torch.Tensor) -> None:
    """Each entry is off by its rounding to float16 at most (below its normal range by half of 2⁻²⁴)."""
    unit_before = before.double() / before.double().norm(dim=1, keepdim=True)
    length = after.double().norm(dim=1, keepdim=True)
    allowed = 2 * HALF * unit_before.abs() + 2 * HALF * unit_before.abs().amax(1, keepdim=True) * HALF + 2**-24 / length
    # The length itself carries the mean of the roundings.
    assert bool(((after.double() / length - unit_before).abs() <= allowed + HALF * unit_before.abs()).all())


@pytest.mark.parametrize("hook", HOOKS)
def test_permuted_norms_are_the_same_norms_on_other_directions(store: ActivationStore, hook: str) -> None:
    result = alter(store, permute_norms=True)
    before, after = whole(store, hook), whole(open_activations(result.artifact.path), hook)
    ns = ~before["sinks"]
    assert torch.equal(after["norms"][ns].sort().values, before["norms"][ns].sort().values)
    moved = after["norms"][ns] != before["norms"][ns]
    assert float(moved.float().mean()) > 0.98
    logs = torch.stack([before["norms"][ns].log(), after["norms"][ns].log()])
    assert abs(float(torch.corrcoef(logs)[0, 1])) < 0.12
    assert_same_directions(before["x"][ns], after["x"][ns])
    # The vectors have the norms that are said: each within the rounding of its entries.
    assert after["x"][ns].double().norm(dim=1).tolist() == pytest.approx(after["norms"][ns].tolist(), rel=2 * HALF)
    for name in ("x", "norms"):
        assert torch.equal(after[name][~ns], before[name][~ns])
    for name in ("tokens", "positions", "documents", "sinks"):
        assert torch.equal(after[name], before[name])


def test_hooks_and_seeds_have_permutations_of_their_own(store: ActivationStore) -> None:
    first, second = (open_activations(alter(store, permute_norms=True, seed=seed).artifact.path) for seed in (0, 1))

    def order(of: ActivationStore, hook: str) -> torch.Tensor:
        """Which row's norm each row has got."""
        before, after = whole(store, hook)["norms"], whole(of, hook)["norms"]
        return (after[:, None] == before[None, :]).int().argmax(1)

    a, b = order(first, HOOKS[0]), order(first, HOOKS[1])
    assert float((a == b).float().mean()) < 0.2  # sinks, an eighth, stay where they are
    assert float((a == order(second, HOOKS[0])).float().mean()) < 0.2


@pytest.mark.parametrize("hook", HOOKS)
def test_stretching_by_one_changes_no_bit(store: ActivationStore, hook: str) -> None:
    result = alter(store, stretch_norms=1)
    before, after = whole(store, hook), whole(open_activations(result.artifact.path), hook)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)


@pytest.mark.parametrize(("k", "relative"), [(0, 1e-7), (0.5, 1e-6), (2, 1e-6)])
def test_stretched_norms(store: ActivationStore, k: float, relative: float) -> None:
    hook = HOOKS[1]
    result = alter(store, stretch_norms=k)
    before, after = whole(store, hook), whole(open_activations(result.artifact.path), hook)
    ns = ~before["sinks"]
    scale = float(before["norms"][ns].double().log().mean().exp())
    wanted = scale * (before["norms"][ns].double() / scale) ** k
    assert after["norms"][ns].tolist() == pytest.approx(wanted.tolist(), rel=relative)
    assert_same_directions(before["x"][ns], after["x"][ns])
    assert torch.equal(after["x"][~ns], before["x"][~ns])
    if k == 0:
        assert len(after["norms"][ns].unique()) == 1


def test_a_worked_stretch() -> None:
    # ñ = 2: 8 is ñ·2², so k = 2 makes it ñ·2⁴ and k = ½ ñ·2.
    norm = torch.tensor([8.0, 2.0, 1.0])
    assert stretch(norm, 2.0, 2.0).tolist() == [32.0, 2.0, 0.5]
    assert stretch(norm, 2.0, 0.5).tolist() == pytest.approx([4.0, 2.0, 2**0.5])
    assert stretch(norm, 2.0, 1.0).tolist() == [8.0, 2.0, 1.0]
    assert stretch(norm, 2.0, 0.0).tolist() == [2.0, 2.0, 2.0]


def test_the_manifest_says_what_was_done_and_keeps_the_rest(store: ActivationStore) -> None:
    result = alter(store, permute_norms=True, seed=3)
    assert result.artifact.name == "two-permuted-norms-seed3"
    kept = store.manifest.model_dump(exclude={"shards", "command", "altered", "checksum"})
    assert result.manifest.model_dump(exclude={"shards", "command", "altered", "checksum"}) == kept
    [change] = result.manifest.altered or []
    hooks = change.pop("hooks")
    assert change == {
        "change": "permute-norms",
        "seed": 3,
        "activations": "two",
        "manifest_sha256": store.manifest_sha256,
    }
    assert hooks[HOOKS[0]]["rows"] + hooks[HOOKS[0]]["sinks"] == 520
    again = alter(open_activations(result.artifact.path), stretch_norms=2)
    assert again.artifact.name == "two-permuted-norms-seed3-stretched-norms-2"
    assert [each["change"] for each in again.manifest.altered or []] == ["permute-norms", "stretch-norms"]


def test_the_same_again_is_found_and_another_is_refused(store: ActivationStore) -> None:
    first = alter(store, name="mine", stretch_norms=0.5)
    before = contents(first.artifact.path)
    assert not first.already_complete
    assert alter(store, name="mine", stretch_norms=0.5).already_complete
    assert contents(first.artifact.path) == before
    for name, options in (("mine", {"stretch_norms": 2}), ("mine", {"permute_norms": True}), ("two", {"seed": 0})):
        with pytest.raises(UsageError, match=f"--name {name} is (another store|the store itself)"):
            alter(store, name=name, **({"permute_norms": True} | options if name == "two" else options))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "give one of them"),
        ({"permute_norms": True, "stretch_norms": 2}, "give one of them"),
        ({"stretch_norms": 2, "seed": 1}, "--seed 1: only with --permute-norms"),
        ({"stretch_norms": -1}, "--stretch-norms -1"),
        ({"stretch_norms": "inf"}, "--stretch-norms inf"),
    ],
)
def test_wrong_options(store: ActivationStore, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        alter(store, **options)


def test_what_does_not_fit_the_storage_dtype_is_refused_and_nothing_is_complete(store: ActivationStore) -> None:
    with pytest.raises(NumericalError, match=r"not fit float16 \(at most 65,504\); give a smaller --stretch-norms"):
        alter(store, name="far", stretch_norms=30)
    with pytest.raises(ArtifactError, match="far is not finished"):
        open_activations(store.path.parent / "far")


def test_rows_that_become_sinks_by_the_change_are_pointed_out(store: ActivationStore) -> None:
    listener = Listener()
    alter(store, reporter=listener, stretch_norms=4)
    assert any("sinks in the altered store" in text for text in listener.warnings)
    calm = Listener()
    alter(store, reporter=calm, permute_norms=True)
    assert calm.warnings == []


@pytest.mark.parametrize("options", [{"permute_norms": True}, {"stretch_norms": 0.5}])
def test_stopped_and_going_on_gives_the_same_bytes(
    store: ActivationStore, options: dict[str, Any], monkeypatch
) -> None:
    expected = contents(alter(store, name="whole", **options).artifact.path)
    read, calls = ActivationStore.read, [0]

    def read_and_stop(self: ActivationStore, shard: int, names: Any) -> Any:
        if "tokens" in names:
            calls[0] += 1
            if calls[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return read(self, shard, names)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    interrupt.install_handlers()
    monkeypatch.setattr(ActivationStore, "read", read_and_stop)
    try:
        with pytest.raises(Interrupted, match="2 shards of cut are on disk, the same command goes on"):
            alter(store, name="cut", **options)
    finally:
        interrupt.clear()
        for each, handler in before.items():
            signal.signal(each, handler)
    with pytest.raises(UsageError, match="begun with other options"):
        alter(store, name="cut", stretch_norms=3)
    calls[0] = 10
    assert contents(alter(store, name="cut", **options).artifact.path) == expected


def test_a_fault_at_any_durable_operation_leaves_no_complete_store(store: ActivationStore, monkeypatch) -> None:
    expected = contents(alter(store, name="whole", permute_norms=True).artifact.path)
    operations: list[str] = []
    monkeypatch.setattr(commit, "fault_hook", lambda operation, path: operations.append(operation))
    alter(store, name="count", permute_norms=True)
    for number in range(0, len(operations), 3):
        left = [number]

        def fail(operation: str, path: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(commit, "fault_hook", fail)
        with pytest.raises(Exception, match=r"disk full|No space"):
            alter(store, name=f"fault{number}", permute_norms=True)
        monkeypatch.setattr(commit, "fault_hook", None)
        found = contents(alter(store, name=f"fault{number}", permute_norms=True).artifact.path)
        found.pop("progress.jsonl", None)  # where the manifest was written and only the tidying failed
        assert found == expected


def test_a_store_from_elsewhere_without_norms_and_positions(tmp_path: Path) -> None:
    rows = make_rows(40, 8, hooks=HOOKS[:1], sink=1.0)
    rows.x[HOOKS[0]][5] = 0
    foreign = open_activations(write_foreign(tmp_path / "activations" / "theirs", rows, [100, 220]))
    result = alter(foreign, stretch_norms=0)
    altered = open_activations(result.artifact.path)
    assert altered.has_stored_norms(HOOKS[0])
    assert not altered.has_positions
    assert not altered.has_tokens
    norms = torch.cat([altered.norms(shard, HOOKS[0]) for shard in (0, 1)])
    assert norms[5] == 0  # a zero row has no direction and stays
    assert len(norms.unique()) == 2
    assert not altered.read(0, [HOOKS[0]])[HOOKS[0]][5].any()
