"""What `nsae collect` and `nsae alter` say about a store that they have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from nsae_cli.report import format as fmt


def store_summary(name: str, manifest: Mapping[str, Any]) -> Table:
    """A two-column table of a manifest.json."""
    corpus, dropped = manifest.get("corpus") or {}, manifest.get("dropped") or {}
    total = sum(shard.get("bytes") or 0 for shard in manifest["shards"])
    table = Table(title=f"Activations {name}", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    note = f" ({manifest['embedded_note']})" if manifest.get("embedded_note") else ""
    table.add_row("model", f"{fmt.model_name(manifest.get('model'))}{note}, computed in {manifest.get('model_dtype')}")
    split = f", split {corpus['split']}" if corpus.get("split") else ""
    column = f", conversations in {corpus['chat_column']}" if corpus.get("chat_column") else ""
    column = f", token ids in {corpus['tokens_column']}" if corpus.get("tokens_column") else column
    table.add_row("corpus", f"{corpus.get('name')}{split}{column}")
    table.add_row("vectors", f"{', '.join(manifest['hooks'])}, {manifest['d_in']} wide, {manifest['dtype']}")
    table.add_row("norms", f"{len(manifest.get('norm_hooks') or [])} hooks")
    for change in manifest.get("altered") or []:
        how = f"seed {change['seed']}" if "seed" in change else f"k = {change['k']:g}"
        table.add_row("altered", f"{change['change']}, {how}, from {change['activations']}")
    packing = "documents share contexts" if manifest.get("packing") else "one document per context"
    bos = f"each starts with {_bos_token(manifest)}" if manifest.get("bos") else "no token put first"
    table.add_row("contexts", f"{manifest.get('context_size')} tokens, {packing}, {bos}")
    shards = len(manifest["shards"])
    files = f"{shards} shard{'' if shards == 1 else 's'}"
    table.add_row("rows", f"{fmt.count(manifest['rows'])} in {files}, {fmt.size_in_bytes(total)}")
    table.add_row(
        "dropped", f"{fmt.count(dropped.get('tokens'))} tokens, {fmt.count(dropped.get('documents'))} documents"
    )
    return table


def _bos_token(manifest: Mapping[str, Any]) -> str:
    """The token that stands first, as text or number; GPT-2's is not recorded."""
    recorded = (manifest.get("tokenizer") or {}).get("bos_token")
    if recorded is None:
        return "<|endoftext|>"
    return str(recorded["text"] or f"token {recorded['id']}")
