"""`train()` as a whole: what it writes, that it can be cut anywhere, and that a name keeps its options."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from command import contents
from hand_store import HOOK, HOOKS, make_rows, write_foreign, write_full
from nsae_cli import interrupt, load_sae
from nsae_cli.errors import ArtifactError, Interrupted, NumericalError, ResourceError, UsageError
from nsae_cli.kernels.adam import Adam
from nsae_cli.store import commit
from nsae_cli.store.shards import open_activations
from nsae_cli.training.cell import Cell

GRID = {"act": "relu,tanh-relu", "sinks": "keep,drop", "noise": "0.1", "layers": "all"}


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch):
    """Makes `stop_requested` answer SIGINT from the given poll on."""

    def stop_at(polls: int | None) -> None:
        left = iter(range(polls)) if polls is not None else None

        def requested() -> int | None:
            return None if left is None or next(left, None) is not None else 2

        monkeypatch.setattr(interrupt, "stop_requested", requested)

    return stop_at


def test_a_run_and_its_artifact(run, workspace, store):
    result = run("sae")
    folder = workspace.root / "saes" / "sae"
    assert sorted(contents(folder)) == [
        "cfg.json", "features.safetensors", "metrics.jsonl", "run.json", "sae_weights.safetensors",
    ]  # fmt: skip
    document = json.loads((folder / "run.json").read_text())
    assert document == json.loads(commit.to_json(result.runs[0]))
    assert document["hook"] == HOOKS[1]
    assert (document["d_in"], document["d_sae"]) == (12, 20)
    assert document["counts"] == {"tokens": 2560, "steps": 40, "zero_rows": 0, "resampled": 0}
    assert document["inputs"]["activations"] == {"name": "two-layers", "manifest_sha256": store.manifest_sha256}
    assert document["beta"] == pytest.approx(0.2 * document["norm_scale"])
    assert document["input_scale"] == pytest.approx(12**0.5 / document["norm_scale"])
    assert len(document["edges"]) == 9
    assert document["sinks"]["position"] == 65
    metrics = document["metrics"]
    assert metrics["all"]["tokens"] == 3 * 8  # contexts 19, 39, 59
    assert metrics["sinks"]["tokens"] == 3
    assert len(metrics["bins"]) == 10
    assert 0 < metrics["ns"]["fvu_p0"] < 1.2
    assert load_sae(folder).d_sae == 20
    text = json.dumps(document) + (folder / "metrics.jsonl").read_text()
    assert str(workspace.root) not in text
    assert "NaN" not in text


def test_metrics_lines(run, workspace):
    run("sae", checkpoint_every="7")
    lines = [json.loads(line) for line in (workspace.root / "saes/sae/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    last = lines[-1]
    assert set(last) == {
        "step", "tokens", "loss", "loss_l2", "loss_sparsity", "l0_all", "l0_ns", "l1_all", "fvu_all", "fvu_ns",
        "mre_ns", "cosine_ns", "shrinkage_ns", "dead_fraction_window", "resampled", "alpha", "lr", "loss_share",
        "bias_ratio", "nbi", "l1_share", "grad_share", "exponents", "probe",
    }  # fmt: skip
    assert [line["step"] for line in lines if line["probe"]] == [1, 40]
    for share in (last["l1_share"], *last["grad_share"].values(), last["probe"]["G"]):
        assert sum(value for value in share.values() if value is not None) == pytest.approx(1.0)
    assert set(last["exponents"]) == {"loss", "sparsity", "grad_W_enc", "grad_W_dec"}
    assert last["tokens"] == 2560
    assert last["loss"] == pytest.approx(last["loss_l2"] + last["loss_sparsity"])
    assert last["alpha"] == 0.2
    assert lines[0]["alpha"] == pytest.approx(0.2 / 8)  # 20 % of 40 steps
    assert sum(share for share in last["loss_share"].values() if share is not None) == pytest.approx(1.0)


def test_logged_loss_is_in_raw_units(run, store, workspace, monkeypatch):
    """The first line's terms, from the weights of step 0 folded to raw units and the batch of step 0."""
    seen: list[tuple] = []
    step = Cell.train_step

    def spy(cell: Cell, rows, number):
        if number == 0:
            seen.append((cell.saved_sae(), rows.copy(), cell.objective))
        return step(cell, rows, number)

    monkeypatch.setattr(Cell, "train_step", spy)
    for name, options in {
        "p1": {"l2_norm": "norm"},
        "t": {"act": "tanh-relu", "l2_norm": "sq", "l1_norm": "norm"},
    }.items():
        run(name, alpha_warm_up="0", **options)
        sae, rows, objective = seen.pop()
        line = json.loads((workspace.root / f"saes/{name}/metrics.jsonl").read_text().splitlines()[0])
        x = rows.x.double()
        n = torch.linalg.vector_norm(rows.x.float(), dim=1).double()
        acts = sae.encode(rows.x.float()).double()
        error = sae.decode(acts.float()).double() - x
        p, q = objective.l2_power, objective.l1_power
        assert line["loss_l2"] == pytest.approx(float((n**-p * (error**2).sum(1)).mean()), rel=1e-4)
        assert line["loss_sparsity"] == pytest.approx(objective.beta * float((n**-q * acts.sum(1)).mean()), rel=1e-4)
        assert line["l1_all"] == pytest.approx(float(acts.sum(1).mean()), rel=1e-4)
        assert line["l0_all"] == pytest.approx(float((acts > 0).sum(1).double().mean()), rel=1e-3)


@pytest.mark.parametrize(
    ("act", "decoder"), [("relu", "unit"), ("relu", "bounded"), ("tanh-relu", "free"), ("tanh-relu", "bounded")]
)
def test_norm_ratio_is_right_at_step_0(run, tmp_path, monkeypatch, act, decoder):
    store = open_activations(write_full(tmp_path / "store", make_rows(65, 8, hooks=HOOKS, sink=4), [520]))
    ratios: list[float] = []
    step = Cell.train_step

    def spy(cell: Cell, rows, number):
        log = step(cell, rows, number)
        if number == 0:
            lengths = [torch.linalg.vector_norm(t, dim=1).sum() for t in (log.x + log.result.error, log.x)]
            ratios.append(float(lengths[0] / lengths[1]))
        return log

    monkeypatch.setattr(Cell, "train_step", spy)
    run("sae", store=store, act=act, decoder=decoder, tokens="784", batch_size="392", d_sae="96")
    assert 0.8 <= ratios[0] <= 1.25


@pytest.mark.parametrize(
    ("decoder", "act", "check"),
    [
        ("unit", "relu", lambda norms: (norms - 1).abs().max() < 1e-5),
        ("bounded", "tanh-relu", lambda norms: norms.max() < 1 + 1e-5),
        ("free", "tanh-relu", lambda norms: norms.max() - norms.min() > 0.01),
    ],
)
def test_decoder_modes_hold_in_scaled_units(run, decoder, act, check):
    result = run("sae", act=act, decoder=decoder)
    sae = load_sae(result.artifacts[0].path)
    s = result.runs[0]["input_scale"] if act == "tanh-relu" else 1.0
    assert check(torch.linalg.vector_norm(sae.weights.W_dec.double() * s, dim=1))


def test_clipping_comes_after_the_projection(run, monkeypatch):
    norms: list[float] = []
    adam = Adam.step

    def spy(self, gradients, lr):
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients.tensors())))
        along = (gradients.W_dec * self._weights.W_dec).sum(1).abs().max()
        assert float(along) < 1e-5
        adam(self, gradients, lr)

    monkeypatch.setattr(Adam, "step", spy)
    run("sae", clip="0.01")
    assert max(norms) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    "options", [{}, GRID, {"sinks": "drop", "noise": "0.2", "clip": "1"}], ids=["one", "grid", "drop"]
)
def test_cut_anywhere_and_going_on_gives_the_same_bits(run, workspace, stop_at, listener, options):
    """Stopped before steps 1, 2, within an epoch, at its border (7·64 > 392 rows), at the end, and while evaluating."""
    stop_at(None)
    run("whole", **options)
    whole = contents(workspace.root / "saes" / "whole")
    folder = workspace.root / "saes" / "cut"
    for polls in (0, 1, 2, 3, 5, 12, 8, 20):
        stop_at(polls)
        try:
            run("cut", **options)
            break
        except Interrupted as stopped:
            signum = stopped.signum
        assert signum == 2
        assert (folder / "checkpoints").is_dir()
    stop_at(None)
    run("cut", **options)
    assert contents(folder) == whole
    assert sum("going on from the checkpoint" in note for note in listener.notes) >= 6
    assert not listener.warnings


def test_stopped_while_evaluating_the_steps_are_not_taken_again(run, workspace, stop_at, listener):
    stop_at(None)
    run("whole", **GRID)
    stop_at(40 + 3)  # 40 steps, then a few evaluated batches
    with pytest.raises(Interrupted, match="evaluating"):
        run("cut", **GRID)
    stop_at(None)
    run("cut", **GRID)
    assert "going on from the checkpoint at step 40" in listener.notes
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_periodic_checkpoints_change_nothing(run, workspace):
    run("without")
    run("with", checkpoint_every="3")
    assert contents(workspace.root / "saes/with") == contents(workspace.root / "saes/without")


def test_a_log_written_after_the_checkpoint_is_cut_back(run, workspace, monkeypatch):
    run("whole")
    step = Cell.train_step

    def dies(cell: Cell, rows, number):
        if number == 17:
            raise KeyboardInterrupt  # no checkpoint here: the last one is of step 15
        return step(cell, rows, number)

    monkeypatch.setattr(Cell, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        run("cut", checkpoint_every="5")
    log = workspace.root / "saes/cut/metrics.jsonl"
    assert len(log.read_text().splitlines()) == 17
    log.write_bytes(log.read_bytes()[:-40])  # and its last line torn
    monkeypatch.setattr(Cell, "train_step", step)
    run("cut", checkpoint_every="5")
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def damage(folder: Path, how: str) -> None:
    if how == "missing":
        (folder / "state.safetensors").unlink()
    elif how == "empty list":
        (folder / "files.json").write_text("{}")
    elif how == "not JSON":
        (folder / "files.json").write_text("[1")
    else:
        content = bytearray((folder / "state.safetensors").read_bytes())
        content[-5] ^= 4
        (folder / "state.safetensors").write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "flipped", "empty list", "not JSON"])
@pytest.mark.parametrize("both", [False, True])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(run, workspace, stop_at, listener, how, both):
    stop_at(None)
    run("whole")
    stop_at(12)
    with pytest.raises(Interrupted):
        run("cut", checkpoint_every="5")
    checkpoints = workspace.root / "saes/cut/checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-10", "step-12"]
    for step in (12, 10) if both else (12,):
        damage(checkpoints / f"step-{step}", how)
    stop_at(None)
    run("cut")
    [warning] = listener.warnings
    assert "step-12" in warning
    assert ("beginning again" if both else "going on from step-10") in warning
    assert contents(workspace.root / "saes/cut") == contents(workspace.root / "saes/whole")


def test_a_checkpoint_of_another_step_is_not_believed(run, workspace, stop_at, listener):
    stop_at(8)
    with pytest.raises(Interrupted):
        run("cut")
    checkpoints = workspace.root / "saes/cut/checkpoints"
    (checkpoints / "step-8").rename(checkpoints / "step-30")
    stop_at(None)
    run("cut")
    assert "another step" in listener.warnings[0]


def test_disk_full_at_every_operation_of_a_run(run, workspace, monkeypatch):
    """Nothing half-written under a final name, and the same command ends with the same bytes."""
    options = {"tokens": "256", "checkpoint_every": "3", "seed": "0,1"}
    run("whole", **options)
    whole = contents(workspace.root / "saes/whole")
    folder = workspace.root / "saes/cut"
    for k in range(1000):
        seen: list[str] = []

        def fail(operation: str, path: Path, seen: list[str] = seen, k: int = k) -> None:
            seen.append(operation)
            if len(seen) - 1 == k:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(commit, "fault_hook", fail)
        try:
            run("cut", **options)
        except ResourceError as error:
            said = str(error)
        else:
            break
        finally:
            monkeypatch.setattr(commit, "fault_hook", None)
        assert "disk full" in said
        assert not [path for path in folder.rglob("*") if ".tmp" in path.name]
        for name, content in contents(folder).items():
            if not name.startswith("checkpoints") and not name.endswith("metrics.jsonl"):
                assert content == whole[name], (k, name)
        run("cut", **options)
        assert contents(folder) == whole, k
        shutil.rmtree(folder)
    assert k == len(seen) > 60
    assert contents(folder) == whole


def test_leftovers_of_a_killed_run_are_removed(run, workspace):
    folder = workspace.root / "saes/sae"
    (folder / "checkpoints" / "step-4.tmp-0123").mkdir(parents=True)
    (folder / ".run.json.0123.tmp").write_text("half")
    run("sae")
    assert not [path for path in folder.rglob("*") if "tmp" in path.name]


def test_killed_between_the_last_run_json_and_the_clean_up(run, workspace):
    run("sae")
    (workspace.root / "saes/sae/checkpoints").mkdir()
    assert run("sae").already_complete
    assert not (workspace.root / "saes/sae/checkpoints").exists()


@pytest.mark.parametrize("options", [{}, GRID], ids=["one", "grid"])
def test_the_same_command_twice_rewrites_nothing(run, workspace, options):
    first = run(None, **options)
    stamps = {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")}
    second = run(None, **options)
    assert second.already_complete
    assert not first.already_complete
    assert second.runs == json.loads(commit.to_json(first.runs))
    assert [artifact.path for artifact in second.artifacts] == [artifact.path for artifact in first.artifacts]
    assert {path: path.stat().st_mtime_ns for path in workspace.root.rglob("*")} == stamps


def test_default_names_tell_runs_apart(run):
    one, other = run(None), run(None, lr="0.004")
    assert one.name.startswith("two-layers-L4-relu-none-")
    assert one.name != other.name
    assert run(None, seed="0,1").name.startswith("two-layers-grid-")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": "0.004"}, r"--lr 0.003 -> 0.004"),
        ({"batch_size": "128"}, r"--batch-size 64 -> 128"),
        ({"layers": "1"}, r"--layers 4 -> 1"),
        ({"act": "tanh-relu"}, r"--act relu -> tanh-relu"),
        ({"seed": "0,1"}, r"--seed 0 -> 0,1"),
        ({"deterministic": True}, r"--deterministic False -> True"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_option_under_the_same_name_is_refused_by_name(run, stop_at, workspace, options, said, finished):
    stop_at(None if finished else 5)
    try:
        run("sae")
    except Interrupted:
        assert not finished
    stop_at(None)
    before = contents(workspace.root / "saes")
    with pytest.raises(UsageError, match=said):
        run("sae", **options)
    assert contents(workspace.root / "saes") == before


def test_a_grid_under_the_same_name_is_refused_by_what_differs(run):
    run("grid", seed="0,1")
    with pytest.raises(UsageError, match=r"--seed 0,1 -> 0,1,2"):
        run("grid", seed="0,1,2")
    with pytest.raises(UsageError, match=r"--seed 0,1 -> 0"):
        run("grid")


def test_options_that_do_not_change_the_result_may_change(run):
    run("sae", checkpoint_every="7", device="cpu")
    assert run("sae", checkpoint_every="1h", device="auto").already_complete


def test_other_activations_under_the_same_name_are_refused(run, tmp_path):
    run("sae")
    other = open_activations(write_full(tmp_path / "other", make_rows(65, 8, hooks=HOOKS), [520]))
    with pytest.raises(UsageError, match="two-layers"):
        run("sae", store=other)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"config": {}, "inputs": null}'])
def test_a_damaged_run_json_is_not_taken_for_a_finished_run(run, workspace, text):
    run("sae")
    (workspace.root / "saes/sae/run.json").write_text(text)
    with pytest.raises((ArtifactError, UsageError)):
        run("sae")


def test_a_cell_of_a_grid_equals_the_same_sae_trained_alone(run, workspace):
    run("grid", **GRID)
    for act, sinks, layer in (("relu", "keep", 1), ("tanh-relu", "drop", 4), ("relu", "drop", 1)):
        name = f"alone-{act}-{sinks}-{layer}"
        run(name, act=act, sinks=sinks, layers=str(layer), noise="0.1")
        alone = contents(workspace.root / "saes" / name)
        cell = contents(workspace.root / "saes" / "grid" / f"L{layer}-{act}-{sinks}")
        assert cell == alone


def test_cells_of_a_float32_store_do_not_scale_each_others_rows(run, workspace, tmp_path):
    rows = make_rows(65, 8)
    rows.x[HOOK] = rows.x[HOOK].float()
    store = open_activations(write_foreign(tmp_path / "float32", rows, [300, 220]))
    run("grid", store=store, layers="2", seed="0", l2_norm="none,sq,norm")
    run("alone", store=store, layers="2", l2_norm="norm")
    grid, alone = (load_sae(workspace.root / "saes" / name) for name in ("grid/L2-norm", "alone"))
    assert all(torch.equal(a, b) for a, b in zip(grid.weights.tensors(), alone.weights.tensors(), strict=True))


def test_held_out_rows_and_dropped_sinks_are_never_in_a_batch(run, store, monkeypatch):
    """Every row that reaches a step is compared with the vectors of the rows that must not."""
    x = torch.cat([store.read(shard, [HOOKS[1]])[HOOKS[1]] for shard in range(4)])
    t = torch.arange(len(x))
    forbidden = {tuple(row) for row in x[(t // 8 % 20 == 19) | (t % 8 == 0)].tolist()}
    trained: list[tuple] = []
    step = Cell.train_step

    def spy(cell: Cell, rows, number):
        trained.extend(map(tuple, rows.x.tolist()))
        return step(cell, rows, number)

    monkeypatch.setattr(Cell, "train_step", spy)
    result = run("sae", sinks="drop")
    assert len(trained) == 2560
    assert not forbidden & set(trained)
    assert len(set(trained)) == (65 - 3) * 7
    assert result.runs[0]["metrics"]["sinks"]["tokens"] == 3  # but evaluated


def test_scaled_and_raw_training_see_the_same_loss_at_mapped_weights(run, workspace):
    """s = 1 and s = auto start from weights that map onto each other (a unit decoder's acts scale with x)."""
    for name, scale in (("raw", "1"), ("scaled", "auto"), ("other", "0.2")):
        run(name, input_scale=scale, l2_norm="norm", alpha_warm_up="0")
    first = {
        name: json.loads((workspace.root / f"saes/{name}/metrics.jsonl").read_text().splitlines()[0])
        for name in ("raw", "scaled", "other")
    }
    for key in ("loss", "loss_l2", "loss_sparsity", "l1_all", "mre_ns"):
        assert first["raw"][key] == pytest.approx(first["scaled"][key], rel=1e-4)
        assert first["raw"][key] == pytest.approx(first["other"][key], rel=1e-4)


def test_zero_rows_weigh_nothing_and_are_counted(run, tmp_path):
    rows = make_rows(65, 8)
    rows.x[HOOK][[9, 10, 11]] = 0
    store = open_activations(write_full(tmp_path / "zeros", rows, [520]))
    result = run("sae", store=store, layers="2", tokens=str(496 * 64), batch_size="496", l2_norm="sq")
    assert result.runs[0]["counts"]["zero_rows"] == 3 * 64  # rows 9 to 11 once in each of 64 epochs of 496 rows
    assert all(tensor.isfinite().all() for tensor in load_sae(result.artifacts[0].path).weights.tensors())


def test_a_foreign_store_trains(run, tmp_path, listener):
    store = open_activations(write_foreign(tmp_path / "my store!", make_rows(400, 8), [1000, 0, 2200]))
    result = run(None, store=store, layers=None)
    assert result.name.startswith("my_store_-L2-relu-none-")
    assert any("no positions" in warning for warning in listener.warnings)
    document = result.runs[0]
    assert document["sinks"]["position"] is None
    assert document["metrics"]["all"]["tokens"] == 128
    assert document["model"] is None


def test_fewer_than_20_contexts_train_without_metrics(run, tmp_path, listener):
    store = open_activations(write_full(tmp_path / "few", make_rows(19, 8), [152]))
    result = run("sae", store=store, layers="2")
    assert result.runs[0]["metrics"]["all"]["tokens"] == 0
    assert result.runs[0]["metrics"]["ns"]["fvu_p0"] is None
    assert any("fewer than 20 contexts" in warning for warning in listener.warnings)


def test_batches_larger_than_an_epoch_train(run):
    result = run("sae", batch_size="1500", tokens="9000")
    assert result.runs[0]["counts"]["steps"] == 6


def test_dropping_sinks_where_every_training_row_is_one_is_refused(run, tmp_path):
    """Held-out contexts of short rows, training contexts of one row each at position 0, three times as long."""
    rows = make_rows(40, 8)
    keep = (torch.arange(320) // 8 % 20 == 19) | (rows.positions == 0)
    rows.x[HOOK], rows.positions = rows.x[HOOK][keep], rows.positions[keep]
    store = open_activations(write_full(tmp_path / "sinks", rows, [int(keep.sum())]))
    with pytest.raises(UsageError, match="--sinks drop: every training row"):
        run("sae", store=store, layers="2", sinks="drop")


def test_loss_that_is_not_finite_stops_before_the_update(run, workspace, monkeypatch):
    step = Cell.train_step
    weights: list[torch.Tensor] = []

    def poisoned(cell: Cell, rows, number):
        if number == 6:
            weights.append(cell.weights.W_enc.clone())
            rows.x[3, 2] = float("inf")
            try:
                step(cell, rows, number)
            finally:
                weights.append(cell.weights.W_enc.clone())
        return step(cell, rows, number)

    monkeypatch.setattr(Cell, "train_step", poisoned)
    with pytest.raises(NumericalError, match="step 7"):
        run("sae", checkpoint_every="2")
    assert torch.equal(weights[0], weights[1])
    assert (workspace.root / "saes/sae/checkpoints/step-6").is_dir()
    assert not (workspace.root / "saes/sae/run.json").exists()


def test_out_of_memory_names_the_options_to_lower(run, monkeypatch):
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Cell, "train_step", no_room)
    with pytest.raises(ResourceError, match="--batch-size"):
        run("sae")


def test_deterministic_is_restored_afterwards(run):
    run("sae", deterministic=True, tokens="640")
    assert not torch.are_deterministic_algorithms_enabled()


def test_unfinished_training_is_no_artifact(run, workspace, stop_at):
    from nsae_cli.store.workspace import Kind

    stop_at(5)
    with pytest.raises(Interrupted):
        run("cut")
    assert list(workspace.complete(Kind.SAE)) == []
    assert [path.name for path in workspace.unfinished(Kind.SAE)] == ["cut"]
    with pytest.raises(ArtifactError, match="not finished"):
        workspace.find(Kind.SAE, "cut")
