"""The trackers that `--log-to` knows, each behind `TrackerRun`. A package is imported when its tracker is used."""

from __future__ import annotations

import contextlib
import contextvars
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nsae_cli.training.trackers import Followed, TrackerRun

#: The project under which Weights & Biases and trackio show the runs.
DEFAULT_PROJECT = "nsae"
#: Where TensorBoard's files are, in the workspace: WORKSPACE/tensorboard/NAME/CELL.
TENSORBOARD_FOLDER = "tensorboard"


class TensorBoardRun:
    """An event file. A new one is written when training goes on, without what was logged behind the checkpoint.

    The old one is emptied but stays: a TensorBoard that has it open would never get to the next. What it has read of it
    it drops, as the new one's first event tells it to.
    """

    known = 0

    def __init__(self, followed: Followed) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        root = followed.workspace / TENSORBOARD_FOLDER
        folder = root / followed.name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            os.truncate(old, 0)
        self.where = f"tensorboard --logdir {root}"
        self._file = RecordWriter((folder / f"events.out.tfevents.{time.time():.6f}.nsae").open("wb"))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        text = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        config = "\n".join(f"    {key}: {json.dumps(value)}" for key, value in followed.config.items())
        tensor = TensorProto(dtype="DT_STRING", string_val=[config.encode()])
        self._write(Event(summary=Summary(value=[Summary.Value(tag="config", metadata=text, tensor=tensor)])))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=name, simple_value=number) for name, number in values.items()])
        self._write(self._event(step=step, summary=summary))

    def close(self, finished: bool) -> None:
        self._file.close()

    def _write(self, event: object) -> None:
        event.wall_time = time.time()  # type: ignore[attr-defined]  # made by protobuf
        self._file.write(event.SerializeToString())  # type: ignore[attr-defined]
        self._file.flush()


class WandbRun:
    """A run of Weights & Biases; those of a grid are one group. Steps that it has are not sent again."""

    def __init__(self, followed: Followed) -> None:
        import wandb

        # Whatever is found here would otherwise be asked for on the terminal, from a thread, while training goes on.
        mode = wandb.setup().settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no API key; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            group=followed.group,
            name=followed.name,
            id=followed.id,
            resume="allow" if mode == "online" else None,
            config=dict(followed.config),
            reinit="create_new",  # the SAEs of a grid are followed side by side
            dir=os.environ.get("WANDB_DIR") or str(followed.workspace),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        if self._run.offline:
            self.where = f"wandb sync {Path(self._run.dir).parents[1] / 'offline-run-*'}"
            # Nothing says what it has. What the checkpoint's log holds is in the folder of the run before.
            self.known = followed.step if followed.again else 0
        else:
            self.where = self._run.url or "disabled"
            self.known = self._run.starting_step - 1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class TrackioRun:
    """A run of trackio, local or in a Space, as trackio's own variables say. Steps that it has are not sent again."""

    def __init__(self, followed: Followed) -> None:
        import trackio

        def begin() -> trackio.Run:
            return trackio.init(
                project=os.environ.get("TRACKIO_PROJECT") or DEFAULT_PROJECT,
                name=followed.name,
                group=followed.group,
                config=dict(followed.config),
                resume="allow" if followed.again else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        # It keeps the current run in a context variable and would end it when the next SAE's begins.
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for the result
            self._run = contextvars.Context().run(begin)
        project = os.environ.get("TRACKIO_PROJECT") or DEFAULT_PROJECT
        self.where = f'trackio show --project "{project}"'
        # trackio has no public name for the last step that it has.
        self.known = getattr(self._run, "_next_step", followed.step + 1) - 1 if followed.again else 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


KINDS: dict[str, Callable[[Followed], TrackerRun]] = {
    "tensorboard": TensorBoardRun,
    "wandb": WandbRun,
    "trackio": TrackioRun,
}
