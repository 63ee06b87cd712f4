"""What several processes cannot train, and what they step with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import torch

from nsae_cli import catalogue
from nsae_cli.kernels.options import KernelOption, PrecisionOption
from nsae_cli.kernels.select import Choice, choose
from nsae_cli.kernels.types import Distance
from nsae_cli.training.options import CellConfig
from nsae_cli.training.parallel.mesh import Mesh


def refuse_uneven(mesh: Mesh, configs: Iterable[CellConfig]) -> None:
    """Every process has to have as many rows and features as every other.

    Raises:
        UsageError: more than one SAE, a batch or a number of features that does not divide.
    """
    configs = list(configs)
    if mesh.size == 1:
        return
    if len(configs) > 1:
        raise catalogue.REFUSED_COMBINATION(
            f"{mesh} train one SAE, and this is a grid of {len(configs)}; train them one by one, or the grid in one "
            f"process"
        )
    [config] = configs
    if config.batch_size % mesh.data:
        raise catalogue.OPTION_DOES_NOT_FIT(
            f"--batch-size {config.batch_size} cannot be cut into {mesh.data} equal parts, one per process; give a "
            f"multiple of {mesh.data}, or other processes"
        )
    if config.d_sae % mesh.features:
        raise catalogue.OPTION_DOES_NOT_FIT(
            f"--d-sae {config.d_sae} cannot be cut into {mesh.features} equal parts, one per process; give a multiple "
            f"of {mesh.features}, or other processes"
        )


def choose_kernel(
    mesh: Mesh,
    kernel: KernelOption,
    precision: PrecisionOption,
    device: torch.device,
    distances: Collection[Distance],
    acts: Collection[str],
) -> Choice:
    """What each process steps with; `select.choose` for one.

    Gradients are added up over processes, so they have to be in memory: the sparse step's fused update is of no use,
    and by itself it is chosen by the density that one process sees. So it is dense, unless a sparse step is asked for.

    Args:
        mesh: the processes.
        kernel, precision, device, distances: see `select.choose`.
        acts: of the SAEs.

    Raises:
        UsageError: sparse steps where features, or the choice over a batch, are spread over processes.
    """
    if mesh.size == 1:
        return choose(kernel, precision, device, distances)
    if kernel == "sparse":
        why = "with features on several processes" if mesh.features > 1 else None
        if "batchtopk" in acts:
            why = "with --act batchtopk, which chooses over the rows of all processes"
        if why is not None:
            raise catalogue.REFUSED_COMBINATION(f"--kernel sparse {why}: only dense steps do that; leave it out")
        choice = choose(kernel, precision, device, distances)
        return dataclasses.replace(choice, reason=f"{choice.reason}; gradients in full, to be added up over processes")
    if precision == "certified":
        raise catalogue.REFUSED_COMBINATION(
            f"--precision certified with {mesh}: they step densely, without a certified encoder; leave it out"
        )
    choice = choose("dense", precision, device, distances)
    if mesh.features > 1:
        shared = "features are spread over processes, and sparse steps need all of them"
    else:
        shared = "gradients are added up over processes, and sparse steps do not keep them"
    why = "asked for" if kernel == "dense" else shared
    reason = choice.reason.removeprefix("asked for; ")
    return dataclasses.replace(choice, reason=f"{why}; {reason}")
