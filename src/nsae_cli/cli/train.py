"""`nsae train`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from nsae_cli.cli.options import Device, Name, given
from nsae_cli.cli.session import session_of
from nsae_cli.store.workspace import Kind


def command(
    context: typer.Context,
    activations: Annotated[
        str | None, typer.Argument(metavar="ACTIVATIONS", help="Store: a name or a path [default: the newest].")
    ] = None,
    act: Annotated[str, typer.Option(metavar="relu|tanh-relu|topk|batchtopk|jumprelu", help="* Activation.")] = "relu",
    l2_norm: Annotated[
        str, typer.Option(metavar="none|norm|sq", help="* Divide the squared error by nothing, ‖x‖ or ‖x‖².")
    ] = "none",
    l1_norm: Annotated[
        str, typer.Option(metavar="none|norm", help="* Divide the sparsity penalty by nothing or ‖x‖.")
    ] = "none",
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="unit|free|bounded",
            help="* W_dec's rows: norm 1, free, or scaled norm ≤ 1 [default: tanh-relu free, the others unit].",
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="l1|l1-decoder-norm|tanh|l0", help="* Sparsity penalty [default: jumprelu l0, else l1]."),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT",
            help="* Sparsity coefficient α [default: relu 0.2, tanh-relu 0.03, jumprelu 0.003]; none with topk.",
        ),
    ] = None,
    alpha_scale: Annotated[
        str, typer.Option(metavar="layer-norm|none|note", help="* How the penalty's weight β follows from α.")
    ] = "layer-norm",
    alpha_warm_up: Annotated[str, typer.Option(metavar="SHARE", help="Share of the steps over which α rises.")] = "20%",
    k: Annotated[
        str | None,
        typer.Option(
            metavar="INT", help="* topk, batchtopk: active features per row [default: 32, at most an eighth of all]."
        ),
    ] = None,
    aux_k: Annotated[
        str,
        typer.Option(
            metavar="auto|off|INT",
            help="topk, batchtopk: dead features that model each row's error; auto is a power of two near d_in/2.",
        ),
    ] = "auto",
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="FLOAT", help="* jumprelu: ε of its thresholds' gradient, scaled units [default: 0.05]."),
    ] = None,
    noise: Annotated[
        str, typer.Option(metavar="FLOAT", help="* σ of training noise on pre-activations, in scaled units.")
    ] = "0",
    expansion_factor: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="* Features per dimension [default: 8].")
    ] = None,
    d_sae: Annotated[str | None, typer.Option(metavar="SIZE", help="* Number of features instead.")] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="all|6|0,3|0-3", help="Which stored layers [default: all of them].")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Rows that each SAE sees [default: one epoch, at least 2000 steps]."),
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="SIZE", help="Rows per step.")] = "2048",
    lr: Annotated[
        str | None, typer.Option(metavar="FLOAT", help="* Adam's learning rate [default: 2e-4·√(16384/d_sae)].")
    ] = None,
    lr_warm_up: Annotated[str, typer.Option(metavar="SHARE", help="Share of the steps over which lr rises.")] = "5%",
    clip: Annotated[str, typer.Option(metavar="FLOAT|off", help="Largest gradient norm, in scaled units.")] = "off",
    input_scale: Annotated[
        str, typer.Option(metavar="auto|FLOAT", help="s of x' = s·x; auto makes a typical row's norm √d_in.")
    ] = "auto",
    sinks: Annotated[str, typer.Option(metavar="keep|drop", help="* Train on sink rows or leave them out.")] = "keep",
    dead_window: Annotated[
        str, typer.Option(metavar="SIZE", help="Tokens after which a silent feature counts as dead.")
    ] = "262144",
    buffer: Annotated[
        str, typer.Option(metavar="SIZE", help="Rows that are mixed in memory at a time; bounds host memory.")
    ] = "524288",
    seed: Annotated[str, typer.Option(metavar="INT", help="* Of data order, initialisation and noise.")] = "0",
    device: Device = "auto",
    kernel: Annotated[
        str,
        typer.Option(metavar="auto|dense|sparse", help="Training step: by density, or always dense or sparse (exact)."),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|certified",
            help="Encoder of sparse steps: fp32, or bf16 with a bound that misses no active feature.",
        ),
    ] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Only deterministic kernels (CUDA).")] = False,
    checkpoint_every: Annotated[str, typer.Option(metavar="TIME|STEPS", help="How often to save a checkpoint.")] = "5m",
    name: Name = None,
) -> None:
    """Train sparse autoencoders on a store.

    Options marked * take a comma list: a grid of SAEs that learns from one pass over the activations.

    Writes saes/NAME (or saes/NAME/CELL for a grid): weights in SAELens' layout, run.json with every metric on held-out
    rows, metrics.jsonl. Ctrl-C saves a checkpoint; the same command goes on from it.
    """
    from nsae_cli.report.tables import train_table
    from nsae_cli.store.shards import open_activations
    from nsae_cli.training.loop import train
    from nsae_cli.training.options import TrainOptions
    from nsae_cli.values import validate_options

    session = session_of(context)
    options = validate_options(TrainOptions, given(context, without=("activations", "name")))
    [store] = session.choose(Kind.ACTIVATIONS, activations)
    result = train(options, open_activations(store.path), session.workspace, name, session.reporter)
    session.say_where(result.artifacts, result.already_complete)

    def show() -> RenderableType:
        return train_table(result.runs, [artifact.name for artifact in result.artifacts], result.runs[0])

    session.finish("train", result.artifacts, result.runs, show)
