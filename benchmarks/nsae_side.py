"""nsae's side of every training benchmark: the one place that builds a `Cell`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsae_cli.kernels.select import Choice, choose
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.objective import Objective
from nsae_cli.store.batches import HookRows
from nsae_cli.training.cell import Cell
from nsae_cli.training.options import TrainOptions, expand_cells


def nsae_cell(
    weights: Weights,
    *,
    batch_size: int,
    beta: float,
    input_scale: float = 1.0,
    kernel: str = "auto",
    precision: str = "auto",
    steps: int = 10**7,
    lr_warm_up: float = 0.0,
    alpha_warm_up: float = 0.0,
    **options: object,
) -> Cell:
    """A cell that trains a copy of `weights`, with the plain squared error; a relu SAE unless ``act`` says otherwise.

    Args:
        weights: where training starts, on the device it runs on.
        batch_size: rows per step.
        beta: coefficient of the sparsity penalty in the units of `weights`, which are the scaled ones.
        input_scale: what raw rows are multiplied by.
        kernel, precision: as `nsae train` takes them; kernel ``torch`` is the sparse step of an installation without
            compiled loops.
        steps: of the whole run, for the schedules.
        lr_warm_up, alpha_warm_up: shares of the steps.
        options: more options of `nsae train`, such as ``decoder``, ``sparsity``, ``clip``, ``lr``.
    """
    device = weights.b_enc.device
    if kernel == "torch":
        choice = Choice("sparse", "asked for", device, "torch", False, False, None)
    else:
        choice = choose(kernel, precision, device)
    given = TrainOptions.model_validate(
        {
            "d_sae": weights.b_enc.shape[0],
            "batch_size": batch_size,
            "tokens": steps * batch_size,
            "lr_warm_up": lr_warm_up,
            "alpha_warm_up": alpha_warm_up,
            **options,
        }
    )
    [config] = expand_cells(given, ["blocks.0.hook_resid_post"], weights.b_dec.shape[0], 10**6).values()
    if config.k is not None:
        beta = 0.0
    objective = Objective(
        config.act, 0, 0, config.sparsity, beta=beta / input_scale, input_scale=input_scale, k=config.k
    )
    return Cell(config, objective, weights.to(torch.float32), choice)


def weights_of(cell: Cell) -> Weights:
    """The cell's weights as they are now."""
    return cell.weights


def first_moments_of(cell: Cell) -> dict[str, torch.Tensor]:
    """Adam's first moment of each parameter, by its name."""
    state = {name: cell.state()[f"adam/exp_avg/{name}"] for name in cell.weights.named()}
    return state | {"W_enc": state["W_enc"].t()}  # which the state has as [d_sae, d_in]


def as_rows(x: torch.Tensor) -> HookRows:
    """Rows [B, d] as a store delivers them: with norms, none of them zero."""
    norm = torch.linalg.vector_norm(x.float(), dim=1)
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return HookRows(x, norm, group, torch.zeros(len(x), dtype=torch.bool, device=x.device))


def stepper(cell: Cell, rows: HookRows) -> Callable[[], float]:
    """A function that takes the cell's next step on these rows and returns its loss, as `nsae train` calls it."""
    taken = 0

    def step() -> float:
        nonlocal taken
        log = cell.train_step(rows, taken)
        taken += 1
        return float((log.result.sq_error + cell.objective.beta_scaled * log.result.penalty).mean())

    return step
