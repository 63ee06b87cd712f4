"""Figures of `nsae plot`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from nsae_cli.errors import ArtifactError
from nsae_cli.report.figures import activation_figure, save_png, training_curves
from nsae_cli.report.format import source_line
from nsae_cli.reporter import Reporter
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.store import commit
from nsae_cli.store.commit import read_json
from nsae_cli.store.workspace import Kind, Workspace


def draw_activation(path: Path) -> None:
    """relu and tanh-relu with their derivatives over pre_acts in [−2, 4]."""
    pre_acts = torch.linspace(-2, 4, 601, dtype=torch.float64)
    curves = {}
    for name, nonlinearity in NONLINEARITIES.items():
        acts = nonlinearity.value(pre_acts)
        curves[name] = (acts.numpy(), nonlinearity.derivative(acts).numpy())
    commit.make_folder(path.parent)
    save_png(activation_figure(pre_acts.numpy(), curves), path)


def draw_training(references: Sequence[str], workspace: Workspace, path: Path, reporter: Reporter) -> None:
    """Training curves of SAEs: those named, or the newest group.

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
    for artifact in (found for reference in references for found in workspace.find(Kind.SAE, reference)):
        log = artifact.path / "metrics.jsonl"
        try:
            rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{log} cannot be read ({error}); train the SAE again") from error
        curves.append((artifact.path.name, rows))
        run = read_json(artifact.path / artifact.kind.mark)
        captions[f"activations {run['inputs']['activations']['name']}, {source_line(run)}"] = None
    commit.make_folder(path.parent)
    save_png(training_curves(curves, "; ".join(captions)), path)
