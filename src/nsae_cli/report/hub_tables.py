"""What goes to the hub, what came from it, and what was exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsae_cli.report import format as fmt


def push_table(plan: Mapping[str, Any]) -> RenderableType:
    """Destination, visibility, then every folder with its files and bytes.

    Args:
        plan: as `interop.push.PushPlan.to_json` has it.
    """
    count = len(plan["folders"])
    what = "1 SAE" if count == 1 else f"{count} SAEs"
    seen = "private" if plan["private"] else "PUBLIC: anybody can see it"
    known = {True: "", False: "new, ", None: "not looked at, "}[plan["exists"]]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("to", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("files", overflow="fold")
    for folder in plan["folders"]:
        files = ", ".join(folder["files"]) + (" (replaces what is there)" if folder["replaces"] else "")
        table.add_row(Text(f"{folder['folder']}/"), fmt.size_in_bytes(folder["bytes"]), Text(files))
    if plan["card"] is None:
        table.add_row(Text("README.md"), "", Text("left alone: nsae did not write it"))
    else:
        table.add_row(Text("README.md"), fmt.size_in_bytes(plan["card"]["bytes"]), Text("the model card"))
    head = Text.assemble(f"{what} to ", (plan["repository"], "bold"), f" on the Hugging Face hub ({known}{seen})")
    total = Text(f"{plan['files']} files, {fmt.size_in_bytes(plan['bytes'])}, in one commit")
    return Group(head, table, total)


def files_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """SAEs with where each is now.

    Args:
        rows: {sae, path, bytes, format} each.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("SAE", "format", "size", "path"):
        table.add_column(heading, justify="right" if heading == "size" else "left", no_wrap=heading != "path")
    for row in rows:
        table.add_row(Text(row["sae"]), Text(row["format"]), fmt.size_in_bytes(row["bytes"]), Text(row["path"]))
    return table
