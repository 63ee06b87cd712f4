"""From a trained cell to a saved SAE: held-out metrics, weights, run.json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from nsae_cli import interrupt
from nsae_cli.assets import embedded_note
from nsae_cli.errors import Interrupted
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.profile import HookProfile
from nsae_cli.store.provenance import Provenance
from nsae_cli.store.sae_folder import FORMAT_VERSION, write_run, write_sae
from nsae_cli.training.cell import Cell
from nsae_cli.training.environment import versions
from nsae_cli.training.evaluate import evaluate
from nsae_cli.training.l0_control import TOLERANCE
from nsae_cli.training.parallel.mesh import ONE, Mesh
from nsae_cli.training.plan import TrainPlan

T = TypeVar("T")

# L1 has stopped measuring sparsity when acts are this small and decoder rows this long, in scaled units.
_GAMED_MEAN_ACT, _GAMED_DECODER_NORM = 0.1, 5.0
# From this share of dead features on they are named as the reason of a low L0.
_MOSTLY_DEAD = 0.5
# α that has moved by this factor in vain says that α is not what L0 needs.
_FAR = 10


def finish_cell(
    plan: TrainPlan,
    name: str,
    cell: Cell,
    profile: HookProfile,
    adam_sink_share: float | None,
    reporter: Reporter,
    mesh: Mesh = ONE,
) -> dict[str, Any]:
    """Evaluates and saves one cell; its run.json, written last, marks it as complete. Returns run.json.

    Args:
        adam_sink_share: as the probes of the gradient left it.
        mesh: the processes that took its last steps.
    """
    folder, config = plan.cell_folder(name), cell.config
    sae = cell.saved_sae()
    evaluation = evaluate(
        sae,
        cell.objective,
        config.decoder == "unit",
        lambda batch: _until_stopped(plan.source.held_out_rows(profile, batch)),
    )
    metrics = evaluation.metrics
    metrics["sinks"]["adam_sink_share"] = adam_sink_share
    if not metrics["all"]["tokens"]:
        reporter.warn(f"{plan.source.name} has fewer than 20 contexts: no rows are held out, so {name} has no metrics")
    metadata = _sae_lens_metadata(plan.source.provenance, config.hook)
    write_sae(folder, sae, metadata | {"training_architecture": config.act})
    commit.write_tensors(folder / "features.safetensors", {"density": evaluation.density.float()})
    target = l0_target(cell, metrics)
    warnings = [text for text in (gamed_sparsity(cell, metrics), missed_l0(cell, target, metrics)) if text]
    for warning in warnings:
        reporter.warn(f"{name}: {warning}")
    document = {
        **_describe(plan, cell, profile),
        # By how many a sum is split its rounding depends on; of one process a run.json says nothing of it.
        **({"processes": {"data": mesh.data, "features": mesh.features}} if mesh.size > 1 else {}),
        "metrics": metrics,
        "weights_sha256": {key: commit.tensor_sha256(tensor) for key, tensor in sae.named().items()},
        "l0_target": target,
        "warnings": warnings,
    }
    return write_run(folder, document)


def _until_stopped(rows: Iterator[T]) -> Iterator[T]:
    """The same rows, unless a signal asks to stop: a checkpoint of the last step is there."""
    for part in rows:
        if (signum := interrupt.stop_requested()) is not None:
            raise Interrupted(signum, "stopped while evaluating, all steps are saved; run the same command to go on")
        yield part


def gamed_sparsity(cell: Cell, metrics: dict[str, Any]) -> str | None:
    """A sentence if L1 no longer measures sparsity (mean act < .1 and max ‖d_i‖ > 5 in scaled units), else None.

    A loss that does not see the length of x̂ lets acts shrink without longer rows: there small acts alone say it.
    """
    objective = cell.objective
    if objective.sparsity != "l1" or not objective.beta or not metrics["ns"]["l0"]:
        return None
    to_scaled = objective.input_scale if objective.nonlinearity.homogeneous else 1.0
    mean_act = to_scaled * metrics["ns"]["l1"] / metrics["ns"]["l0"]
    if mean_act >= _GAMED_MEAN_ACT:
        return None
    if objective.distance.degree == 0:
        return (
            f"L1 no longer measures sparsity: mean act {mean_act:.2g}, which the cosine distance does not mind; "
            "use --noise 0.1, or another --l2-norm"
        )
    longest = float(cell.weights.W_dec.norm(dim=1).max())
    if longest <= _GAMED_DECODER_NORM:
        return None
    return (
        f"L1 no longer measures sparsity: mean act {mean_act:.2g}, longest decoder row {longest:.2g} (scaled units); "
        "use --noise 0.1, --sparsity l1-decoder-norm or --decoder bounded"
    )


def l0_target(cell: Cell, metrics: dict[str, Any]) -> dict[str, Any] | None:
    """How near the saved SAE came to its target for L0 on held-out non-sink rows; None without a target."""
    target, reached = cell.config.target_l0, metrics["ns"]["l0"]
    if target is None:
        return None
    error = None if reached is None else reached / target - 1
    return {
        "target": target,
        "reached": reached,
        "relative_error": error,
        "within": None if error is None else abs(error) <= TOLERANCE,
    }


def missed_l0(cell: Cell, target: dict[str, Any] | None, metrics: dict[str, Any]) -> str | None:
    """A sentence if the SAE has missed its target for L0, with the likely reason; else None."""
    if target is None or cell.control is None or target["within"] is not False:
        return None
    few, moved = target["relative_error"] < 0, cell.alpha / cell.config.alpha
    dead = metrics["all"]["dead_fraction"]
    if few and dead is not None and dead > _MOSTLY_DEAD:
        why = f"{dead:.0%} of its features are dead; start from a lower --alpha or give a larger --d-sae"
    elif few and moved < 1 / _FAR:
        why = "with next to no penalty no more features are active; lower --target-l0, or raise --tokens"
    elif not few and moved > _FAR:
        why = "no penalty makes it that sparse in so many steps; raise --target-l0, --tokens or --lr"
    else:
        why = f"it was still moving at the end; raise --tokens, or give an --alpha near {cell.alpha:.3g} to start from"
    reached, error = target["reached"], target["relative_error"]
    return f"L0 {reached:.4g} misses --target-l0 {target['target']:g} by {error:+.1%} at α {cell.alpha:.3g}: {why}"


def _sae_lens_metadata(provenance: Provenance, hook: str) -> dict[str, Any]:
    return {
        "model_name": provenance.model,
        "hook_name": hook,
        "context_size": provenance.context_size,
        "dataset_path": provenance.corpus,
        "prepend_bos": provenance.bos,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }


def _describe(plan: TrainPlan, cell: Cell, profile: HookProfile) -> dict[str, Any]:
    config, provenance, thresholds = cell.config, plan.source.provenance, profile.thresholds
    return {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(),
        "inputs": plan.source.inputs,
        "versions": versions(),
        **plan.source.run_details,
        "model": provenance.model,
        "embedded_note": embedded_note(provenance.model),
        "context_size": provenance.context_size,
        "packing": provenance.packing,
        "bos": provenance.bos,
        "hook": config.hook,
        "d_in": plan.source.d_in,
        "d_sae": config.d_sae,
        "alpha": cell.alpha,
        "beta": cell.objective.beta,
        "input_scale": cell.objective.input_scale,
        "norm_scale": profile.norm_scale,
        "edges": None if profile.edges is None else profile.edges.tolist(),
        "sinks": {
            **profile.sink_counts.to_json(),
            "median": thresholds.median,
            "median_position0": thresholds.median_position0,
            "median_elsewhere": thresholds.median_elsewhere,
        },
        "kernel": cell.kernel.describe(),
        "counts": {
            "tokens": config.steps * config.batch_size,
            "steps": config.steps,
            "zero_rows": cell.zero_rows,
            "resampled": cell.resampled,
        },
    }
