"""What `nsae collect --dry-run` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from nsae_cli.report import format as fmt


def plan_table(plan: Mapping[str, Any]) -> Table:
    """A two-column table of what a collection would take.

    Args:
        plan: as `nsae_cli.lm.dry_run.dry_run` makes it.
    """
    table = Table(title=f"Would collect {plan['name']}", title_justify="left", show_header=False, box=None)
    table.pad_edge = False
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("folder", plan["path"])
    table.add_row("state", _state(plan))
    table.add_row("model", f"{fmt.model_name(plan['model'])}, computed in {plan['model_dtype']} on {plan['device']}")
    table.add_row("corpus", str(plan["corpus"]))
    layers = ", ".join(str(layer) for layer in plan["layers"])
    table.add_row("layers", f"vectors {layers} in {plan['dtype']}; norms of {len(plan['norm_layers'])}; {plan['site']}")
    about = "about " if plan["estimated"] else "" if plan["state"] == "complete" else "at most "
    if plan["rows"] is None:
        table.add_row("rows", "not known before the corpus is read: all of it")
    else:
        contexts = "contexts of up to" if plan["contexts"] is None else f"{fmt.count(plan['contexts'])} contexts of"
        table.add_row("rows", f"{about}{fmt.count(plan['rows'])} in {contexts} {plan['context']} tokens")
        table.add_row("disk", f"{about}{fmt.size_in_bytes(plan['bytes'])} in {_shards(plan['shards'])}")
    table.add_row("free", fmt.size_in_bytes(plan["free_bytes"]) + ("" if plan["fits"] else ": the store does not fit"))
    if plan["workers"] > 1:
        idle = max(0, plan["workers"] - (plan["shards"] or plan["workers"]))
        table.add_row("workers", f"{plan['workers']}" + (f", {idle} of them with nothing to do" if idle else ""))
    if plan["state"] != "complete":
        table.add_row("time", _time(plan))
    return table


def _state(plan: Mapping[str, Any]) -> str:
    if plan["state"] == "unfinished":
        return f"unfinished: {fmt.count(plan['durable_rows'])} rows in {_shards(plan['durable_shards'])} are kept"
    return {"complete": "complete, nothing is left to do", "new": "new"}[plan["state"]]


def _shards(number: int) -> str:
    return "1 shard" if number == 1 else f"{fmt.count(number)} shards"


def _time(plan: Mapping[str, Any]) -> str:
    rate = plan["rows_per_second"]
    each = " by each worker" if plan["workers"] > 1 else ""
    measured = "" if rate is None else f"{fmt.number(rate)} rows a second{each}, measured without writing"
    if plan["seconds"] is None:
        return f"not known: {plan['unknown_time']}" + (f" ({measured})" if measured else "")
    return f"about {_duration(plan['seconds'])} ({measured})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
