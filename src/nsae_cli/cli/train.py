"""`nsae train`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import RenderableType

from nsae_cli import catalogue
from nsae_cli.cli.options import Device, Name, given
from nsae_cli.cli.ranks import together
from nsae_cli.cli.session import session_of
from nsae_cli.lm.layers import SITES
from nsae_cli.reporter import SilentReporter
from nsae_cli.store.workspace import Kind


def _harvest(metavar: str | None, help: str, flags: str | None = None) -> Any:
    """An option that belongs to ``--from-model``; None where it is not given, so that it can be refused elsewhere."""
    flag = () if flags is None else (flags,)
    return typer.Option(*flag, metavar=metavar, help=f"† {help}")


def command(
    context: typer.Context,
    activations: Annotated[
        str | None, typer.Argument(metavar="ACTIVATIONS", help="Store: a name or a path [default: the newest].")
    ] = None,
    from_model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|DIR|mini|mini-sink", help="Instead of a store: train on what this model makes of the corpus."
        ),
    ] = None,
    act: Annotated[str, typer.Option(metavar="relu|tanh-relu|topk|batchtopk|jumprelu", help="* Activation.")] = "relu",
    l2_norm: Annotated[
        str,
        typer.Option(
            metavar="none|norm|sq|cosine",
            help="* Divide the squared error by nothing, ‖x‖ or ‖x‖²; or 2(1 − cos(x, x̂)).",
        ),
    ] = "none",
    l1_norm: Annotated[
        str, typer.Option(metavar="none|norm", help="* Divide the sparsity penalty by nothing or ‖x‖.")
    ] = "none",
    row_weights: Annotated[
        str,
        typer.Option(
            metavar="plain|mean-one|permuted",
            help="* Weights by norm as they are; or, as controls, of equal mean per batch, or shuffled among rows.",
        ),
    ] = "plain",
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
    alpha_from: Annotated[
        str | None,
        typer.Option(metavar="SAE", help="α as SAEs trained alike, at whatever layer, found it by --target-l0."),
    ] = None,
    alpha_scale: Annotated[
        str, typer.Option(metavar="layer-norm|none|note", help="* How the penalty's weight β follows from α.")
    ] = "layer-norm",
    alpha_warm_up: Annotated[str, typer.Option(metavar="SHARE", help="Share of the steps over which α rises.")] = "20%",
    target_l0: Annotated[
        str | None,
        typer.Option(metavar="FLOAT", help="* Mean L0 of non-sink tokens; α is moved until it is met, from --alpha."),
    ] = None,
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
    d_sae: Annotated[
        str | None, typer.Option(metavar="SIZE", help="* Number of features, instead of --expansion-factor.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="all|6|0,3|0-3", help="Which layers [default: all of a store, the middle one of a model]."
        ),
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
    probe_every: Annotated[
        str,
        typer.Option(metavar="auto|STEPS|off", help="How often to probe the gradient; auto: about 20 times a run."),
    ] = "auto",
    resample_dead: Annotated[
        str,
        typer.Option(
            metavar="off|STEPS|SHARE",
            help="Every so often (500, 10%) give features that are dead by --dead-window new weights; not with topk.",
        ),
    ] = "off",
    buffer: Annotated[
        str, typer.Option(metavar="SIZE", help="Rows that are mixed in memory at a time; bounds host memory.")
    ] = "524288",
    seed: Annotated[str, typer.Option(metavar="INT", help="* Seed of data order, initialisation and noise.")] = "0",
    revision: Annotated[str | None, _harvest("REV", "Branch, tag or commit of a hub model.")] = None,
    corpus: Annotated[str | None, _harvest("ID|FILE|DIR|builtin", "Text [default: by the model].")] = None,
    corpus_config: Annotated[str | None, _harvest("NAME", "Configuration of a hub data set.")] = None,
    split: Annotated[str | None, _harvest("NAME", "Split of a hub data set or of builtin [default: train].")] = None,
    text_column: Annotated[str | None, _harvest("NAME", "Column that holds the text [default: text].")] = None,
    chat_column: Annotated[str | None, _harvest("NAME", "Column of messages, for the model's chat template.")] = None,
    tokens_column: Annotated[
        str | None, _harvest("NAME", "Column of token ids; with --no-packing each row is a context.")
    ] = None,
    site: Annotated[str | None, _harvest("|".join(SITES), "Where in the block [default: resid_post].")] = None,
    context_size: Annotated[str | None, _harvest("INT", "Tokens per context [default: 128].", "--context")] = None,
    packing: Annotated[
        bool | None, _harvest(None, "Documents share contexts [default: packing].", "--packing/--no-packing")
    ] = None,
    bos: Annotated[
        bool | None,
        _harvest(None, "Each context starts with the beginning-of-text token [default: bos].", "--bos/--no-bos"),
    ] = None,
    harvest_batch_size: Annotated[
        str | None, _harvest("INT", "Contexts per forward pass [default: by the device].")
    ] = None,
    dtype: Annotated[str | None, _harvest("fp16|bf16|fp32", "What vectors are rounded to [default: fp16].")] = None,
    model_dtype: Annotated[
        str | None, _harvest("auto|fp16|bf16|fp32", "Computation; auto is bf16 on CUDA, else fp32 [default: auto].")
    ] = None,
    device: Device = "auto",
    parallel: Annotated[
        str,
        typer.Option(
            metavar="auto|data|features|DxF",
            help="What processes that torchrun started share: each batch, the features, or both [default: data].",
        ),
    ] = "auto",
    rank_timeout: Annotated[
        str, typer.Option(metavar="TIME", help="How long these processes wait for each other.")
    ] = "10m",
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
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Memory for weights and mixed rows, as 8G; what does not fit trains in waves [default: 80% free].",
        ),
    ] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Only deterministic kernels (CUDA).")] = False,
    checkpoint_every: Annotated[str, typer.Option(metavar="TIME|STEPS", help="How often to save a checkpoint.")] = "5m",
    log_to: Annotated[
        str | None,
        typer.Option(
            metavar="wandb|tensorboard|trackio",
            help="Also send metrics.jsonl's records to these trackers, a comma list.",
        ),
    ] = None,
    name: Name = None,
) -> None:
    """Train sparse autoencoders on a store or a model.

    Options marked * take a comma list: a grid of SAEs that learns from one pass over the activations.
    Those marked † say what --from-model reads, as in nsae collect.

    Writes saes/NAME (or saes/NAME/CELL for a grid): weights in SAELens' layout, run.json with every metric on held-out
    rows, metrics.jsonl. Ctrl-C saves a checkpoint; the same command goes on from it.

    Started by torchrun (or srun) as several processes it trains one SAE with all of them: docs/scaling-training.md.

    With --from-model no activations touch the disk: --buffer rows at a time are harvested and mixed in memory.
    """
    from nsae_cli.experiment.train import TrainCommandOptions, choose_source
    from nsae_cli.report.tables import train_table
    from nsae_cli.training.loop import train
    from nsae_cli.values import validate_options

    session = session_of(context)
    values = given(context, without=("activations", "context_size", "name"))
    if context_size is not None:
        values["context"] = context_size
    options = validate_options(TrainCommandOptions, values)
    if activations is not None and options.from_model is not None:
        raise catalogue.REFUSED_COMBINATION(
            f"ACTIVATIONS {activations} and --from-model {options.from_model} both say where rows come from; give one"
        )
    with together(options) as (options, ranks):
        if not ranks.leads:
            session.reporter = SilentReporter()
        store = None if options.from_model is not None else session.choose(Kind.ACTIVATIONS, activations)[0]
        source = choose_source(options, store, session.workspace, ranks)
        result = train(options, source, session.workspace, name, session.reporter, ranks=ranks)
    if not ranks.leads:
        return
    session.say_where(result.artifacts, result.already_complete)

    def show() -> RenderableType:
        return train_table(result.runs, [artifact.name for artifact in result.artifacts], result.runs[0])

    session.finish("train", result.artifacts, result.runs, show)
