"""Several processes that train one SAE, through the command line: what they say, how they stop, how they die."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import several
import torch
from forked import Server
from stages import CHECKPOINT_EVERY, STEPS, Prepared

from command import contents


def test_one_voice_and_one_folder(server: Server, trained: Prepared, folder: Path) -> None:
    workspace = trained.begin(folder)
    found = several.run(server, workspace, trained.arguments, 2)
    assert found.codes == [0, 0], found.describe()
    first, second = found.ended
    assert second.out == second.err == ""
    assert "2 processes (data)" in first.err
    assert "kernel dense (gradients are added up over processes" in first.err
    # The folder is that of one process, but for the numbers.
    names = {name for name in trained.whole if name.startswith("saes/")}
    assert {name for name in contents(workspace) if name.startswith("saes/")} == names
    run = json.loads((workspace / "saes" / "one" / "run.json").read_text())
    assert run["processes"] == {"data": 2, "features": 1}

    again = several.run(server, workspace, trained.arguments, 2, extra={})
    assert again.codes == [0, 0]
    assert "already complete" in again.ended[0].err
    assert again.ended[1].out == again.ended[1].err == ""


def test_one_process_under_a_launcher_is_the_plain_one(server: Server, trained: Prepared, folder: Path) -> None:
    workspace = trained.begin(folder)
    found = several.run(server, workspace, trained.arguments, 1)
    assert found.codes == [0], found.describe()
    assert contents(workspace) == trained.whole


def test_a_signal_to_one_stops_all_at_the_same_step(server: Server, trained: Prepared, folder: Path) -> None:
    for world, rank, parallel in ((2, 1, "data"), (4, 3, "2x2")):
        workspace = trained.begin(folder)
        arguments = (*trained.arguments, "--parallel", parallel)
        ended = several.run(server, workspace, arguments, world, {rank: {"end_at_step": {"how": "term", "step": 8}}})
        assert ended.codes == [128 + signal.SIGTERM] * world, ended.describe()
        [line] = ended.lines
        assert line == f"nsae: stopped at step 9 of {STEPS}, checkpoint saved; run the same command to go on"
        assert several.state_of(workspace, "one")[0] == 9
        # On another number of processes it goes on, and says so.
        for other, wanted in ((1, "1 process"), (2, "2 processes (data)")):
            if other == world:
                continue
            options = {other - 1: {"end_at_step": {"how": "term", "step": 12}}} if other == 1 else {}
            went_on = several.run(server, workspace, trained.arguments, other, options)
            assert "going on from the checkpoint at step" in went_on.ended[0].err
            assert f"warning: resume is not bit-exact: {world} processes (" in went_on.ended[0].err or other == 2
            assert f"-> {wanted}" in went_on.ended[0].err
        if world == 4:
            assert went_on.codes == [0, 0], went_on.describe()


def test_dead_ranks(server: Server, trained: Prepared, folder: Path) -> None:
    kinds = [("kill", 1, 8), ("exception", 0, 13), ("segfault", 0, 2)]
    several.die(server, trained, folder, 2, kinds, "data").require()
    several.die(server, trained, folder, 4, [("hang", 2, 9)], "2x2").require()


def test_no_finite_loss_stops_all_before_the_update(server: Server, trained: Prepared, folder: Path) -> None:
    for parallel in ("data", "features"):
        workspace = trained.begin(folder)
        arguments = (*trained.arguments, "--parallel", parallel, "--lr", "1e18", "--name", "wild")
        ended = several.run(server, workspace, arguments, 2)
        assert ended.codes == [5, 5], ended.describe()
        [line] = ended.lines
        assert "is not finite" in line
        assert "rank" not in line


def test_processes_that_differ_are_refused(server: Server, trained: Prepared, folder: Path) -> None:
    workspace = trained.begin(folder)
    ended = several.run(server, workspace, trained.arguments, 2, extra={1: ("--lr", "0.004")})
    assert ended.codes == [2, 2], ended.describe()
    [line] = ended.lines
    assert line.startswith("nsae: rank 1 of 2 differs from rank 0: --lr 0.003 -> 0.004")
    assert not (workspace / "saes").exists()


def test_what_cannot_be_shared_is_refused_once(server: Server, trained: Prepared, folder: Path) -> None:
    workspace = trained.begin(folder)
    for extra, text in (
        (("--batch-size", "63"), "--batch-size 63 cannot be cut into 2 equal parts"),
        (("--parallel", "features", "--d-sae", "25"), "--d-sae 25 cannot be cut into 2 equal parts"),
        (("--parallel", "2x2"), "--parallel 2x2 is for 4 processes, and there are 2"),
        (("--parallel", "rows"), "expected auto, data, features"),
        (("--seed", "0,1"), "2 processes (data) train one SAE, and this is a grid of 2"),
        (("--parallel", "features", "--kernel", "sparse"), "--kernel sparse with features on several processes"),
        (("--precision", "certified"), "--precision certified with 2 processes (data)"),
    ):
        ended = several.run(server, workspace, (*trained.arguments, *extra), 2)
        assert ended.codes == [2, 2], ended.describe()
        [line] = ended.lines
        assert text in line, line
        assert "rank" not in line.replace("--rank", "")
    live = ("train", "--from-model", "mini", "--tokens", "10k", "--device", "cpu")
    [line] = several.run(server, workspace, live, 2).lines
    assert "--from-model with 2 processes (data): each would run the model" in line


def test_whoever_does_not_come_is_named(server: Server, trained: Prepared, folder: Path) -> None:
    workspace, port = trained.begin(folder), several.free_port()
    arguments = (*trained.arguments, "--rank-timeout", "2s")
    waiting = server.run(_alone(workspace, arguments, several.place(0, 2, port)))
    assert waiting.code == 4
    assert "rank 1 of 2 did not come within 2 s (--rank-timeout), 1 missing in all" in waiting.last_line
    began = time.monotonic()
    lost = server.run(_alone(workspace, arguments, several.place(1, 2, port)))
    assert lost.code == 4
    assert time.monotonic() - began < 30
    assert lost.last_line.startswith(f"nsae: rank 1 of 2 does not reach 127.0.0.1:{port}")


def _alone(workspace: Path, arguments: tuple[str, ...], environment: dict[str, str]) -> several.Trial:
    return several.Trial(workspace, arguments, {"count_operations": False, "environment": environment})


def test_checkpoints_are_those_of_one_process(server: Server, trained: Prepared, folder: Path) -> None:
    """Cut at the same step, one process and four have the same items of the same shapes; the numbers nearly agree."""
    states = []
    for world, parallel in ((1, "auto"), (4, "2x2")):
        workspace = trained.begin(folder)
        arguments = (*trained.arguments, "--kernel", "dense", "--parallel", parallel)
        options = {world - 1: {"end_at_step": {"how": "term", "step": CHECKPOINT_EVERY - 1}}}
        several.run(server, workspace, arguments, world, options)
        step, state = several.state_of(workspace, "one")
        assert step == CHECKPOINT_EVERY
        states.append(state)
    one, four = states
    assert one.keys() == four.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(four[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
