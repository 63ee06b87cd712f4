"""Files that are damaged or made to harm: refused in one line, quickly, and nothing outside their folder is touched.

``NSAE_MUTANTS=10000`` in the environment runs the full number of mutants.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import make_targets, run_mutants

from command import nsae
from hand_store import HOOK, make_rows, write_foreign, write_full
from nsae_cli.errors import ArtifactError, NsaeError, UsageError
from nsae_cli.interop.hub import HubReference
from nsae_cli.interop.opening import open_sae
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.commit import MAX_JSON_BYTES, read_json
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.training.checkpoint import Checkpoints
from sealed_json import edit_json

SMALL = ("--corpus", "builtin", "--tokens", "2k", "--device", "cpu")
#: Names that leave a folder, or are more than a name. The canary lies where the first ones lead.
HOSTILE_NAMES = [
    "../canary", "../../canary", "../../../canary", "..", ".", "", "/etc/passwd", "//etc/passwd", "/dev/zero",
    "/dev/stdin", "/proc/self/environ", "a/b", "a/../../canary", "./canary", "~", "~root/x", "~/.ssh/id_rsa",
    "C:\\x.safetensors", "C:x", "\\\\host\\share\\x", "..\\canary", "a\\b", "file:///etc/passwd",
    "http://host/x", "%2e%2e/canary", "%2e%2e%2fcanary", "..%2fcanary", "a\x00b", "a\nb", "a\rb", "\x1b[2J",
    ".hidden", "-rf", "shärd", "．．/canary", "$HOME", "`id`", "a b", "x" * 4096, "\u202ecanary", "nul\u2028",
]  # fmt: skip


def seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    with pytest.raises(NsaeError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return time.perf_counter() - started


def read_all(folder: Path) -> None:
    store = open_activations(folder)
    for shard in range(len(store.manifest.shards)):
        store.read(shard, store.manifest.hooks)


def test_mutants(tmp_path: Path) -> None:
    number = int(os.environ.get("NSAE_MUTANTS", "1400"))
    tally = run_mutants(number, int(os.environ.get("NSAE_MUTANTS_SEED", "0")), make_targets(tmp_path))
    assert not tally.wrong, tally.wrong[:10]
    assert sum(tally.mutants.values()) > 0.9 * number
    assert sum(tally.refused.values()) > 0.5 * number
    assert tally.verified > number / 20


@pytest.mark.parametrize("own", [True, False])
def test_a_shard_of_any_smaller_length_is_refused(tmp_path: Path, own: bool) -> None:
    write = write_full if own else write_foreign
    folder = write(tmp_path / "s", make_rows(2), [16])
    [path] = folder.glob("*.safetensors")
    content = path.read_bytes()
    if own:
        edit_json(folder / "manifest.json", command={"name": "collect", "options": {}})
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError) as raised:
            read_all(folder)
        if own:
            assert f"{length:,} bytes, expected {len(content):,}" in str(raised.value)
            assert "only this shard is made anew" in str(raised.value)


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F16") -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


_ROWS = 2 * 4 * 2  # two rows of four float16
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x00" * 7,
    "a pickle": pickle.dumps({"a": 1}),
    **{
        f"header of {size}": header(b"{}", length=size)
        for size in (0, 1, 99_999_999, 100_000_001, 2**63 - 1, 2**64 - 1)
    },
    "header is a list": header("[]"),
    "header is no JSON": header("{" * 50),
    "header nested deeply": header('{"a":' * 20_000 + "1" + "}" * 20_000),
    "overlapping": header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}, "b": {entry(8, 24, [2, 4])}}}', b"\0" * 24),
    "a hole": header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}, "b": {entry(24, 40, [2, 4])}}}', b"\0" * 40),
    "trailing bytes": header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}}}', b"\0" * 17),
    "too short": header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}}}', b"\0" * 15),
    "offsets backwards": header(f'{{"{HOOK}": {entry(16, 0, [2, 4])}}}', b"\0" * 16),
    "offsets negative": header(f'{{"{HOOK}": {entry(-16, 0, [2, 4])}}}', b"\0" * 16),
    "shape and offsets differ": header(f'{{"{HOOK}": {entry(0, 16, [3, 4])}}}', b"\0" * 16),
    "shape overflows": header(f'{{"{HOOK}": {entry(0, 16, [2**62, 2**62, 4])}}}', b"\0" * 16),
    "unknown dtype": header(f'{{"{HOOK}": {entry(0, 16, [2, 4], "Q99")}}}', b"\0" * 16),
    "metadata is a number": header(f'{{"__metadata__": {{"a": 1}}, "{HOOK}": {entry(0, 16, [2, 4])}}}', b"\0" * 16),
    "another name": header(f'{{"b": {entry(0, 16, [2, 4])}}}', b"\0" * 16),
    "not UTF-8": header(b'{"\xff\xfe": ' + entry(0, 16, [2, 4]).encode() + b"}", b"\0" * 16),
}


def malformed_store(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(content)
    manifest = {"format_version": 1, "hooks": [HOOK], "d_in": 4, "dtype": "float16", "rows": 2}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [{"file": "x.safetensors", "rows": 2}]}))
    return folder


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_safetensors(tmp_path: Path, name: str) -> None:
    folder = malformed_store(tmp_path / "s", MALFORMED[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert seconds(lambda: read_all(folder)) < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_the_malformed_files_are_near_a_right_one(tmp_path: Path) -> None:
    """The helper that they are made with makes a file that is read, so that it is their fault that is refused."""
    right = header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}}}', torch.arange(8, dtype=torch.float16).numpy().tobytes())
    store = open_activations(malformed_store(tmp_path / "s", right))
    assert store.read(0, [HOOK])[HOOK].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_hundred_thousand_tiny_tensors_and_a_name_twice(tmp_path: Path) -> None:
    """Both are valid to safetensors: what is asked for comes back, or nothing does, and soon."""
    tiny = "".join(f', "t{number}": {entry(16 + number, 17 + number, [1], "U8")}' for number in range(100_000))
    ones = torch.ones(8, dtype=torch.float16).numpy().tobytes()
    content = header(f'{{"{HOOK}": {entry(0, 16, [2, 4])}{tiny}}}', ones + b"\0" * 100_000)
    folder = malformed_store(tmp_path / "many", content)
    started = time.perf_counter()
    assert bool((open_activations(folder).read(0, [HOOK])[HOOK] == 1).all())
    assert time.perf_counter() - started < 2
    twice = f'{{"{HOOK}": {entry(0, 16, [2, 4])}, "{HOOK}": {entry(16, 32, [2, 4])}}}'
    folder = malformed_store(tmp_path / "twice", header(twice, b"\0" * 32))
    with pytest.raises(ArtifactError):
        read_all(folder)


def test_json_that_is_too_large_is_not_even_read(tmp_path: Path) -> None:
    folder = write_full(tmp_path / "s", make_rows(2), [16])
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert seconds(lambda: open_activations(folder)) < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024
    with pytest.raises(ArtifactError, match=f"at most {MAX_JSON_BYTES:,}"):
        read_json(folder / "manifest.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000 + "]" * 200_000, "not valid JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "not valid JSON"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"a": 1, "checksum": "0"}', "checksum differs"),
        ('{"a": 1, "files": {}}', "checksum differs"),
        ('{"a": 1, "checksum": null}', "checksum differs"),
    ],
)
def test_json_made_to_harm(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said):
        read_json(path)


def test_a_pipe_for_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert seconds(lambda: read_json(tmp_path / "a.json")) < 0.5


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file outside, and inside `tmp_path/runs/…` a place to lead there from; nothing may open, change or list it."""
    path = tmp_path / "canary"
    path.write_text("secret")
    opened: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and _watching and str(arguments[0]).endswith("canary"):
            opened.append(str(arguments[0]))

    _watching.append(True)
    sys.addaudithook(audit)
    yield path
    _watching.clear()
    assert opened == []
    assert path.read_text() == "secret"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["canary", "runs"]


_watching: list[bool] = []


def test_hostile_shard_names(tmp_path: Path, canary: Path) -> None:
    assert len(HOSTILE_NAMES) >= 30
    folder = write_full(tmp_path / "runs" / "activations" / "s", make_rows(2), [16])
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    for name in HOSTILE_NAMES:
        edit_json(folder / "manifest.json", shards=[shards[0] | {"file": name}])
        assert seconds(lambda: read_all(folder)) < 1


def test_hostile_names_in_a_seal(tmp_path: Path, canary: Path) -> None:
    """`nsae verify` reads the files that the JSON names, and no others."""
    folder = tmp_path / "runs" / "audits" / "a"
    folder.mkdir(parents=True)
    for name in HOSTILE_NAMES:
        (folder / "audit.json").write_text('{"format_version": 1, "files": {}, "checksum": ""}')
        edit_json(folder / "audit.json", files={name: "0" * 64})
        outcome = nsae("--workspace", tmp_path / "runs", "verify")
        assert outcome.code == 3, name
        assert "1 finding of damage" in outcome.err


def test_hostile_names_in_a_checkpoint(tmp_path: Path, canary: Path) -> None:
    """Cells are names of tensors there; none becomes a path, and a folder that is no step is no checkpoint."""
    checkpoints = Checkpoints(tmp_path / "runs" / "checkpoints")
    checkpoints.begin({})
    for number, name in enumerate(name for name in HOSTILE_NAMES if "\x00" not in name):
        checkpoints.save(number, {name: {"W": torch.zeros(1)}}, {name: b""})
        files = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
        assert files == {"canary", "runs"}
    (checkpoints.folder / "step-..").mkdir()
    (checkpoints.folder / "step-1e3").mkdir()
    assert len(checkpoints.steps()) == 2
    assert checkpoints.latest(SilentReporter()) is not None


def test_hostile_names_that_an_artifact_records(tmp_path: Path, canary: Path) -> None:
    workspace = Workspace(tmp_path / "runs")
    write_full(workspace.folder(Kind.ACTIVATIONS, "s"), make_rows(2), [16])
    for name in [*HOSTILE_NAMES, "../activations/s", None, 3, ["s"]]:
        with pytest.raises(UsageError) as raised:
            workspace.find_recorded(Kind.ACTIVATIONS, name)
        assert "\n" not in str(raised.value).replace(str(name), "")


def test_hostile_names_on_the_hub(tmp_path: Path, canary: Path) -> None:
    """What is not a plain repository and folder is no hub reference, so that nothing is asked for or written."""
    (tmp_path / "runs").mkdir()
    for name in HOSTILE_NAMES:
        for reference in (name, f"org/{name}", f"org/repo:{name}"):
            parsed = HubReference.parse(reference)
            if parsed is not None:
                assert ".." not in Path(parsed.folder).parts
                assert not Path(parsed.folder).is_absolute()
                assert parsed.repository.count("/") == 1


# Pickles -------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("name", [
    "sae.pt", "ae.pt", "8.pth", "sae.bin", "sae.pkl", "sae.pickle", "sae.ckpt", "sae.npz", "sae.npy",
    "pytorch_model.bin", "sae_weights.safetensors", "sae.safetensors", "ae.safetensors", "openai.safetensors",
])  # fmt: skip
def test_no_pickle_is_opened_as_an_sae(tmp_path: Path, name: str) -> None:
    gone_off = tmp_path / "gone-off"
    folder = tmp_path / "sae"
    folder.mkdir()
    config = {"architecture": "standard", "d_in": 4, "d_sae": 8, "metadata": {"sae_lens_version": "6.0.0"}}
    for beside in ("cfg.json", "config.json", "openai.json"):
        (folder / beside).write_text(json.dumps(config))
    (folder / name).write_bytes(pickle.dumps(Bomb(gone_off)))
    for reference in (folder, folder / name):
        with pytest.raises(NsaeError) as raised:
            open_sae(str(reference))
        assert "\n" not in str(raised.value)
    assert not gone_off.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.ckpt.index", "tf_model.h5"])
def test_no_pickle_is_opened_as_a_model(tmp_path: Path, name: str) -> None:
    from nsae_cli.assets import model_dir

    gone_off, folder = tmp_path / "gone-off", tmp_path / "model"
    shutil.copytree(model_dir("mini"), folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(gone_off)))
    outcome = nsae("--workspace", tmp_path / "runs", "collect", "--model", folder, *SMALL)
    assert outcome.code == 3
    assert outcome.message
    assert not gone_off.exists()


def test_no_pickle_is_opened_as_a_shard_a_corpus_or_a_configuration(tmp_path: Path) -> None:
    gone_off, bomb = tmp_path / "gone-off", pickle.dumps(Bomb(tmp_path / "gone-off"))
    folder = write_full(tmp_path / "s", make_rows(2), [16])
    (folder / "shard-00000.safetensors").write_bytes(bomb)
    with pytest.raises(ArtifactError):
        read_all(folder)
    for suffix in (".pkl", ".jsonl", ".txt", ".parquet", ".yaml"):
        (tmp_path / f"x{suffix}").write_bytes(bomb)
        command = ("run",) if suffix == ".yaml" else ("collect", "--model", "mini", "--tokens", "2k", "--corpus")
        outcome = nsae("--workspace", tmp_path / "runs", *command, tmp_path / f"x{suffix}")
        assert outcome.code in (2, 3, 4), (suffix, outcome.err)
        assert outcome.message
    tag = tmp_path / "tag.yaml"
    tag.write_text(
        f"stages: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{gone_off}]]"
    )
    assert nsae("run", tag).code == 2
    assert not gone_off.exists()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    """With a memory map the process would die of SIGBUS."""
    folder = write_foreign(tmp_path / "s", make_rows(200), [1600])
    store = open_activations(folder)

    def read() -> None:
        with store._open(0) as file:
            os.truncate(folder / "part0.safetensors", 400)
            file.get_tensor(HOOK)

    with pytest.raises(ArtifactError, match="not a readable"):
        read()


# Code ----------------------------------------------------------------------------------------------------------------


def test_nothing_that_runs_calls_pickle_or_evaluates_text(tmp_path: Path) -> None:
    """A whole chain under an audit hook: what executes code or unpickles is never nsae's own code."""
    script = Path(__file__).with_name("audited.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0, 0, 0, 0]
    assert found["by_nsae"] == []
    assert found["unpickled"] == []
