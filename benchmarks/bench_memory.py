"""Peak memory of `nsae collect` and `nsae train` on 1 × and 8 × the tokens.

    python benchmarks/bench_memory.py                # about three minutes on one core
    python benchmarks/bench_memory.py --tokens 200k

Each command runs in a process of its own on a small random GPT-2 with two stored layers; what is reported is the
process's largest resident set (`ru_maxrss`). If memory grew with the tokens, the second run of a command would be
larger by about the difference of the stores. A row of `data/memory.csv` per command and size.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

CSV = Path(__file__).parent / "data" / "memory.csv"
MULTIPLES = (1, 8)
BUFFER = "32768"


def make_model(folder: Path) -> None:
    """A random GPT-2 of width 128 with the tokenizer of the embedded model."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    import nsae_cli.assets

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(Path(nsae_cli.assets.__file__).parent / "mini")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=128, n_layer=2, n_head=4)
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(*arguments: str) -> tuple[float, float]:
    """Runs `nsae` with these arguments and returns its peak resident MiB and its seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-c", "from nsae_cli.cli.app import main; main()", "-q", *arguments]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)])
    _, status, usage = os.wait4(process, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"nsae {' '.join(arguments)} failed")
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return usage.ru_maxrss / unit, time.perf_counter() - began


def measure(base_tokens: int, workspace: Path, model: Path) -> list[dict[str, object]]:
    """A row per command and size."""
    rows: list[dict[str, object]] = []
    for multiple in MULTIPLES:
        tokens, name = str(base_tokens * multiple), f"x{multiple}"
        root = ("--workspace", str(workspace))
        collect = ("--model", str(model), "--corpus", "builtin", "--layers", "all", "--tokens", tokens)
        commands = {
            "collect": (*root, "collect", *collect, "--device", "cpu", "--name", name),
            "train": (*root, "train", name, "--d-sae", "256", "--tokens", tokens, "--buffer", BUFFER, "--name", name),
        }
        for command, arguments in commands.items():
            peak, seconds = run(*arguments)
            store = sum(path.stat().st_size for path in (workspace / "activations" / name).glob("*.safetensors"))
            rows.append(
                {
                    "command": command,
                    "tokens": base_tokens * multiple,
                    "store_mib": round(store / 2**20),
                    "buffer_rows": int(BUFFER) if command == "train" else "",
                    "peak_mib": round(peak),
                    "seconds": round(seconds, 1),
                }
            )
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items() if value != ""), flush=True)
    return rows


def main() -> None:
    """Measures and records."""
    from nsae_cli import __version__
    from nsae_cli.values import parse_size

    parser = argparse.ArgumentParser(description="peak memory of nsae collect and train")
    parser.add_argument("--tokens", default="128k", help="tokens of the smaller size")
    base_tokens = parse_size(parser.parse_args().tokens)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp())
    try:
        make_model(folder / "model")
        rows = measure(base_tokens, folder / "workspace", folder / "model")
    finally:
        shutil.rmtree(folder)
    CSV.parent.mkdir(exist_ok=True)
    new = not CSV.exists()
    with CSV.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["date", "nsae", "platform", *rows[0]])
        if new:
            writer.writeheader()
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        writer.writerows({"date": today, "nsae": __version__, "platform": sys.platform, **row} for row in rows)


if __name__ == "__main__":
    main()
