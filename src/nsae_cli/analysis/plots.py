"""Figures of `nsae plot`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nsae_cli.errors import ArtifactError
from nsae_cli.report.figures import activation_figure, save_png, training_curves
from nsae_cli.report.format import source_line, trained_on
from nsae_cli.reporter import Reporter
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.store import commit
from nsae_cli.store.commit import read_json
from nsae_cli.store.workspace import Kind, Workspace


def draw_activation(workspace: Workspace, name: str | None) -> Path:
    """relu and tanh-relu with their derivatives over pre_acts in [−2, 4]; returns the figure's path."""
    pre_acts = torch.linspace(-2, 4, 601, dtype=torch.float64)
    curves = {}
    for act, nonlinearity in NONLINEARITIES.items():
        acts = nonlinearity.value(pre_acts)
        curves[act] = (acts.numpy(), nonlinearity.derivative(acts).numpy())
    path = _place(workspace, name or "activation")
    save_png(activation_figure(pre_acts.numpy(), curves), path)
    return path


def draw_training(references: Sequence[str], workspace: Workspace, name: str | None, reporter: Reporter) -> Path:
    """Training curves of SAEs: those named, or the newest group; returns the figure's path.

    Raises:
        UsageError: nothing of that name.
        ArtifactError: metrics.jsonl is missing or damaged.
    """
    if not references:
        newest = workspace.newest(Kind.SAE).name.partition("/")[0]
        reporter.note(f"using the newest saes: {newest}")
        references = [newest]
    curves = []
    captions: dict[str, None] = {}
    artifacts = [found for reference in references for found in workspace.find(Kind.SAE, reference)]
    for artifact in artifacts:
        log = artifact.path / "metrics.jsonl"
        try:
            rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{log} cannot be read ({error}); train the SAE again") from error
        curves.append((artifact.path.name, rows))
        run = read_json(artifact.path / artifact.kind.mark)
        captions[f"{trained_on(run)}, {source_line(run)}"] = None
    groups = {artifact.name.partition("/")[0] for artifact in artifacts}
    path = _place(workspace, name or (groups.pop() if len(groups) == 1 else "training"))
    save_png(training_curves(curves, "; ".join(captions)), path)
    return path


def _place(workspace: Workspace, name: str) -> Path:
    folder = workspace.root / "plots"
    commit.make_folder(folder)
    return folder / f"{name}.png"
