"""The work of `nsae report`: from a workspace, or some of its SAEs, to one HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nsae_cli import interrupt
from nsae_cli.analysis import gather
from nsae_cli.analysis.features import FeatureOptions
from nsae_cli.analysis.features_artifact import find_or_measure_features
from nsae_cli.analysis.saes import choose_saes
from nsae_cli.errors import UsageError
from nsae_cli.report.arms import arm_name
from nsae_cli.report.page import render_page
from nsae_cli.report.page_content import FeaturesContent, ReportContent, SaeContent
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.workspace import Artifact, Kind, Workspace, check_name
from nsae_cli.values import Size

#: SAEs in the feature browser if none is asked for; more would leave each too little room on the page.
_BROWSED = 3
_EVERYTHING = "workspace"


class ReportOptions(BaseModel):
    """Options of `nsae report`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Size = Field(500_000, gt=0, description="held-out rows at most that the features are measured on")
    contexts: int = Field(10, ge=1, le=50, description="strongest contexts kept per feature")


@dataclass
class Report:
    """The page: where it is, its bytes, and what was left out of it: {features, curves, histograms: how many}."""

    path: Path
    size: int
    left_out: dict[str, int]


def collect_report(
    references: Sequence[str],
    browse: Sequence[str] | Literal["none"],
    activations: str | None,
    options: ReportOptions,
    workspace: Workspace,
    reporter: Reporter,
) -> ReportContent:
    """Reads what is to be shown; features that are to be browsed are measured first where they were not.

    Args:
        references: names or paths of SAEs or groups; empty for the whole workspace.
        browse: SAEs or groups for the feature browser; empty for a few of those reported on; "none" for no browser.
        activations: a store to measure features on; None for the one each SAE was trained on.

    Raises:
        UsageError: nothing of that name, or nothing to report on.
        ArtifactError: an artifact is damaged.
        NumericalError: a norm of a store is not finite.
        Interrupted: a signal asked to stop; features measured so far are kept.
    """
    artifacts = choose_saes(references, workspace, reporter) if references else gather.all_saes(workspace)
    groups = list(dict.fromkeys(artifact.name.partition("/")[0] for artifact in artifacts))
    saes = []
    for artifact in artifacts:
        interrupt.stop_if_requested("stopped; no page was written, run the same command again")
        saes.append(gather.read_sae(artifact, workspace))
    norms = gather.norms_of(saes, workspace) if references else list(workspace.complete(Kind.NORMS))
    tables = [(name, table) for name, table in gather.read_tables(workspace) if not references or name in groups]
    if not saes and not norms and not tables:
        raise gather.refuse_nothing(workspace)
    browsed = _choose_browsed(browse, artifacts, saes, workspace, reporter)
    features, problems = _features(browsed, activations, options, workspace, reporter, asked=bool(browse))
    named = saes[0].name if len(saes) == 1 else ", ".join(groups)
    return ReportContent(
        title=f"Norm bias of {named}" if references else f"Norm bias in {workspace.root.resolve().name}",
        norms=[gather.read_norms(artifact) for artifact in norms],
        saes=saes,
        tables=tables,
        features=features,
        missing=[*_missing(saes, bool(norms)), *problems],
    )


def write_report(content: ReportContent, workspace: Workspace, name: str) -> Report:
    """Writes reports/NAME/report.html.

    Raises:
        ResourceError: the disk is full, or the folder cannot be written.
    """
    page, left_out = render_page(content)
    path = workspace.root / "reports" / check_name(name) / "report.html"
    commit.make_folder(path.parent)
    commit.remove_leftovers(path.parent)
    commit.write_text(path, page)
    return Report(path, len(page.encode("utf-8")), left_out)


def default_name(references: Sequence[str], content: ReportContent) -> str:
    """The SAE's or the group's name; "workspace" for all of it, "saes" for several groups."""
    if not references:
        return _EVERYTHING
    groups = {sae.name.partition("/")[0] for sae in content.saes}
    if len(content.saes) == 1:
        return content.saes[0].name.replace("/", "-")
    return groups.pop() if len(groups) == 1 else "saes"


def _choose_browsed(
    browse: Sequence[str] | Literal["none"],
    artifacts: Sequence[Artifact],
    saes: Sequence[SaeContent],
    workspace: Workspace,
    reporter: Reporter,
) -> list[Artifact]:
    if browse == "none" or not artifacts:
        return []
    if browse:
        return choose_saes(browse, workspace, reporter)
    if len(artifacts) <= _BROWSED:
        return list(artifacts)
    # One of each method, so that they can be compared; of a method's SAEs one whose features are sparse and many.
    first: dict[str, tuple[float, Artifact]] = {}
    for artifact, sae in zip(artifacts, saes, strict=True):
        method, distance = f"{sae.run['hook']} {arm_name(sae.run)}", _distance_from_usual_l0(sae)
        if method not in first or distance < first[method][0]:
            first[method] = (distance, artifact)
    chosen = [artifact for _, artifact in first.values()][:_BROWSED]
    reporter.note(f"feature browser: {', '.join(artifact.name for artifact in chosen)}; --browse SAE chooses others")
    return chosen


def _distance_from_usual_l0(sae: SaeContent) -> float:
    """|log(L0 ÷ (d_in/8))| over non-sinks; infinite where it is not known."""
    l0, d_in = ((sae.run["metrics"].get("ns") or {}).get("l0"), sae.run.get("d_in"))
    return abs(math.log(8 * l0 / d_in)) if l0 and d_in else math.inf


def _features(
    browsed: Sequence[Artifact],
    activations: str | None,
    options: ReportOptions,
    workspace: Workspace,
    reporter: Reporter,
    *,
    asked: bool,
) -> tuple[list[FeaturesContent], list[str]]:
    """The features of SAEs, and what kept some of them from being measured; that is an error where it was asked for."""
    found, problems = [], []
    wanted = FeatureOptions(rows=options.rows, contexts=options.contexts)
    for artifact in browsed:
        try:
            features = find_or_measure_features(artifact, activations, wanted, workspace, reporter)
        except UsageError as error:
            if asked or activations is not None:
                raise
            problems.append(f"the features of {artifact.name}: {error}")
            reporter.warn(problems[-1])
            continue
        found.append(FeaturesContent(features.document, features.arrays))
    return found, problems


def _missing(saes: Sequence[SaeContent], has_norms: bool) -> list[str]:
    sentences = []
    if not has_norms:
        sentences.append("the norms of the activations: `nsae norms` measures them")
    if not saes:
        sentences.append("SAEs: `nsae train` trains some")
        return sentences
    for what, command, absent in (
        ("high-norm tokens", "analyze-top-norms", [sae.name for sae in saes if sae.top_norms is None]),
        ("the change of cross-entropy", "eval", [sae.name for sae in saes if sae.evaluation is None]),
    ):
        if absent:
            groups = list(dict.fromkeys(name.partition("/")[0] for name in absent))
            shown = " ".join(groups[:3]) if len(absent) > 1 else absent[0]
            some = f"{len(absent)} of the SAEs" if len(absent) < len(saes) else "these SAEs"
            of = some if len(saes) > 1 else "it"
            sentences.append(f"{what} of {of}: `nsae {command} {shown}` measures them")
    return sentences
