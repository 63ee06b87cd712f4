"""The trackers' own packages, read back with what they bring. None of them is asked to reach a server."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_trackers import followed

from nsae_cli.training.tracker_kinds import TensorBoardRun, TrackioRun, WandbRun


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as Live
    from tensorboard.util.tensor_util import make_ndarray

    folder = tmp_path / "tensorboard/g/a"
    first = TensorBoardRun(followed(tmp_path))
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 2, "loss_share/sinks": 0.5})
    first.close(False)
    # It goes on from a checkpoint at step 2: 3 was logged and is behind it. TensorBoard is open all the while.
    live = Live(str(folder)).Reload()
    assert [event.step for event in live.Tensors("loss")] == [1, 2, 3]
    again = TensorBoardRun(followed(tmp_path, again=True, step=2))
    for step in (1, 2, 4):
        again.log(step, {"loss": float(step)})
    again.close(True)
    reader = EventAccumulator(str(folder)).Reload()
    expected = [(1, 1.0), (2, 2.0), (4, 4.0)]
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == expected
    live.Reload()
    assert [(event.step, make_ndarray(event.tensor_proto).item()) for event in live.Tensors("loss")] == expected
    [config] = reader.Tensors("config")
    assert config.tensor_proto.string_val[0].decode().splitlines()[:2] == ['    act: "relu"', "    lr: 0.001"]
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())]
    assert (len(sizes), sizes[0]) == (2, 0)  # for readers that know nothing of going on, the old file is empty
    assert again.where == f"tensorboard --logdir {tmp_path / 'tensorboard'}"


def _wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'nsae[wandb]'")
    import wandb
    from wandb.proto import wandb_internal_pb2 as messages

    wandb.teardown()  # or the variables of an earlier test still hold
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    first, other = WandbRun(followed(tmp_path)), WandbRun(followed(tmp_path, name="g/b", id="ffff"))
    for step in (10, 20):
        first.log(step, {"loss": step / 2, "loss_share/sinks": 0.5})
        other.log(step, {"loss": -1.0})
    first.close(False)
    other.close(True)
    again = WandbRun(followed(tmp_path, again=True, step=20))
    assert (first.known, other.known, again.known) == (0, 0, 20)
    again.log(30, {"loss": 15.0})
    again.close(True)
    assert first.where == f"wandb sync {tmp_path / 'wandb' / 'offline-run-*'}"
    assert capfd.readouterr() == ("", "")
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    names = set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in _wandb_records(path):
            record = messages.Record.FromString(data)
            if record.HasField("run"):
                names.add((record.run.run_id, record.run.display_name, record.run.run_group, record.run.project))
            elif record.HasField("history"):
                values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                logged = {key: json.loads(value) for key, value in values.items() if not key.startswith("_")}
                found.setdefault(path.stem.removeprefix("run-"), []).append((record.history.step.num, logged))
    assert names == {("a1b2c3d4e5f60718", "g/a", "g", "nsae"), ("ffff", "g/b", "g", "nsae")}
    assert found["ffff"] == [(10, {"loss": -1.0}), (20, {"loss": -1.0})]
    assert found["a1b2c3d4e5f60718"] == [
        (10, {"loss": 5.0, "loss_share/sinks": 0.5}),
        (20, {"loss": 10.0, "loss_share/sinks": 0.5}),
        (30, {"loss": 15.0}),
    ]


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_wandb_without_a_key_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'nsae[wandb]'")
    import wandb

    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RuntimeError, match="no API key; run `wandb login`, or set WANDB_MODE=offline"):
        WandbRun(followed(tmp_path))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_trackio_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed: pip install 'nsae[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    first, other = TrackioRun(followed(tmp_path)), TrackioRun(followed(tmp_path, name="g/b"))
    for step in (10, 20):
        first.log(step, {"loss": step / 2, "loss_share/sinks": 0.5})
        other.log(step, {"loss": -1.0})
    first.close(False)
    other.close(True)
    again = TrackioRun(followed(tmp_path, again=True, step=10))
    assert (first.known, other.known, again.known) == (0, 0, 20)
    again.log(30, {"loss": 15.0})
    again.close(True)
    assert capfd.readouterr().out == ""
    runs = {run.name: run for run in trackio.Api().runs("nsae")}
    assert set(runs) == {"g/a", "g/b"}
    logs = SQLiteStorage.get_logs("nsae", "g/a")
    assert [(log["step"], log["loss"]) for log in logs] == [(10, 5.0), (20, 10.0), (30, 15.0)]
    assert logs[0]["loss_share/sinks"] == 0.5
    assert runs["g/a"].config["act"] == "relu"
