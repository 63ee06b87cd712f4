"""`nsae doctor`: what it finds, what it keeps to itself, and that nothing broken keeps it from reporting."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session, constants

from command import Outcome, nsae
from nsae_cli import __version__
from nsae_cli.doctor import examine
from nsae_cli.doctor.check import Check, ok
from nsae_cli.doctor.redaction import Redactor, shown_value
from nsae_cli.kernels.native import library
from nsae_cli.kernels.select import choose

SECTIONS = ["nsae", "packages", "machine", "torch", "devices", "kernels", "workspace", "hugging face", "environment"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and caches of this test's own."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def doctor(workspace: Path, code: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """The sections of `nsae --json doctor`."""
    outcome = nsae("--workspace", workspace, "--json", "doctor")
    assert outcome.code == code, outcome.err
    document = outcome.json
    assert (document["command"], document["artifact"]) == ("doctor", None)
    return document["result"]["sections"]


def squeezed(text: str) -> str:
    """Without white space: lines are folded in the middle of paths."""
    return "".join(text.split())


# What it finds -------------------------------------------------------------------------------------------------------


def test_text_and_json_say_the_same(tmp_path: Path) -> None:
    sections = doctor(tmp_path / "runs")
    outcome = nsae("--workspace", tmp_path / "runs", "doctor")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(sections) == SECTIONS
    text = squeezed(outcome.out)
    changing = {"cores", "memory", "disk"}
    for section, checks in sections.items():
        assert checks, section
        assert squeezed(section) in text
        for name, check in checks.items():
            assert set(check) == {"state", "found", "remedy", "values"}
            assert check["state"] in ("ok", "note", "problem")
            assert check["state"] != "problem" or check["remedy"]
            if name not in changing:
                assert squeezed(f"{name} {check['state']} {check['found']}") in text
                assert not check["remedy"] or squeezed(f"→ {check['remedy']}") in text
    assert max(map(len, outcome.out.splitlines())) <= 110
    assert not (tmp_path / "runs").exists()  # looking makes nothing
    assert list(tmp_path.iterdir()) == []


def test_values_are_those_of_this_machine(tmp_path: Path) -> None:
    sections = doctor(tmp_path)
    assert sections["nsae"]["version"]["values"]["version"] == __version__
    for name in ("torch", "transformers", "safetensors", "typer", "rich", "pydantic", "numpy", "datasets"):
        assert sections["packages"][name]["found"] == metadata.version(name)
    choice = choose("auto", "auto", torch.device(sections["devices"]["--device auto"]["values"]["device"]))
    auto = sections["kernels"]["--kernel auto"]
    assert auto["values"] == {"kernel": choice.name, "kind": choice.kind}
    assert choice.reason in auto["found"]
    assert sections["machine"]["cores"]["values"]["cores"] == os.cpu_count()
    assert sections["workspace"]["disk"]["values"]["total"] == shutil.disk_usage(tmp_path).total
    assert sections["environment"]["OMP_NUM_THREADS"]["found"] == "1"
    interpreted = sections["environment"]["TRITON_INTERPRET"]
    assert (interpreted["state"], interpreted["found"]) == ("note", "1")


def test_what_lies_in_a_workspace(tmp_path: Path) -> None:
    for mark in (
        "activations/a/manifest.json",
        "saes/one/run.json",
        "saes/group/L0/run.json",
        "saes/group/L1/run.json",
    ):
        (tmp_path / mark).parent.mkdir(parents=True)
        (tmp_path / mark).write_text("{}")
    (tmp_path / "activations/cut").mkdir()
    (tmp_path / "activations/cut/.shard-00001.safetensors.1234abcd.tmp").write_bytes(bytes(3000))
    checkpoint = tmp_path / "saes/group/checkpoints/step-5.tmp-12ab"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(bytes(1000))
    (tmp_path / "error.log").write_text("Traceback")
    (tmp_path / "saes/.one.lock").touch()
    with (tmp_path / "activations/.cut.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = doctor(tmp_path)["workspace"]
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (tmp_path / "saes/.one.lock").unlink()
        only_held = doctor(tmp_path)["workspace"]["locks"]
    assert found["folder"]["values"] == {"path": str(tmp_path), "exists": True, "writable": True}
    complete, unfinished = found["artifacts"]["values"].values()
    assert (complete["activations"], complete["saes"], sum(complete.values())) == (1, 3, 4)
    assert (unfinished["activations"], sum(unfinished.values())) == (1, 1)
    assert found["artifacts"]["state"] == "note"
    assert found["leftovers"]["values"] == {"number": 2, "bytes": 4000}
    assert "error.log" in found["error.log"]["remedy"]
    if sys.platform == "linux":  # where the system tells who holds a lock
        assert found["locks"]["found"].startswith("1 of 2 not held")
        assert (only_held["state"], only_held["values"]) == ("ok", {"files": 1, "held": 1})


def test_calibration(tmp_path: Path) -> None:
    file = tmp_path / "cache/nsae/crossovers.json"
    default = doctor(tmp_path)["kernels"]["cross-over"]
    assert "the default" in default["found"]
    file.parent.mkdir(parents=True)
    file.write_text("[{]")
    damaged = doctor(tmp_path)["kernels"]["cross-over"]
    assert damaged["state"] == "note"
    assert "cannot be read" in damaged["found"]
    here = choose("auto", "auto", torch.device("cpu"))
    from nsae_cli.kernels import calibration

    file.unlink()
    calibration.save_points([calibration.Point(calibration.machine(here.device), here.kind, 768, 6144, 0.125)])
    hour = 3600
    os.utime(file, (time.time() - 72 * hour,) * 2)
    if not torch.cuda.is_available():
        measured = doctor(tmp_path)["kernels"]["cross-over"]
        assert "below 12.5 % active" in measured["found"]
        assert "3 days ago" in measured["found"]
        assert measured["values"]["age_days"] == pytest.approx(3, abs=0.01)
    calibration.save_points([calibration.Point("another machine", here.kind, 768, 6144, 0.5)])
    file.write_text(file.read_text().replace(calibration.machine(here.device), "a third"))
    elsewhere = doctor(tmp_path)["kernels"]["cross-over"]
    assert (elsewhere["state"], elsewhere["values"]["density"]) == ("note", default["values"]["density"])


# What is broken ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["file/runs", "file"])
def test_workspace_below_a_file(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    folder = doctor(tmp_path / where, code=4)["workspace"]["folder"]
    assert folder["state"] == "problem"
    outcome = nsae("--workspace", tmp_path / where, "doctor")
    assert outcome.code == 4
    assert outcome.out.startswith("nsae")
    [line] = outcome.err.splitlines()
    assert line.startswith("nsae: nsae cannot work here: workspace, folder: ")
    assert f"{tmp_path / 'file'} is a file" in line
    assert "--workspace" in line


def test_workspace_that_cannot_be_made() -> None:
    # Not even the superuser makes files there.
    folder = doctor(Path("/proc/nsae/runs"), code=4)["workspace"]["folder"]
    assert "/proc/nsae/runs: " in folder["found"]
    assert "write in /proc" in folder["found"]
    assert folder["values"]["writable"] is False


@pytest.fixture
def native_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the compiled loops are looked for; empty."""
    folder = tmp_path / "native"
    folder.mkdir()
    monkeypatch.setattr(library, "__file__", str(folder / "library.py"))
    library.load.cache_clear()
    yield folder
    monkeypatch.undo()
    library.load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="--kernel auto is about the GPU here")
def test_broken_kernel_library(native_folder: Path, tmp_path: Path) -> None:
    missing = doctor(tmp_path)["kernels"]
    assert missing["compiled loops"]["state"] == "note"
    assert "reinstall" in missing["compiled loops"]["remedy"]
    assert missing["--kernel auto"]["values"]["kind"] == "torch"
    (native_folder / "_sparse_step.garbage.so").write_bytes(b"\x7fELF" + bytes(100))
    foreign = find_spec("safetensors._safetensors_rust")
    assert foreign is not None
    assert foreign.origin is not None
    shutil.copy(foreign.origin, native_folder / "_sparse_step.other.so")
    library.load.cache_clear()
    broken = doctor(tmp_path)["kernels"]  # exit code 0: nsae works without them
    garbage, other = broken["compiled loops"]["values"]["reasons"]
    assert garbage.startswith("_sparse_step.garbage.so: ")
    assert other == "_sparse_step.other.so: it is no library of nsae's"
    assert broken["compiled loops"]["state"] == "problem"
    assert broken["--kernel auto"]["values"]["kind"] == "torch"


def test_packages_that_are_old_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def installed(name: str) -> str:
        if name == "plotly":
            raise metadata.PackageNotFoundError(name)
        return {"rich": "13.9.4", "torch": "2.10.0+cpu"}.get(name) or version(name)

    monkeypatch.setattr(metadata, "version", installed)
    packages = doctor(tmp_path, code=4)["packages"]
    assert packages["rich"]["found"] == "13.9.4; nsae needs >=14"
    assert packages["rich"]["remedy"] == "pip install 'rich>=14'"
    assert packages["rich"]["state"] == packages["plotly"]["state"] == "problem"
    assert packages["torch"]["state"] == "ok"
    monkeypatch.setattr(metadata, "version", lambda name: "13.9.4" if name == "rich" else version(name))
    assert doctor(tmp_path)["packages"]["rich"]["state"] == "problem"  # and nsae may still work


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Iterator[Check]:
        yield ok("first", "fine")
        raise ZeroDivisionError("of\nseveral lines")

    monkeypatch.setattr(examine, "look_at_machine", look)
    machine = doctor(tmp_path)["machine"]
    assert machine["first"]["state"] == "ok"
    assert machine["machine"]["found"] == "could not be looked at: ZeroDivisionError: of"
    assert machine["machine"]["state"] == "problem"


def process(*arguments: object, code: str = "", **environment: str) -> Outcome:
    """`nsae` as a process of its own, after `code`."""
    main = f"{code}\nfrom nsae_cli.cli.app import main; main()"
    words = [sys.executable, "-c", main, *(str(argument) for argument in arguments)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | environment, timeout=120
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "broken/torch").mkdir(parents=True)
    (tmp_path / "broken/torch/__init__.py").write_text("raise OSError('libtorch_cpu.so: wrong ELF class')")
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])
    outcome = process("--json", "doctor", PYTHONPATH=path, HF_HUB_OFFLINE="1")
    assert outcome.code == 4
    [line] = outcome.err.splitlines()
    assert line.startswith("nsae: nsae cannot work here: torch, build: cannot be imported: OSError: libtorch_cpu.so")
    sections = outcome.json["result"]["sections"]
    assert list(sections) == SECTIONS
    assert sections["machine"]["processor"]["state"] == "ok"
    problems = [name for checks in sections.values() for name, check in checks.items() if check["state"] == "problem"]
    assert problems == ["build"]


# The hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """What the report says of a hub at an address."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    close_session()

    def asked(endpoint: str) -> dict[str, Any]:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        return doctor(tmp_path)["hugging face"]["hub"]

    return asked


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (401, True), (503, False)])
def test_hub_that_answers(ask: Callable[[str], dict[str, Any]], status: int, reachable: bool) -> None:
    headers: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            headers.extend(self.headers)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = ask(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert hub["values"]["reachable"] is reachable
    assert hub["state"] == ("ok" if reachable else "note")
    assert "authorization" not in map(str.lower, headers)


def test_hub_that_is_not_there(ask: Callable[[str], dict[str, Any]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        mute = ask(address)
    assert mute["state"] == "note"
    assert mute["values"]["reachable"] is False
    closed = ask(address)
    assert "is not reachable (ConnectError" in closed["found"]


_NAMES_HANG = "import socket, time; socket.getaddrinfo = lambda *a, **k: time.sleep(100)"


def test_name_service_that_hangs(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = process(
        "--workspace", tmp_path, "--json", "doctor", code=_NAMES_HANG, HF_HUB_OFFLINE="0", NO_PROXY="*", no_proxy="*"
    )  # fmt: skip
    assert (outcome.code, outcome.err) == (0, "")
    assert "no answer in 2.5 s" in outcome.json["result"]["sections"]["hugging face"]["hub"]["found"]
    assert time.monotonic() - started < 60  # the process ends, too


def test_offline_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor(tmp_path)["hugging face"]
    assert found["hub"]["values"] == {"reachable": None}
    assert "offline" in found["hub"]["found"]
    assert found["cache"]["values"]["exists"] is False
    assert found["token"]["values"] == {"present": False}
    blobs = tmp_path / "hub/models--a--b/blobs"
    blobs.mkdir(parents=True)
    (blobs / "1").write_bytes(bytes(5000))
    (blobs / "again").symlink_to("1")
    (tmp_path / "token").write_text("hf_abcdefghijklmnop")
    found = doctor(tmp_path)["hugging face"]
    assert found["cache"]["values"] | {"path": ""} == {
        "path": "", "exists": True, "bytes": 5000, "counted_whole": True, "repositories": 1
    }  # fmt: skip
    assert found["token"]["values"] == {"present": True}


# What it keeps to itself ---------------------------------------------------------------------------------------------


def test_no_secret_and_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "homes/carlotta"
    (home / "runs").mkdir(parents=True)
    environment = {
        "HOME": str(home),
        "LOGNAME": "carlotta",
        "USER": "carlotta",
        "NSAE_WORKSPACE": str(home / "runs"),
        "HF_HOME": str(home / "models"),
        "HF_TOKEN": "hf_QwErTyUiOpAsDf",
        "NSAE_API_KEY": "topsecretvalue",
        "HTTPS_PROXY": "http://carlotta:hunter22@proxy.example:3128",
        "TORCH_HOME": "/scratch/carlotta/torch",
        "HF_DATASETS_CACHE": f"{home}\n\x1b[31mdata",
        "HF_MIRROR": "https://someone:hunter22@mirror.example",
        "OMP_DISPLAY": "hf_ZxCvBnMaSdFgHj",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "models/hub"))
    report = nsae("--json", "doctor")
    text = nsae("doctor")
    assert (report.code, text.code) == (0, 0)
    (home / "runs").rmdir()
    (home / "runs").touch()
    refused = nsae("doctor")
    assert refused.code == 4
    for shown in (report.out, squeezed(text.out), refused.err, squeezed(refused.out)):
        for secret in ("carlotta", "QwErTy", "topsecret", "hunter22", "someone", "ZxCvBn", str(home), "\x1b"):
            assert secret not in shown
    sections = report.json["result"]["sections"]
    assert sections["workspace"]["folder"]["values"]["path"] == "~/runs"
    assert sections["environment"]["NSAE_WORKSPACE"]["found"] == "~/runs"
    assert sections["environment"]["HF_TOKEN"]["found"] == "set, not shown"
    assert sections["environment"]["HTTPS_PROXY"]["found"] == "set, not shown"
    assert sections["environment"]["TORCH_HOME"]["found"] == "/scratch/~/torch"
    assert sections["hugging face"]["token"]["found"] == "yes, in HF_TOKEN"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/eve", "~"),
        ("/home/eve/x, /home/eve:/home/eve/y", "~/x, ~:~/y"),
        ("/home/evelyn/x", "/home/evelyn/x"),
        ("/data/eve/x", "/data/~/x"),
        ("/tmp/pytest-of-eve/x", "/tmp/pytest-of-~/x"),
        ("/tmp/eve.cache/x", "/tmp/~.cache/x"),
        ("every eve", "every eve"),
        ("eve@host", "eve@host"),
        ("https://u:p@host/x", "https://…@host/x"),
        ("hf_abcdefgh1", "hf_…"),
    ],
)  # fmt: skip
def test_redaction(text: str, expected: str) -> None:
    assert Redactor(["/home/eve", "/"], "eve").text(text) == expected
    assert Redactor(["/home/eve", "/"], "eve").value({"k": [text, 1, None]}) == {"k": [expected, 1, None]}


def test_names_that_tell_nothing_stay() -> None:
    assert Redactor([], "root").text("/root/x") == "/root/x"
    assert Redactor([], None).text("/home/eve") == "/home/eve"
    assert shown_value("OMP_NUM_THREADS", "4\n") == "4?"
    assert shown_value("TORCH_LOGS", "x" * 1000) == "x" * 299 + "…"
    assert json.dumps(shown_value("MY_TOKEN", "abc")) == '"set, not shown"'
