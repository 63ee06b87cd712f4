"""`nsae audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import (
    ChatColumn,
    CorpusConfig,
    Device,
    ModelDType,
    Name,
    Revision,
    Split,
    TextColumn,
    TokensColumn,
    given,
)
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    sae: Annotated[
        str | None,
        typer.Argument(
            metavar="SAE", help="A name in the workspace, a folder, or org/repo[:folder] on the hub [default: newest]."
        ),
    ] = None,
    activations: Annotated[
        str | None, typer.Option(metavar="STORE", help="Measure on a store instead of running the model on a text.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID|DIR|mini|mini-sink", help="The model [default: the one it names].")
    ] = None,
    revision: Revision = None,
    hook: Annotated[
        str | None, typer.Option(metavar="HOOK", help="Where it reads, as blocks.6.hook_resid_pre [default: its own].")
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="ID|FILE|DIR|builtin", help="Text to run the model on [default: as collect's]."),
    ] = None,
    corpus_config: CorpusConfig = None,
    split: Split = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    tokens_column: TokensColumn = None,
    tokens: Annotated[str, typer.Option(metavar="SIZE|all", help="Tokens to measure at most.")] = "100k",
    context_size: Annotated[
        str | None, typer.Option("--context", metavar="INT", help="Tokens per context [default: the SAE's own].")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Each context starts with the beginning-of-text token [default: as the SAE's]."
        ),
    ] = None,
    top: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of the tokens in the top group, and in the bottom.")
    ] = "1%",
    behaviour: Annotated[
        bool, typer.Option("--behaviour/--no-behaviour", help="Measure what splicing it in costs the model (ΔCE).")
    ] = True,
    bins: Annotated[
        bool, typer.Option("--bins", help="ΔCE per norm bin too: eleven more passes of the model.")
    ] = False,
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre/--no-centre",
            help="Whether it was trained on activations without their mean over d_in [default: found out].",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="SAE", help="SAE on the same hook, to compare the norm-bias index (nbi) with."),
    ] = None,
    model_dtype: ModelDType = "fp32",
    device: Device = "auto",
    name: Name = None,
) -> None:
    """Measure what high-norm tokens do to anyone's SAE.

    Reads SAEs of nsae, SAELens, sparsify, dictionary_learning and OpenAI. Runs the SAE's own model at its own hook and
    context length. Writes audits/NAME/audit.json.
    """
    from nsae_cli.analysis.audit_artifact import run_audit
    from nsae_cli.analysis.audit_options import AuditOptions
    from nsae_cli.report.tables import audit_table
    from nsae_cli.values import validate_options

    session = session_of(context)
    values = given(context, without=("sae", "name", "context_size"))
    if context_size is not None:
        values["context"] = context_size
    result = run_audit(sae, validate_options(AuditOptions, values), session.workspace, name, session.reporter)
    session.say_where([result.artifact], result.already_complete)
    session.finish("audit", [result.artifact], [result.document], lambda: audit_table(result.document))
