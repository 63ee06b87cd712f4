"""Figures of `nsae plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from nsae_cli import catalogue
from nsae_cli.analysis import gather
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.saes import choose_saes
from nsae_cli.analysis.top_norms_artifact import load_rows
from nsae_cli.errors import UsageError
from nsae_cli.report import figures
from nsae_cli.report.arms import pareto_point
from nsae_cli.report.format import short_labels, source_line, trained_on
from nsae_cli.reporter import Reporter
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.store import commit
from nsae_cli.store.workspace import Artifact, Kind, Workspace

#: Panels of one figure at most; more are too small to read.
_PANELS = 24

#: A figure and what is appended to the name of its file.
Named = tuple[str, Figure]
Drawer = Callable[[Sequence[str], Workspace, Reporter], tuple[str, list[Named]]]


def draw(
    what: str,
    references: Sequence[str],
    formats: Sequence[str],
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
) -> list[Path]:
    """Draws a subject and writes plots/NAME.FORMAT in the workspace; returns the files.

    Args:
        what: one of `SUBJECTS`.
        references: what to draw: SAEs or groups; for norms and top-norms, artifacts of `nsae norms` and
            `nsae analyze-top-norms`; empty for the newest.
        formats: of `figures.FORMATS`.
        name: of the files; None for a name made from what is drawn.

    Raises:
        UsageError: nothing of that name, or nothing to draw.
        ArtifactError: an artifact is damaged.
    """
    default, drawn = SUBJECTS[what](references, workspace, reporter)
    folder = workspace.root / "plots"
    commit.make_folder(folder)
    return [
        file
        for suffix, figure in drawn
        for file in figures.save_figure(figure, folder / f"{name or default}{suffix}", formats)
    ]


def _activation(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    """relu and tanh-relu with their derivatives over pre_acts in [−2, 4]."""
    if references:
        raise catalogue.PLOT_INPUT(
            f"plot activation draws no SAE; did you mean `nsae plot training {' '.join(references)}`?"
        )
    pre_acts = torch.linspace(-2, 4, 601, dtype=torch.float64)
    curves = {}
    for act, nonlinearity in NONLINEARITIES.items():
        acts = nonlinearity.value(pre_acts)
        curves[act] = (acts.numpy(), nonlinearity.derivative(acts).numpy())
    return "activation", [("", figures.activation_figure(pre_acts.numpy(), curves))]


def _training(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    saes, caption = _saes(references, workspace, reporter)
    curves = [(artifact.path.name, gather.read_curves(artifact)) for artifact in saes]
    return _group(saes, "training"), [("", figures.training_curves(curves, caption))]


def _bias(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    saes, caption = _saes(references, workspace, reporter)
    _refuse_many(len(saes), "bias")
    labels = short_labels([artifact.name for artifact in saes])
    curves = [(label, gather.read_curves(artifact)) for label, artifact in zip(labels, saes, strict=True)]
    return f"{_group(saes, 'saes')}-bias", [("", figures.bias_figure(curves, caption))]


def _pareto(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    saes, caption = _saes(references, workspace, reporter)
    found = [gather.read_measured_run(artifact, workspace) for artifact in saes]
    points = [pareto_point(sae.name, run, evaluation) for sae, (run, evaluation) in zip(saes, found, strict=True)]
    if not any(point.l0 is not None and point.fvu is not None for point in points):
        raise catalogue.PLOT_INPUT(
            "none of these SAEs has L0 and an error on non-sink tokens; train on more than 20 contexts"
        )
    caption = f"{caption}; held-out tokens. Methods compare where they reach the same L0, not elsewhere."
    return f"{_group(saes, 'saes')}-pareto", [("", figures.pareto_figure(points, caption))]


def _norms(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    artifact = _one(Kind.NORMS, references, workspace, reporter)
    norms = gather.read_norms(artifact)
    counts, edges = norms.arrays["counts"], norms.arrays["edges"]
    drawn = [("", figures.norm_heatmap(norms.document, counts, edges))]
    apart = figures.norm_heatmap_position0(norms.document, counts, edges, norms.arrays["position0_counts"])
    if apart is not None:
        drawn.append(("-position0", apart))
    return f"{artifact.name}-norms", drawn


def _top_norms(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[str, list[Named]]:
    if references:
        artifacts = [found for reference in references for found in _top_norms_of(reference, workspace)]
    else:
        artifacts = [_one(Kind.TOP_NORMS, references, workspace, reporter)]
    _refuse_many(len(artifacts), "top-norms")
    documents = [read_document(artifact, required=("sae", "activations", "groups")) for artifact in artifacts]
    rows = [load_rows(artifact, document) for artifact, document in zip(artifacts, documents, strict=True)]
    if len(artifacts) == 1:
        drawn = [
            ("-l0", figures.l0_histogram(rows[0], documents[0])),
            ("-l1", figures.l1_histogram(rows[0], documents[0])),
        ]
        return artifacts[0].name, drawn
    labels = short_labels([str(document["sae"]["name"]) for document in documents])
    saes = list(zip(labels, rows, documents, strict=True))
    drawn = [("-l0", figures.compare_histograms(saes, "l0")), ("-l1", figures.compare_histograms(saes, "l1"))]
    groups = {str(document["sae"]["name"]).partition("/")[0] for document in documents}
    return groups.pop() if len(groups) == 1 else "top-norms", drawn


SUBJECTS: dict[str, Drawer] = {
    "activation": _activation,
    "training": _training,
    "bias": _bias,
    "pareto": _pareto,
    "norms": _norms,
    "top-norms": _top_norms,
}


def _saes(references: Sequence[str], workspace: Workspace, reporter: Reporter) -> tuple[list[Artifact], str]:
    """The SAEs to draw, and a caption that says what they were trained on."""
    saes = choose_saes(references, workspace, reporter)
    captions = {f"{trained_on(run)}, {source_line(run)}": None for run in map(gather.read_run, saes)}
    return saes, "; ".join(captions)


def _group(saes: Sequence[Artifact], otherwise: str) -> str:
    groups = {artifact.name.partition("/")[0] for artifact in saes}
    return groups.pop() if len(groups) == 1 else otherwise


def _one(kind: Kind, references: Sequence[str], workspace: Workspace, reporter: Reporter) -> Artifact:
    if len(references) > 1:
        raise catalogue.PLOT_INPUT(f"{' '.join(references)}: {kind.folder} are drawn one at a time; name one")
    if references:
        [artifact] = workspace.find(kind, references[0])
        return artifact
    newest = workspace.newest(kind)
    reporter.note(f"using the newest {kind.folder}: {newest.name}")
    return newest


def _top_norms_of(reference: str, workspace: Workspace) -> list[Artifact]:
    """A name of an analysis, else an SAE or a group: the analyses of its SAEs."""
    if (workspace.folder(Kind.TOP_NORMS, reference) / Kind.TOP_NORMS.mark).is_file():
        return workspace.find(Kind.TOP_NORMS, reference)
    try:
        saes = workspace.find(Kind.SAE, reference)
    except UsageError:
        return workspace.find(Kind.TOP_NORMS, reference)  # a path, or the message that names what there is
    found = []
    for sae in saes:
        name = sae.name.replace("/", "-")
        folder = workspace.folder(Kind.TOP_NORMS, name)
        if not (folder / Kind.TOP_NORMS.mark).is_file():
            raise catalogue.ANALYSIS_MISSING(
                f"{sae.name} has no top-norm analysis; run `nsae analyze-top-norms {reference}` first"
            )
        found.append(Artifact(Kind.TOP_NORMS, name, folder))
    return found


def _refuse_many(panels: int, what: str) -> None:
    if panels > _PANELS:
        raise catalogue.PLOT_INPUT(
            f"plot {what}: {panels} SAEs in one figure are too many to read, at most {_PANELS}; name some"
        )
