"""`nsae collect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from nsae_cli.cli.options import (
    ChatColumn,
    ContextsPerPass,
    CorpusConfig,
    Device,
    Name,
    Revision,
    Split,
    TextColumn,
    TokensColumn,
    given,
)
from nsae_cli.cli.session import Session, session_of
from nsae_cli.lm.layers import SITES

if TYPE_CHECKING:
    from nsae_cli.launch import Placement
    from nsae_cli.lm.config import CollectConfig


def command(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(metavar="ID|DIR|mini|mini-sink", help="Model: a hub id, a folder, or one that ships with nsae."),
    ] = "gpt2",
    revision: Revision = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FILE|DIR|builtin",
            help="Text: a hub data set, .txt/.jsonl/.parquet, a folder of these, or builtin [default: by the model].",
        ),
    ] = None,
    corpus_config: CorpusConfig = None,
    split: Split = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    tokens_column: TokensColumn = None,
    layers: Annotated[
        str | None,
        typer.Option(metavar="all|6|0,3|0-3", help="Layers whose vectors are stored [default: the middle one]."),
    ] = None,
    site: Annotated[
        str,
        typer.Option(
            metavar="|".join(SITES),
            help="After a block, before it, between attention and MLP; or what one of the two adds.",
        ),
    ] = "resid_post",
    norms: Annotated[
        str,
        typer.Option(metavar="all|stored", help="Layers whose norms are stored; stored ends the forward pass early."),
    ] = "all",
    tokens: Annotated[
        str | None,
        typer.Option(metavar="SIZE|all", help="Rows at most [default: 2M; all of builtin for embedded models]."),
    ] = None,
    context_size: Annotated[
        str | None, typer.Option("--context", metavar="INT", help="Tokens per context [default: 128].")
    ] = None,
    packing: Annotated[bool, typer.Option("--packing/--no-packing", help="Documents share contexts.")] = True,
    bos: Annotated[
        bool, typer.Option("--bos/--no-bos", help="Each context starts with the beginning-of-text token.")
    ] = True,
    batch_size: ContextsPerPass = None,
    dtype: Annotated[str, typer.Option(metavar="fp16|bf16|fp32", help="How vectors are stored.")] = "fp16",
    model_dtype: Annotated[
        str, typer.Option(metavar="auto|fp16|bf16|fp32", help="Computation; auto is bf16 on CUDA, else fp32.")
    ] = "auto",
    device: Device = "auto",
    seed: Annotated[str, typer.Option(metavar="INT", help="Recorded; collecting draws nothing at random.")] = "0",
    worker: Annotated[
        str,
        typer.Option(metavar="auto|off|I/N", help="Which of N processes this is; auto: as torchrun or srun says."),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take (rows, bytes, time) and write nothing.")
    ] = False,
    name: Name = None,
) -> None:
    """Harvest residual-stream activations of a language model.

    Writes activations/NAME: safetensors shards with vectors, norms, tokens, positions and documents, and manifest.json.
    """
    from nsae_cli.assets import embedded_note
    from nsae_cli.launch import worker_of
    from nsae_cli.lm.collect import collect_share
    from nsae_cli.lm.config import CollectConfig
    from nsae_cli.report.store_summary import store_summary
    from nsae_cli.values import validate_options

    session = session_of(context)
    values = given(context, without=("context_size", "worker", "dry_run"))
    if context_size is not None:
        values["context"] = context_size
    config = validate_options(CollectConfig, values)
    place = worker_of(worker)
    if dry_run:
        if worker != "auto" or place.rank == 0:  # of a launcher's processes the first speaks for all
            _dry_run(session, config, place)
        return
    result = collect_share(config, session.workspace, session.reporter, place)
    if result is None:  # of several workers, one prints the store
        return
    if not result.reused:  # then collect has said so
        session.say_where([result.artifact], reused=False)
    manifest = result.manifest.model_dump()
    shown = {**manifest, "embedded_note": embedded_note(manifest["model"])}
    session.finish("collect", [result.artifact], [manifest], lambda: store_summary(result.artifact.name, shown))


def _dry_run(session: Session, config: CollectConfig, worker: Placement) -> None:
    from nsae_cli.lm.dry_run import dry_run
    from nsae_cli.report.plan_table import plan_table

    plan = dry_run(config, session.workspace, worker)
    if not plan["fits"]:
        session.reporter.warn("the store does not fit on the disk")
    session.finish_measurement("collect", plan, lambda: plan_table(plan))
