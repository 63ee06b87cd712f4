"""The full set of faults, in parts that resume: ``python tests/faults/torture.py`` (`make torture`).

Each part runs in a process of its own, two at a time, and leaves its counts in ``results/PART.json``. A part that has
been done with the same code is not done again. At the end the table in docs/reliability.md is made anew. The exit code
is 1 if any promise was broken.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lm"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import crash_points
import cut_points
import full_disk
import power_cut
import races
import signals
import stages as stages_module
import state_items
import torture_table
import workers
from forked import Server
from stages import Prepared, Stages
from tally import Tally

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"

Part = Callable[[Server, Stages, Path], list[Tally]]

_KILLED = {"collect": False, "norms": False, "train": False, "train grid": True, "analyze-top-norms": False}
_KILLS, _DOUBLE_KILLS = 200, 10
_ON_DISKS = ("collect", "norms", "train", "analyze-top-norms")
_UNPLUGGED = {"collect": 1, "norms": 1, "train": 1, "train grid": 3, "alter": 2, "eval": 1, "train from model": 2}


def _operations(prepared: Prepared) -> int:
    return len(prepared.undisturbed.operations)


def _death(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [crash_points.die_at_every_operation(server, stages.get(name), folder, how="kill")]


def _second_death(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    prepared = stages.get(name)
    last = _operations(prepared)
    pairs = [(1 + last * n // 10, 1 + (last * m) // 7) for n in range(10) for m in range(5)]
    return [crash_points.die_twice(server, prepared, folder, pairs)]


def _kills(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    prepared = stages.get(name)
    resuming = _KILLED[name]
    kill = functools.partial(crash_points.kill_at_random_times, server, prepared, folder, resuming=resuming)
    return [kill(trials=_KILLS, seed=1), kill(trials=_DOUBLE_KILLS, seed=2, deaths=2)]


def _torn_log(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [crash_points.tear_the_log(server, stages.get("train"), folder)]


def _disk_full(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [full_disk.fail_at_every_operation(server, stages.get(name), folder)]


def _disk_fails(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    import errno

    fail = functools.partial(full_disk.fail_at_every_operation, server, stages.get(name), folder, lasting=False)
    return [fail(errno.EIO, kinds=["fsync"]), fail(errno.ENOSPC)]


def _small_disks(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [full_disk.fill_small_file_systems(server, stages.get(name), folder, sizes=20) for name in _ON_DISKS]


def _broken_reads(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    from broken_reads import Read, fail_reads

    store, shard = "activations/acts/", "activations/acts/shard-00003.safetensors"
    norms, trained, analysed = stages.get("norms"), stages.get("train"), stages.get("analyze-top-norms")
    tallies = [
        fail_reads(norms, norms.start, folder, [Read(f"{store}manifest.json", "read"), Read(shard, "pread64", 1),
                                                Read(shard, "pread64", 2), Read(shard, "pread64", 3)]),
        fail_reads(trained, trained.start, folder, [Read(shard, "pread64", number) for number in (1, 2)]),
    ]  # fmt: skip
    stopped = trained.begin(folder)
    server.run(trained.trial(stopped, fault={"at": _operations(trained) * 3 // 4, "how": "kill"}))
    newest = max(stopped.glob("saes/one/checkpoints/step-??/files.json")).parent.name  # steps of two digits
    state = f"saes/one/checkpoints/{newest}/state.safetensors"
    reads = [
        Read(state, "read"),
        Read(state, "pread64", 1),
        Read(state, "pread64", 9),
        Read("saes/one/checkpoints/begun.json", "read"),
    ]
    tallies.append(fail_reads(trained, stopped, folder, reads))
    weights = "saes/grid/L2-relu/sae_weights.safetensors"
    reads = [Read(weights, "pread64", 1), Read(weights, "pread64", 3), Read("saes/grid/L2-relu/run.json", "read")]
    return [*tallies, fail_reads(analysed, analysed.start, folder, reads)]


def _file_sizes(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    sizes = [int(4096 * 1.35**n) for n in range(12)]
    return [full_disk.limit_file_size(server, stages.get(name), folder, sizes) for name in ("collect", "train")]


def _order(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [power_cut.order_of_operations(stages.get(name)) for name in stages_module.STAGES]


def _power(name: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    prepared = stages.get(name)
    points = range(1, _operations(prepared) + 1, _UNPLUGGED[name])
    return [power_cut.cut_power(server, prepared, folder, points, outcomes=3, seed=0)]


def _clock(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    names = ("collect", "train", "train grid")
    return [
        power_cut.turn_clock_back(server, stages.get(name), folder, range(1, _operations(stages.get(name)), 8))
        for name in names
    ]


def _signals(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return signals.signal_phases(server, stages, folder, signals.PHASES, each=10)


def _more_signals(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    steps = [phase for phase in signals.PHASES if phase.name == "train step"]
    groups = signals.signal_phases(server, stages, folder, steps, each=10, threads=2)
    return [*groups, signals.signal_twice(server, stages, folder, trials=20)]


def _cuts(method: str, server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return [cut_points.cut_and_go_on(folder, method, dtype) for dtype in cut_points.DTYPES]


def _items(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    return state_items.change_items(server, stages, folder, list(stages_module.TRAINED))


def _races(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    race = functools.partial(races.race_for_one_folder, server, folder=folder, races=100)
    return [
        race(prepared=stages.get("collect")),
        race(prepared=stages.get("train")),
        races.read_while_it_is_written(server, stages, folder, races=100),
    ]


def _workers(server: Server, stages: Stages, folder: Path) -> list[Tally]:
    collect = stages.get("collect")
    worlds = [(first, second) for first in range(1, 5) for second in range(1, 5) if first != second]
    return [
        workers.die_at_every_operation(server, collect, folder, world=3),
        workers.go_on_in_another_world(server, collect, folder, worlds),
    ]


def parts() -> dict[str, Part]:
    """Every part by its name, the long ones first so that two at a time end about together."""
    found: dict[str, Part] = {}
    by_length = ["analyze-top-norms", *(name for name in stages_module.STAGES if name != "analyze-top-norms")]
    found |= {f"random-kills {name}": functools.partial(_kills, name) for name in sorted(_KILLED)}
    for what, part in (("death", _death), ("disk-full", _disk_full)):
        found |= {f"{what} {name}": functools.partial(part, name) for name in by_length}
    found |= {f"power-cut {name}": functools.partial(_power, name) for name in _UNPLUGGED}
    found |= {f"disk-fails {name}": functools.partial(_disk_fails, name) for name in ("train", "collect", "norms")}
    found |= {f"second-death {name}": functools.partial(_second_death, name) for name in ("train", "collect")}
    found |= {f"stopped {method}": functools.partial(_cuts, method) for method in cut_points.METHODS}
    found |= {
        "torn-log": _torn_log, "signals": _signals, "more-signals": _more_signals, "races": _races, "items": _items,
        "small-disks": _small_disks, "file-sizes": _file_sizes, "order": _order, "clock": _clock,
        "broken-reads": _broken_reads, "workers": _workers,
    }  # fmt: skip
    return found


#: The part that is a program of its own.
MUTANTS = "mutants"
_MUTANTS = 12_000


def code_hash() -> str:
    """What identifies the code that was tried: the package and the faults."""
    digest = hashlib.sha256()
    package = ROOT / "src" / "nsae_cli"
    files = [path for pattern in ("*.py", "*.c", "*.h") for path in package.rglob(pattern)]
    for path in sorted([*files, *HERE.glob("*.py")]):
        if path.name == "torture_table.py" or path.name.startswith(("test_", "try")):
            continue
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str:
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()


def result_path(part: str) -> Path:
    """Where a part leaves its counts."""
    return RESULTS / f"{part.replace(' ', '-')}.json"


def is_done(part: str, code: str) -> bool:
    """Whether the part has been run with this code, and nothing was wrong."""
    path = result_path(part)
    if not path.is_file():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    return bool(result["code"] == code and all(row["held"] == row["tried"] for row in result["rows"]))


def run_part(part: str) -> None:
    """Runs one part in this process and writes its result."""
    started, code = time.monotonic(), code_hash()
    with tempfile.TemporaryDirectory(prefix="nsae-torture-") as scratch:
        folder = Path(scratch)
        if part == MUTANTS:
            rows = _run_mutants()
        else:
            (folder / "trials").mkdir()
            with Server(folder / "server") as server:
                tallies = parts()[part](server, Stages(server, folder / "stages"), folder / "trials")
            rows = [tally.to_json() for tally in tallies]
    result: dict[str, Any] = {
        "part": part, "code": code, "commit": _commit(), "seconds": round(time.monotonic() - started), "rows": rows,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    temporary = result_path(part).with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(result_path(part))


def _run_mutants() -> list[dict[str, Any]]:
    """`mutants.py` as a program; its counts as rows."""
    command = [sys.executable, str(HERE / "mutants.py"), str(_MUTANTS), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    result = json.loads(done.stdout)
    return [
        {
            "what": "a damaged or edited file is read",
            "stage": "all readers",
            "tried": result["mutants"],
            "held": result["mutants"] - result["wrong"],
            "counts": {
                "refused": result["refused"],
                "read with the same values": result["same_values"],
                "shown by nsae verify": result["found_by_verify"],
            },
            "most": {"seconds to the answer": result["slowest_seconds"]},
            "problems": result["examples"],
        }
    ]


def run_all(names: list[str], jobs: int) -> bool:
    """Runs parts in processes of their own, several at a time; whether all of them ran and held."""
    code = code_hash()
    waiting = [name for name in names if not is_done(name, code)]
    print(f"{len(names) - len(waiting)} of {len(names)} parts are done already", flush=True)

    def run(name: str) -> bool:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, __file__, "--part", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: failed\n{done.stderr[-2000:]}", flush=True)
            return False
        result = json.loads(result_path(name).read_text(encoding="utf-8"))
        tried, held = (sum(row[key] for row in result["rows"]) for key in ("tried", "held"))
        print(f"{name}: {held} of {tried} in {result['seconds']} s", flush=True)
        for row in result["rows"]:
            for problem in row["problems"]:
                print(f"  {row['what']}, {row['stage']}: {problem}", flush=True)
        return bool(held == tried)

    with ThreadPoolExecutor(jobs) as pool:
        return all(list(pool.map(run, waiting)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time")
    parser.add_argument("--only", metavar="TEXT", help="parts whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        run_part(given.part)
        return
    names = [name for name in (*parts(), MUTANTS) if given.only is None or given.only in name]
    if given.list:
        print("\n".join(names))
        return
    well = run_all(names, given.jobs)
    torture_table.write(RESULTS)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
