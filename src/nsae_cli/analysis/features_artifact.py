"""Features as artifacts `features/NAME`: measured once per SAE, for the feature browser of `nsae report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nsae_cli import catalogue
from nsae_cli.analysis.checks import say_what_is_missing
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.features import FeatureOptions, measure_features
from nsae_cli.analysis.top_norms import check_fit
from nsae_cli.analysis.top_norms_artifact import store_of
from nsae_cli.lm.token_text import token_text
from nsae_cli.lm.unembedding import load_unembedding
from nsae_cli.reporter import Reporter
from nsae_cli.store import commit
from nsae_cli.store.data_files import read_arrays
from nsae_cli.store.sae_folder import SavedSae, load_sae
from nsae_cli.store.shards import ActivationStore
from nsae_cli.store.workspace import Artifact, Kind, Workspace

TENSORS = "features.safetensors"
_NEEDED = (
    "density", "mass", "mean_act", "sink_share", "norm_correlation", "decoder_norm",
    "top_act", "top_row", "window_tokens", "window_acts", "window_inside",
)  # fmt: skip


@dataclass
class FeaturesArtifact:
    """The artifact, its features.json and the tensors of features.safetensors."""

    artifact: Artifact
    document: dict[str, Any]
    arrays: dict[str, np.ndarray]


def find_or_measure_features(
    sae: Artifact, activations: str | None, options: FeatureOptions, workspace: Workspace, reporter: Reporter
) -> FeaturesArtifact:
    """The features of an SAE: as an earlier command left them, else measured now.

    What an earlier command measured on another store, with other options or of other weights is replaced.

    Raises:
        UsageError: the SAE's store is not there (see `store_of`), or holds out no rows.
        ArtifactError: the SAE or its store is damaged, or they do not fit.
        NumericalError: a norm of the store is not finite.
        Interrupted: a signal asked to stop; nothing was written.
    """
    saved = load_sae(sae.path)
    store = store_of(saved, activations, workspace)
    check_fit(saved, store)
    name = sae.name.replace("/", "-")
    artifact = Artifact(Kind.FEATURES, name, workspace.folder(Kind.FEATURES, name))
    mark = artifact.path / Kind.FEATURES.mark
    wanted = {
        "sae": {"name": sae.name, "weights_sha256": saved.run.get("weights_sha256")},
        "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
        "options": options.model_dump(),
    }
    if mark.is_file():
        document = read_document(artifact, required=("sae", "activations", "options", "tokens"))
        if all(document[key] == value for key, value in wanted.items()):
            workspace.tidy(artifact.path, reporter)
            return FeaturesArtifact(artifact, document, _load(artifact, document))
        reporter.note(f"{artifact.path} is of other rows, options or weights: measured again")
    with workspace.writing(artifact.path, reporter):
        return _measure(saved, sae.name, store, options, artifact, reporter)


def _measure(
    saved: SavedSae, sae_name: str, store: ActivationStore, options: FeatureOptions, artifact: Artifact,
    reporter: Reporter,
) -> FeaturesArtifact:  # fmt: skip
    """Measures and writes; an earlier measurement of the name loses its mark first."""
    mark = artifact.path / Kind.FEATURES.mark
    if mark.is_file():
        commit.remove_file(mark)
    say_what_is_missing(store, reporter)
    unembedding = load_unembedding(store.manifest, reporter)
    result = measure_features(
        saved, sae_name, store, options, token_text(store.manifest, reporter), unembedding, reporter
    )
    commit.make_folder(artifact.path)
    commit.remove_leftovers(artifact.path)
    commit.write_tensors(artifact.path / TENSORS, result.tensors)
    written = commit.write_document(mark, result.document, [TENSORS])
    return FeaturesArtifact(artifact, written, {key: t.numpy() for key, t in result.tensors.items()})


def _load(artifact: Artifact, document: dict[str, Any]) -> dict[str, np.ndarray]:
    path = artifact.path / TENSORS
    remedy = f"delete the folder {artifact.path} and run again"
    arrays = read_arrays(path, document)
    for name in _NEEDED:
        if name not in arrays or len(arrays[name]) != document.get("d_sae"):
            raise catalogue.RESULTS_DAMAGED(
                f"{path}: {name} is missing or not of {document.get('d_sae')} features; {remedy}"
            )
    return arrays
