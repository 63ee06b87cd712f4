"""Files appear under their final names whole or not at all, whatever fails and whenever."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from hand_store import make_rows, write_full
from nsae_cli.errors import ArtifactError, ResourceError
from nsae_cli.store import commit
from nsae_cli.store.progress import PROGRESS
from nsae_cli.store.shards import open_activations


class Fault:
    """Raises at the k-th durable operation, or only counts them."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        self.at, self.error = at, error
        self.seen: list[tuple[str, str]] = []

    def __call__(self, operation: str, path: Path) -> None:
        self.seen.append((operation, path.name))
        if len(self.seen) - 1 == self.at:
            raise self.error or OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch):
    def install(at: int | None = None, error: BaseException | None = None) -> Fault:
        hook = Fault(at, error)
        monkeypatch.setattr(commit, "fault_hook", hook)
        return hook

    yield install
    commit.fault_hook = None


SHARDS = [16, 16, 8]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}


def test_operations_come_in_the_order_that_survives_a_power_cut(tmp_path, fault):
    hook = fault()
    write_full(tmp_path / "store", make_rows(5), SHARDS)
    operations = [operation for operation, _ in hook.seen]
    one_file = ["write", "fsync", "rename", "fsync-folder"]
    assert operations == ["mkdir", "fsync-folder", *one_file] + 3 * [*one_file, "append"] + [*one_file, "unlink"]
    assert hook.seen[-3] == ("rename", "manifest.json")
    assert hook.seen[-1] == ("unlink", PROGRESS)


def test_disk_full_at_every_operation_of_a_store(tmp_path, fault):
    rows = make_rows(5)
    whole = contents(write_full(tmp_path / "whole", rows, SHARDS))
    for k in itertools.count():
        folder = tmp_path / f"at{k}"
        hook = fault(k)
        try:
            write_full(folder, rows, SHARDS)
        except ResourceError as error:
            said = str(error)
        else:
            break
        assert "disk full" in said
        assert "run the same command again" in said
        fault()
        left = contents(folder)
        for name in left:
            # No temporary names, and what has a final name is what an undisturbed run writes.
            assert name == PROGRESS or left[name] == whole[name], (k, hook.seen[-1])
        if "manifest.json" in left:
            open_activations(folder).read(2, ["tokens"])
        else:
            with pytest.raises(ArtifactError, match=r"not finished|not an activation store"):
                open_activations(folder)
            write_full(folder, rows, SHARDS)
            assert contents(folder) == whole
    assert k == len(hook.seen) > 20


def test_finished_shards_are_not_written_again(tmp_path, fault):
    fault(15)  # while the second of three shards is being renamed
    with pytest.raises(ResourceError):
        write_full(tmp_path / "store", make_rows(5), SHARDS)
    hook = fault()
    write_full(tmp_path / "store", make_rows(5), SHARDS)
    written = [name for operation, name in hook.seen if operation == "rename"]
    assert "shard-00000.safetensors" not in written
    assert written[-1] == "manifest.json"


@pytest.mark.parametrize("torn", [b"", b'{"file": "shard-0000', b"\xff\xfe"])
def test_a_torn_progress_line_costs_its_shard_only(tmp_path, fault, torn):
    whole = contents(write_full(tmp_path / "whole", make_rows(5), SHARDS))
    folder = tmp_path / "store"
    fault(16)
    with pytest.raises(ResourceError):
        write_full(folder, make_rows(5), SHARDS)
    fault()
    progress = folder / PROGRESS
    lines = progress.read_bytes()
    assert lines.count(b"\n") == 3
    progress.write_bytes(lines[:-1] if torn == b"" else lines + torn)
    write_full(folder, make_rows(5), SHARDS)
    assert contents(folder) == whole


def test_a_durable_shard_that_vanished_is_written_again(tmp_path, fault):
    whole = contents(write_full(tmp_path / "whole", make_rows(5), SHARDS))
    folder = tmp_path / "store"
    fault(16)
    with pytest.raises(ResourceError):
        write_full(folder, make_rows(5), SHARDS)
    fault()
    (folder / "shard-00000.safetensors").unlink()
    write_full(folder, make_rows(5), SHARDS)
    assert contents(folder) == whole


def test_leftovers_of_a_killed_run_are_removed(tmp_path, fault):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / ".shard-00000.safetensors.0123abcd.tmp").write_bytes(b"half")
    write_full(folder, make_rows(5), SHARDS)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "disk full"),
        (errno.EFBIG, "file size limit"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOENT, "the folder is missing"),
        (errno.EIO, "check the disk"),
    ],
)
def test_each_complaint_of_the_system_names_file_and_remedy(tmp_path, fault, code, said):
    fault(1, OSError(code, os.strerror(code)))
    with pytest.raises(ResourceError, match=said) as raised:
        commit.write_json(tmp_path / "a.json", {"x": 1.5})
    assert "a.json" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_safetensors_own_words_for_a_full_disk_are_understood(tmp_path):
    with pytest.raises(ResourceError, match="disk full"), commit.disk_errors(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="not a folder"):
        commit.make_folder(tmp_path / "file" / "store")


def test_json_with_nan_is_never_written(tmp_path):
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            commit.write_json(tmp_path / "a.json", {"x": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_json(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said):
        commit.read_json(path)


def test_json_that_is_not_text_or_not_there(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="UTF-8"):
        commit.read_json(tmp_path / "a.json")
    with pytest.raises(ResourceError, match="cannot read"):
        commit.read_json(tmp_path / "b.json")


def test_written_files_are_plain_and_hash_as_their_bytes(tmp_path):
    import hashlib

    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    commit.write_tensors(tmp_path / "t.safetensors", {"a": tensor.t()})
    assert stat.S_ISREG((tmp_path / "t.safetensors").stat().st_mode)
    expected = hashlib.sha256(tensor.t().contiguous().numpy().tobytes()).hexdigest()
    assert commit.tensor_sha256(tensor.t()) == expected
    assert commit.tensor_sha256(torch.empty(0, 4)) == hashlib.sha256(b"").hexdigest()
    assert commit.tensor_sha256(tensor.bfloat16()) != commit.tensor_sha256(tensor)
    text = json.dumps({"é": 1})
    commit.write_text(tmp_path / "x.txt", text)
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == text


def test_a_line_after_one_that_lost_its_line_break_is_not_glued_to_it(tmp_path, fault):
    folder = tmp_path / "store"
    fault(16)
    with pytest.raises(ResourceError):
        write_full(folder, make_rows(5), SHARDS)
    progress = folder / PROGRESS
    progress.write_bytes(progress.read_bytes()[:-1])
    # Rewriting progress.jsonl takes 4 operations, the third shard 5; then the manifest cannot be written.
    hook = fault(9)
    with pytest.raises(ResourceError):
        write_full(folder, make_rows(5), SHARDS)
    assert hook.seen[-1][0] == "write"
    lines = progress.read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines[1:]] == [f"shard-0000{index}.safetensors" for index in range(3)]


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (SafetensorError("Could not read tensor x from file: Input/output error (os error 5)"), True),
        (SafetensorError("Permission denied (os error 13)"), True),
        (SafetensorError("Error while deserializing header: incomplete metadata, file not fully covered"), False),
        (OSError(errno.ENOENT, "No such file or directory"), False),
    ],
)
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, error, refused):
    expected = (
        pytest.raises(ResourceError, match=r"cannot read .*shard: \w+.*; check the disk") if refused else nullcontext()
    )
    with expected:
        commit.refuse_unread(error, tmp_path / "shard")


def test_a_checkpoint_that_cannot_be_read_is_kept(tmp_path, monkeypatch):
    """Not damaged: a later try may find it whole."""
    from nsae_cli.reporter import SilentReporter
    from nsae_cli.training import checkpoint

    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(3, {"c": {"x": torch.ones(2)}}, {"c": b"{}"})

    def fails(*_: object, **__: object) -> None:
        raise SafetensorError("Could not read tensor x from file: Input/output error (os error 5)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_file", fails)
        with pytest.raises(ResourceError, match=r"state.safetensors: Input/output error"):
            checkpoints.latest(SilentReporter())
    found = checkpoints.latest(SilentReporter())
    assert found is not None
    assert found.step == 3
