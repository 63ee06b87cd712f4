"""`nsae bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from nsae_cli.cli.options import Device, given
from nsae_cli.cli.session import session_of


def command(
    context: typer.Context,
    d_in: Annotated[str, typer.Option(metavar="SIZE", help="Width of the activations.")] = "768",
    d_sae: Annotated[str, typer.Option(metavar="SIZE", help="Number of features.")] = "6144",
    batch_size: Annotated[str, typer.Option(metavar="SIZE", help="Rows per step.")] = "1024",
    l0: Annotated[str, typer.Option("--l0", metavar="SIZE", help="Active features per row.")] = "64",
    rounds: Annotated[str, typer.Option(metavar="INT", help="Rounds that are counted.")] = "5",
    threads: Annotated[
        str | None, typer.Option(metavar="INT", help="Threads on the CPU [default: as many as torch takes].")
    ] = None,
    device: Device = "auto",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Measure at which density dense and sparse steps change places; train then uses it."
        ),
    ] = False,
) -> None:
    """Measure how fast this machine takes training steps.

    Every kernel beside a plain torch loop of the same algorithm and the encoder's product alone, on synthetic rows, in
    rounds that alternate. With --calibrate the cross-over densities are measured (a minute or two; the shape options
    do not matter) and kept in the user's cache folder.
    """
    from nsae_cli.report.tables import bench_table
    from nsae_cli.training.bench import BenchOptions, bench
    from nsae_cli.values import validate_options

    session = session_of(context)
    options = validate_options(BenchOptions, given(context, without=()))
    result = bench(options, session.reporter)
    session.finish_measurement("bench", result, lambda: bench_table(result))
