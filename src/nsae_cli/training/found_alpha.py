"""`--alpha-from`: α as SAEs that were trained before found it for their target L0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsae_cli import catalogue
from nsae_cli.store.commit import read_json
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.training.options import CellConfig

#: What two SAEs must share for an α to mean the same to both; not the hook, of which `--alpha-scale` takes care.
_SHARED = ("act", "l2_norm", "l1_norm", "row_weights", "decoder", "sparsity", "alpha_scale", "noise", "bandwidth",
           "sinks", "d_sae")  # fmt: skip


def with_found_alphas(configs: Mapping[str, CellConfig], reference: str, workspace: Workspace) -> dict[str, CellConfig]:
    """The same cells, each with the α of the SAE that is trained like it, at whatever layer.

    Of several such SAEs the one of the cell's own seed counts.

    Args:
        configs: the cells by name.
        reference: an SAE or a group in the workspace, or a path.

    Raises:
        UsageError: nothing of that name, or a cell to which no SAE, or more than one α, belongs.
        ArtifactError: an SAE is not complete.
    """
    runs = [read_json(artifact.path / Kind.SAE.mark) for artifact in workspace.find(Kind.SAE, reference)]
    found = dict(configs)
    for name, config in configs.items():
        if config.k is None:  # topk and batchtopk have no α
            found[name] = config.model_copy(update={"alpha": _found(name, config, runs, reference)})
    return found


def _found(name: str, config: CellConfig, runs: list[dict[str, Any]], reference: str) -> float:
    wanted = {key: getattr(config, key) for key in _SHARED}
    alike = [run for run in runs if all(run["config"].get(key) == value for key, value in wanted.items())]
    alike = [run for run in alike if run["config"]["seed"] == config.seed] or alike
    alphas = {float(run["alpha"]) for run in alike}
    if len(alphas) == 1:
        return alphas.pop()
    if not alphas:
        raise catalogue.ALPHA_SOURCE(
            f"--alpha-from {reference}: no SAE there is trained like {name} (the same activation, norms, penalty, "
            f"decoder, noise, sinks, width and --alpha-scale); give --alpha"
        )
    found = ", ".join(f"{alpha:.4g}" for alpha in sorted(alphas))
    raise catalogue.ALPHA_SOURCE(
        f"--alpha-from {reference}: α of {name} could be {found}; name one SAE as {reference}/CELL"
    )
