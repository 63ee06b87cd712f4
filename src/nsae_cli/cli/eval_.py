"""`nsae eval`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from nsae_cli.cli.options import (
    ChatColumn,
    ContextsPerPass,
    CorpusConfig,
    Device,
    ModelDType,
    Name,
    Split,
    TextColumn,
    TokensColumn,
    given,
)
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    saes: Annotated[
        list[str] | None,
        typer.Argument(metavar="SAE", help="SAEs or groups: names or paths [default: the newest]."),
    ] = None,
    bins: Annotated[
        bool, typer.Option("--bins", help="Also splice at single norm bins and at the sinks (about six times as long).")
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="SIZE|all", help="Tokens at most [default: all held-out ones; 100k of a corpus]."),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(metavar="STORE", help="Held-out text of this store [default: of the one it was trained on]."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="Where the model is, if it is not found by its name.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="ID|FILE|DIR|builtin", help="Evaluate on this text, all of it.")
    ] = None,
    corpus_config: CorpusConfig = None,
    split: Split = None,
    text_column: TextColumn = None,
    chat_column: ChatColumn = None,
    tokens_column: TokensColumn = None,
    context_size: Annotated[
        str | None, typer.Option("--context", metavar="INT", help="Tokens per context [default: as trained].")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Documents share contexts [default: as trained].")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Each context starts with the beginning-of-text token [default: as trained]."
        ),
    ] = None,
    batch_size: ContextsPerPass = None,
    model_dtype: ModelDType = "fp32",
    device: Device = "auto",
    name: Name = None,
) -> None:
    """Measure what SAEs do to the model's predictions.

    The model is run with the reconstruction in place of its activations, on text that the SAE was not trained on, and
    the change of its cross-entropy is measured with 95 % intervals. Options from --corpus-config to --bos go with
    --corpus only.

    Writes evals/NAME per SAE: eval.json, and contexts.safetensors with the sums of each context.
    """
    from nsae_cli.analysis.eval import run_eval
    from nsae_cli.analysis.eval_text import EvalOptions
    from nsae_cli.report.tables import eval_findings, eval_table
    from nsae_cli.values import validate_options

    session = session_of(context)
    values = given(context, without=("saes", "activations", "context_size", "name"))
    if context_size is not None:
        values["context"] = context_size
    options = validate_options(EvalOptions, values)
    result = run_eval(saes or [], activations, options, session.workspace, name, session.reporter)
    artifacts = [one.artifact for one in result.results]
    session.say_where(artifacts, result.already_complete)
    documents = [one.document for one in result.results]

    def show() -> RenderableType:
        return Group(eval_table(documents), "", *(Text(sentence) for sentence in eval_findings(documents)))

    session.finish("eval", artifacts, documents, show)
