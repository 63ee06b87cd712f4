"""The options of `nsae train` as a whole, and the source of rows that they choose: a store or a model."""

from __future__ import annotations

from pydantic import Field, model_validator

from nsae_cli import catalogue
from nsae_cli.lm.config import CollectConfig, HarvestOptions
from nsae_cli.lm.corpus import refuse_output_in_corpus
from nsae_cli.lm.live import LiveSource
from nsae_cli.store.shards import open_activations
from nsae_cli.store.workspace import Artifact, Workspace
from nsae_cli.training.options import TrainOptions
from nsae_cli.training.parallel.ranks import ALONE, Ranks
from nsae_cli.training.source import StoreSource, TrainingSource
from nsae_cli.values import Size


class TrainCommandOptions(TrainOptions, HarvestOptions):
    """Options of training, with those that say what a model reads."""

    from_model: str | None = Field(None, min_length=1, description="train on this model's activations as it makes them")
    harvest_batch_size: Size | None = Field(None, ge=1, description="contexts per forward pass")

    @model_validator(mode="after")
    def _belongs_to_a_model(self) -> TrainCommandOptions:
        given = self.model_fields_set & {*HarvestOptions.model_fields, "harvest_batch_size"}
        if self.from_model is None and given:
            names = ", ".join(f"--{field.replace('_', '-')}" for field in type(self).model_fields if field in given)
            raise ValueError(f"{names}: only with --from-model; a store was collected with its own")
        return self

    def collect_config(self) -> CollectConfig:
        """What the model is to read, as `nsae collect` would be told."""
        return CollectConfig(
            **{field: getattr(self, field) for field in HarvestOptions.model_fields},
            model=self.from_model or "",
            layers=self.layers,  # type: ignore[arg-type]  # numbers and lists become text
            batch_size=self.harvest_batch_size,
            device=self.device,
        )


def choose_source(
    options: TrainCommandOptions, store: Artifact | None, workspace: Workspace, ranks: Ranks = ALONE
) -> TrainingSource:
    """The model of ``--from-model``, else the store.

    Args:
        options: as given.
        store: the activations; None exactly where a model is given.
        workspace: where the SAEs go.
        ranks: the processes that train together.

    Raises:
        UsageError: layers that are not there, options that do not fit model or corpus, a workspace in the corpus.
        ArtifactError: store or model is damaged.
        ResourceError: model, hub, corpus or device not available.
    """
    if store is None:
        if ranks.size > 1:
            raise catalogue.REFUSED_COMBINATION(
                f"--from-model with {ranks.mesh}: each would run the model over all of the text; collect a store first "
                f"with `nsae collect`"
            )
        config = options.collect_config()
        refuse_output_in_corpus(config.corpus_choice(embedded_model=False), workspace.root)
        return LiveSource(config, options.buffer)
    return StoreSource(open_activations(store.path), options, ranks.share)
