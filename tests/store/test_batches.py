"""Contexts, the held-out rule, profiles, and the order in which rows are trained on."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hand_store import HOOK, Rows, make_rows, write_foreign, write_full
from nsae_cli.store.batches import BatchStream, held_out_rows
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.profile import HookProfile, profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations

CONTEXT = 8
CONTEXTS = 45  # 2 held out: numbers 19 and 39


def numbered(rows: Rows) -> Rows:
    """Row t carries t in its first coordinate, so that a batch tells which rows it holds."""
    for x in rows.x.values():
        x[:, 0] = torch.arange(len(x)).half() / 256  # exact in fp16 up to 2047
    return rows


def row_numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0].float() * 256).long().tolist()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    # Shards that begin inside contexts, one empty.
    folder = tmp_path_factory.mktemp("stores") / "store"
    return open_activations(write_full(folder, numbered(make_rows(CONTEXTS, CONTEXT)), [100, 57, 0, 43, 160]))


@pytest.fixture(scope="module")
def contexts(store: ActivationStore) -> Contexts:
    return Contexts(store)


@pytest.fixture(scope="module")
def profile(store: ActivationStore, contexts: Contexts) -> HookProfile:
    return profile_hook(store, HOOK, contexts)


def stream(store: ActivationStore, profile: HookProfile, contexts: Contexts, **changes: object) -> BatchStream:
    options = {"batch_size": 32, "seed": 0, "buffer_rows": 150, "drop_sinks": False} | changes
    return BatchStream(store=store, profiles=[profile], contexts=contexts, **options)


def taken(batches, count: int) -> list[int]:
    """Row numbers of the first batches."""
    return [t for batch in itertools.islice(batches, count) for t in row_numbers(batch[HOOK].x)]


HELD_OUT = {t for t in range(CONTEXTS * CONTEXT) if t // CONTEXT % 20 == 19}
TRAINING = set(range(CONTEXTS * CONTEXT)) - HELD_OUT


def test_contexts_are_numbered_through_shard_borders(store, contexts):
    ids = torch.cat([contexts.ids(shard) for shard in range(5)])
    assert ids.tolist() == [t // CONTEXT for t in range(CONTEXTS * CONTEXT)]
    assert contexts.total == CONTEXTS
    held = torch.cat([contexts.held_out(shard) for shard in range(5)])
    assert set(held.nonzero().squeeze(1).tolist()) == HELD_OUT


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=50),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    first=st.integers(0, 3),
)
def test_contexts_of_any_length_cut_into_any_shards(tmp_path_factory, lengths, cuts, first):
    """Contexts begin where position ≠ previous + 1: counted here row by row in plain Python."""
    positions = [p for i, n in enumerate(lengths) for p in range(first if i == 0 else 0, n + (first if i == 0 else 0))]
    borders = sorted({0, len(positions), *(cut for cut in cuts if cut < len(positions))})
    expected, number = [], -1
    for t, position in enumerate(positions):
        if t == 0 or position != positions[t - 1] + 1:
            number += 1
        expected.append(number)

    rows = Rows({HOOK: torch.ones(len(positions), 2).half()}, torch.tensor(positions))
    folder = tmp_path_factory.mktemp("contexts") / "store"
    store = open_activations(write_full(folder, rows, [b - a for a, b in itertools.pairwise(borders)]))
    contexts = Contexts(store)
    shards = range(len(store.manifest.shards))
    assert torch.cat([contexts.ids(shard) for shard in shards]).tolist() == expected
    held = torch.cat([contexts.held_out(shard) for shard in shards]).tolist()
    assert held == [number % 20 == 19 for number in expected]


def test_blocks_of_128_rows_stand_for_contexts_without_positions(tmp_path):
    rows = make_rows(400, 8)
    store = open_activations(write_foreign(tmp_path / "foreign", rows, [1000, 2200]))
    contexts = Contexts(store)
    held = torch.cat([contexts.held_out(0), contexts.held_out(1)]).nonzero().squeeze(1).tolist()
    assert held == list(range(19 * 128, 20 * 128))
    assert contexts.total == 25


def test_each_epoch_sees_every_training_row_once_and_no_other(store, profile, contexts):
    rows = stream(store, profile, contexts)
    assert rows.rows_per_epoch == len(TRAINING)
    seen = taken(rows.batches(0), 3 * len(TRAINING) // 32 + 1)
    for epoch in range(3):
        part = seen[epoch * len(TRAINING) : (epoch + 1) * len(TRAINING)]
        assert sorted(part) == sorted(TRAINING)
    assert seen[: len(TRAINING)] != seen[len(TRAINING) : 2 * len(TRAINING)]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 343, 344, 345, 1000])
def test_batches_begin_anywhere_as_if_from_the_start(store, profile, contexts, batch_size):
    """Resuming at any step, also within windows, at epoch borders, and with batches larger than an epoch."""
    rows = stream(store, profile, contexts, batch_size=batch_size)
    whole = [batch[HOOK].copy() for batch in itertools.islice(rows.batches(0), 12)]
    assert all(len(batch.norm) == batch_size for batch in whole)
    for first in range(12):
        again = next(rows.batches(first))[HOOK]
        for name in ("x", "norm", "group", "zero"):
            assert torch.equal(getattr(again, name), getattr(whole[first], name))


def test_batches_larger_than_an_epoch_count_every_row_equally(store, profile, contexts):
    seen = Counter(taken(stream(store, profile, contexts, batch_size=2 * len(TRAINING)).batches(0), 2))
    assert set(seen.values()) == {4}


def test_the_first_rows_are_those_of_the_first_batches(store, profile, contexts):
    rows = stream(store, profile, contexts)
    for count in (1, 50, 200, len(TRAINING)):
        first = rows.first_rows(count)[HOOK]
        expected = taken(rows.batches(0), -(-count // 32))[:count]
        if count <= len(TRAINING) // 32 * 32:
            assert row_numbers(first.x) == expected
        assert len(first.norm) == count
    assert len(rows.first_rows(10**6)[HOOK].norm) == len(TRAINING)


def test_rows_carry_their_own_norm_and_group(store, profile, contexts):
    original = numbered(make_rows(CONTEXTS, CONTEXT)).x[HOOK]
    norms = torch.linalg.vector_norm(original.float(), dim=1)
    for batch in itertools.islice(stream(store, profile, contexts).batches(0), 11):
        rows = batch[HOOK]
        index = torch.tensor(row_numbers(rows.x))
        assert torch.equal(rows.x, original[index])
        assert torch.equal(rows.norm, norms[index])
        assert torch.equal(rows.group == 10, index % CONTEXT == 0)  # the sinks of make_rows
        below = (rows.norm[:, None].double() >= profile.edges).sum(1)
        assert torch.equal(rows.group[rows.group != 10], below[rows.group != 10])


def test_order_depends_on_seed_and_epoch_alone(store, profile, contexts):
    first = taken(stream(store, profile, contexts).batches(0), 10)
    assert first == taken(stream(store, profile, contexts).batches(0), 10)
    assert first == taken(stream(store, profile, contexts, batch_size=64).batches(0), 5)
    assert first != taken(stream(store, profile, contexts, seed=1).batches(0), 10)


def test_dropping_sinks_leaves_the_order_of_all_other_rows(store, profile, contexts):
    drop = stream(store, profile, contexts, drop_sinks=True)
    sinks = {t for t in TRAINING if t % CONTEXT == 0}
    assert drop.rows_per_epoch == len(TRAINING - sinks)
    keep_order = taken(stream(store, profile, contexts, batch_size=1).batches(0), len(TRAINING))
    drop_order = taken(stream(store, profile, contexts, batch_size=1, drop_sinks=True).batches(0), drop.rows_per_epoch)
    assert drop_order == [t for t in keep_order if t not in sinks]


def test_a_window_holds_no_more_rows_than_the_buffer(store, profile, contexts):
    """Shards of 100, 57, 0, 43 and 160 rows: windows of at most 150, or one shard."""
    rows = stream(store, profile, contexts)
    sizes = [100, 57, 0, 43, 160]
    for epoch in range(20):
        windows = list(rows._windows(epoch))
        assert sorted(shard for window in windows for shard in window) == [0, 1, 2, 3, 4]
        assert all(len(window) == 1 or sum(sizes[s] for s in window) <= 150 for window in windows)


def test_a_window_is_loaded_shard_by_shard_into_its_final_place(tmp_path):
    """Beside the window itself, one shard's rows are in memory at a time, and its batches are views of it."""
    rows = make_rows(512, 8, d_in=64, sink=1)
    store = open_activations(write_full(tmp_path / "store", rows, [512] * 8))
    contexts = Contexts(store)
    whole = stream(store, profile_hook(store, HOOK, contexts), contexts, buffer_rows=4096)
    alive: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []
    read = store.read_rows

    def counted(*args: Any) -> torch.Tensor:
        most.append(sum(old() is not None for old in alive))
        part = read(*args)
        alive.append(weakref.ref(part))
        return part

    store.read_rows = counted
    batches = whole.batches(0)
    first, second = next(batches)[HOOK].x, next(batches)[HOOK].x
    assert len(most) == 8
    assert max(most) <= 1
    assert first.untyped_storage().nbytes() == whole.rows_per_epoch * 64 * 2
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_hooks_share_the_order(tmp_path):
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    store = open_activations(write_full(tmp_path / "two", numbered(make_rows(25, 8, hooks=hooks)), [90, 110]))
    contexts = Contexts(store)
    profiles = [profile_hook(store, hook, contexts) for hook in hooks]
    both = BatchStream(store, profiles, contexts, 16, 0, 1000, False)
    alone = BatchStream(store, profiles[1:], contexts, 16, 0, 1000, False)
    for two, one in zip(itertools.islice(both.batches(0), 15), alone.batches(0), strict=False):
        assert torch.equal(two[hooks[1]].x, one[hooks[1]].x)
        assert row_numbers(two[hooks[0]].x) == row_numbers(two[hooks[1]].x)


def test_held_out_rows_come_in_store_order_with_their_contexts(store, profile, contexts):
    parts = list(held_out_rows(store, profile, contexts, batch_size=5))
    assert [t for rows, _ in parts for t in row_numbers(rows.x)] == sorted(HELD_OUT)
    assert [n for _, numbers in parts for n in numbers.tolist()] == [t // CONTEXT for t in sorted(HELD_OUT)]
    assert max(len(rows.norm) for rows, _ in parts) == 5


def test_profile_by_hand(store, profile):
    """ñ, the edges and the means, computed here with numpy-like one-liners from the rows themselves."""
    x = numbered(make_rows(CONTEXTS, CONTEXT)).x[HOOK].float()
    n = torch.linalg.vector_norm(x, dim=1).double()
    t = torch.arange(len(n))
    sink, training = t % CONTEXT == 0, ~torch.isin(t, torch.tensor(sorted(HELD_OUT)))
    assert profile.norm_scale == pytest.approx(math.exp(n[~sink].log().mean()), rel=1e-6)
    deciles = torch.quantile(n[~sink & training], torch.arange(1, 10).double() / 10)
    torch.testing.assert_close(profile.edges, deciles, rtol=1e-6, atol=0)
    assert profile.mean_power == pytest.approx([1.0, float(n[training].mean()), float((n**2)[training].mean())])
    outside = training & ~sink
    assert profile.mean_power_ns == pytest.approx([1.0, float(n[outside].mean()), float((n**2)[outside].mean())])
    assert profile.training_sinks == int((sink & training).sum())


def test_zero_rows_are_counted_and_kept_out_of_the_scale(tmp_path):
    rows = make_rows(25, 8, sink=1)
    rows.x[HOOK][[3, 77]] = 0
    store = open_activations(write_full(tmp_path / "store", rows, [200]))
    contexts = Contexts(store)
    profile = profile_hook(store, HOOK, contexts)
    n = torch.linalg.vector_norm(rows.x[HOOK].float(), dim=1).double()
    assert profile.zero_rows == 2
    assert profile.norm_scale == pytest.approx(math.exp(n[n > 0].log().mean()), rel=1e-6)
    training = stream(store, profile, contexts).first_rows(200)[HOOK]
    assert int(training.zero.sum()) == 2
    assert torch.equal(training.zero, training.norm == 0)


def test_massive_activations_are_found_in_the_vectors(tmp_path):
    rows = make_rows(25, 8, d_in=16, sink=1)
    rows.x[HOOK][21] *= 0.02
    rows.x[HOOK][21, 5] = 150.0  # > 100 and > 1000 × the row's median
    store = open_activations(write_full(tmp_path / "store", rows, [50, 150]))
    profile = profile_hook(store, HOOK, Contexts(store))
    assert profile.flags(0, store.norms(0, HOOK)).massive.nonzero().tolist() == [[21]]
    assert profile.sink_counts.to_json()["massive"] == 1


def test_open_store_path_may_be_text(store):
    assert open_activations(str(store.path)).manifest.rows == CONTEXTS * CONTEXT
    assert Path(store.path).name == "store"
