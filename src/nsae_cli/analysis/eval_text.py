"""On which text and model an SAE is evaluated: the held-out contexts that it was not trained on, or the user's text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nsae_cli import assets, catalogue
from nsae_cli.device import DeviceOption
from nsae_cli.errors import ArtifactError, UsageError
from nsae_cli.lm.config import DEFAULT_CONTEXT
from nsae_cli.lm.corpus import BUILTIN, Corpus, CorpusChoice, open_corpus
from nsae_cli.lm.evaluated_rows import RowRules
from nsae_cli.lm.hub import looks_like_hub_id
from nsae_cli.lm.loading import DTypeName, ModelInfo, inspect_model
from nsae_cli.lm.packing import Layout
from nsae_cli.lm.splice import require_hook
from nsae_cli.lm.texts import Text, corpus_text, held_out_text
from nsae_cli.lm.tokenizing import load_tokenizer_for
from nsae_cli.reporter import Reporter, SilentReporter
from nsae_cli.store.contexts import Contexts
from nsae_cli.store.manifest import Manifest, describe_alterations
from nsae_cli.store.profile import profile_hook
from nsae_cli.store.shards import ActivationStore, open_activations
from nsae_cli.store.workspace import Kind, Workspace
from nsae_cli.values import Size

#: Tokens taken of a corpus where --tokens does not say how many.
DEFAULT_TOKENS = 100_000
_OF_A_CORPUS = (
    "corpus_config", "split", "text_column", "chat_column", "tokens_column", "context", "packing", "bos",
)  # fmt: skip


class EvalOptions(BaseModel):
    """Options of eval, as given. None stands for what the SAE was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bins: bool = Field(False, description="splice at single norm bins and at the sinks too")
    tokens: Size | Literal["all"] | None = Field(None, description="most tokens to evaluate on (default all; 100k)")
    model: str | None = Field(None, min_length=1, description="where the model is, if not found by its name")
    corpus: str | None = Field(None, min_length=1, description="evaluate on this text instead")
    corpus_config: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(None, description="split of the built-in corpus or of a hub data set")
    text_column: str | None = Field(None, description="column that holds the text (default text)")
    chat_column: str | None = Field(None, description="column that holds messages, for the model's chat template")
    tokens_column: str | None = Field(None, description="column that holds token ids, used as they are")
    context: Size | None = Field(None, ge=2, description="tokens per context")
    packing: bool | None = Field(None, description="documents share contexts")
    bos: bool | None = Field(None, description="each context starts with the beginning-of-text token")
    batch_size: Size | None = Field(None, ge=1, description="contexts per forward pass (default by the device)")
    model_dtype: Literal["auto"] | DTypeName = Field("fp32", description="computation of the model")
    device: DeviceOption = Field("auto", description="where to compute")

    @model_validator(mode="after")
    def _belongs_to_a_corpus(self) -> EvalOptions:
        given = [name for name in _OF_A_CORPUS if getattr(self, name) is not None]
        if self.corpus is None and given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names}: only with --corpus; without it the text is that of the activations")
        if self.tokens == 0:
            raise ValueError("--tokens 0: expected at least 1")
        return self


@dataclass(frozen=True)
class EvalText:
    """A text and the model that reads it, both checked but not loaded.

    Attributes:
        info: the model.
        identity: `rows` of eval.json but for what only reading the text tells.
        rules: sinks and bins; None to fit them on the rows.
        context_size, packing, bos: how contexts were cut, None where not known.
    """

    info: ModelInfo
    identity: dict[str, Any]
    rules: RowRules | None
    context_size: int | None
    packing: bool | None
    bos: bool | None
    _source: _StoreSource | _CorpusSource

    @property
    def text_key(self) -> str:
        """Equal where the text is."""
        return json.dumps(self.identity, sort_keys=True)

    def read(self, tokens: int | Literal["all"] | None) -> Text:
        """The contexts.

        Raises:
            UsageError: none, or longer ones than the model reads.
            ArtifactError: tokens that the model does not know.
            Interrupted: a signal asked to stop.
        """
        text = self._source.read(self.info, tokens)
        if text.longest > self.info.max_context:
            raise catalogue.CONTEXT_TOO_LONG(
                f"contexts of {text.longest} tokens: {self.info.name} reads at most {self.info.max_context}; "
                f"give a text with --corpus and --context {self.info.max_context}"
            )
        largest = max(int(context.max()) for context in text.contexts)
        if largest >= self.info.vocab_size:
            raise catalogue.TOKENS_OF_ANOTHER_MODEL(
                f"{self._source.name} holds token {largest}, {self.info.name} has 0-{self.info.vocab_size - 1}; "
                f"it was tokenized for another model, give that one with --model"
            )
        return text


@dataclass(frozen=True)
class _StoreSource:
    store: ActivationStore

    @property
    def name(self) -> str:
        return self.store.name

    def read(self, info: ModelInfo, tokens: int | Literal["all"] | None) -> Text:
        return held_out_text(self.store, tokens if isinstance(tokens, int) else None)


@dataclass(frozen=True)
class _CorpusSource:
    corpus: Corpus
    context: int
    packing: bool
    bos: bool
    held_out: bool

    @property
    def name(self) -> str:
        return f"corpus {self.corpus.name}"

    def read(self, info: ModelInfo, tokens: int | Literal["all"] | None) -> Text:
        tokenizer = load_tokenizer_for(self.corpus.content, info, SilentReporter())
        limit = None if tokens == "all" else tokens or DEFAULT_TOKENS
        as_they_are = self.corpus.content == "tokens" and not self.packing
        layout = Layout(self.context, self.packing, self.bos, tokenizer.separator, None, as_they_are)
        return corpus_text(self.corpus, tokenizer, layout, held_out=self.held_out, tokens=limit)


@dataclass(frozen=True)
class _TrainedModel:
    """The model that an SAE's activations are from, as far as it was recorded."""

    name: str | None
    revision: str | None
    sha256: str | None
    recorded_by: str


class TextResolver:
    """Finds text and model for SAEs; what several of them share is opened once.

    Args:
        activations: a store to evaluate on instead of the one that an SAE was trained on.
        options: as given.
        workspace: where stores are looked up.
        reporter: for warnings.

    Raises:
        UsageError: both a store and a corpus are given.
    """

    def __init__(self, activations: str | None, options: EvalOptions, workspace: Workspace, reporter: Reporter) -> None:
        if activations is not None and options.corpus is not None:
            raise catalogue.REFUSED_COMBINATION(
                f"--activations {activations} and --corpus {options.corpus} both say what text to use; give one"
            )
        self._activations, self._options, self._workspace = activations, options, workspace
        self._reporter = reporter
        self._stores: dict[Path, tuple[ActivationStore, Contexts | None]] = {}
        self._corpora: dict[CorpusChoice, Corpus] = {}
        self._models: dict[tuple[str, str | None], ModelInfo] = {}
        self._profiled: dict[tuple[str, str], RowRules] = {}
        self._said: set[str] = set()

    def of(self, sae: str, run: Mapping[str, Any]) -> EvalText:
        """Text and model for one SAE.

        Args:
            sae: its name, for messages.
            run: its run.json.

        Raises:
            UsageError: text or model must be named; a context that the model cannot read.
            ArtifactError: SAE, store and model do not fit together.
            ResourceError: model, hub or corpus not available.
        """
        live = "activations" not in run["inputs"]
        on_corpus = self._options.corpus is not None or (live and self._activations is None)
        text = self._of_corpus(sae, run, live) if on_corpus else self._of_store(sae, run)
        self._check_fit(sae, run, text.info)
        return text

    # A store ---------------------------------------------------------------------------------------------------------

    def _of_store(self, sae: str, run: Mapping[str, Any]) -> EvalText:
        store, same = self._store(sae, run)
        manifest = store.manifest
        if (altered := describe_alterations(manifest)) is not None:
            raise catalogue.TEXT_NOT_IN_STORE(
                f"{store.name}: its {altered}, so the model does not make them; name a store that is as collected with "
                f"--activations, or a text with --corpus"
            )
        recorded = _TrainedModel(manifest.model, manifest.revision, manifest.model_sha256, store.name)
        if run.get("model") is not None and manifest.model is not None and run["model"] != manifest.model:
            raise catalogue.MODEL_MISMATCH(
                f"{sae} was trained on {run['model']}, {store.name} is from {manifest.model}; "
                f"name a store of the same model with --activations"
            )
        info = self._model(recorded)
        corpus = manifest.corpus or {}
        return EvalText(
            info,
            {
                "source": "store",
                "activations": {"name": store.name, "manifest_sha256": store.manifest_sha256},
                **_model_identity(info),
                "corpus": {key: corpus.get(key) for key in ("name", "config", "split", "revision", "sha256")}
                if corpus
                else None,
                "held_out": True,
                "context_size": manifest.context_size,
                "packing": manifest.packing,
                "bos": manifest.bos,
            },
            RowRules.of_run(run) if same else self._store_rules(store, str(run["hook"])),
            manifest.context_size,
            manifest.packing,
            manifest.bos,
            _StoreSource(store),
        )

    def _store(self, sae: str, run: Mapping[str, Any]) -> tuple[ActivationStore, bool]:
        """The store to evaluate on, and whether the SAE was trained on it."""
        trained_on = run["inputs"].get("activations")
        if self._activations is not None:
            [artifact] = self._workspace.find(Kind.ACTIVATIONS, self._activations)
            store = self._open(artifact.path)
            return store, trained_on is not None and store.manifest_sha256 == trained_on["manifest_sha256"]
        assert trained_on is not None
        try:
            [artifact] = self._workspace.find_recorded(Kind.ACTIVATIONS, trained_on["name"])
        except UsageError as error:
            raise catalogue.STORE_OF_SAE_MISSING(
                f"the activations {trained_on['name']!r} that {sae} was trained on are not in {self._workspace.place}; "
                f"name a store with --activations, or a text with --corpus"
            ) from error
        store = self._open(artifact.path)
        if store.manifest_sha256 != trained_on["manifest_sha256"]:
            raise catalogue.STORE_CHANGED(
                f"{store.name} is not the store that {sae} was trained on (its manifest has changed); name the right "
                f"one with --activations, or this one on purpose: --activations {store.name}"
            )
        return store, True

    def _open(self, path: Path) -> ActivationStore:
        if path not in self._stores:
            self._stores[path] = (open_activations(path), None)
        return self._stores[path][0]

    def _store_rules(self, store: ActivationStore, hook: str) -> RowRules | None:
        """The rules of another store than the one trained on; None where it has no norms at the hook."""
        key = (store.manifest_sha256, hook)
        if hook not in {*store.manifest.hooks, *(store.manifest.norm_hooks or [])}:
            return None
        if key not in self._profiled:
            self._profiled[key] = RowRules.of_profile(profile_hook(store, hook, Contexts(store)), "store")
        return self._profiled[key]

    # A corpus --------------------------------------------------------------------------------------------------------

    def _of_corpus(self, sae: str, run: Mapping[str, Any], live: bool) -> EvalText:
        recorded, trained_corpus = self._trained_with(run, live)
        info = self._model(recorded)
        options = self._options
        corpus = self._corpus(self._choice(sae, trained_corpus))
        context = options.context or run.get("context_size") or min(DEFAULT_CONTEXT, info.max_context)
        if context > info.max_context:
            raise catalogue.CONTEXT_TOO_LONG(
                f"--context {context}: {info.name} reads at most {info.max_context} tokens"
            )
        packing, bos = (
            given if given is not None else run.get(key) is not False
            for key, given in (("packing", options.packing), ("bos", options.bos))
        )
        same_text = _same_corpus(corpus, trained_corpus)
        as_trained = (context, packing, bos) == (run.get("context_size"), run.get("packing"), run.get("bos"))
        held_out = same_text and live and as_trained
        if same_text and not held_out:
            self._warn(f"{sae} was trained on corpus {corpus.name}: text that it has seen is among what is evaluated")
        identity = {
            "source": "corpus",
            "activations": None,
            **_model_identity(info),
            "corpus": {**corpus.identity, "text_column": options.text_column},
            "held_out": held_out,
            "context_size": context,
            "packing": packing,
            "bos": bos,
        }
        rules = RowRules.of_run(run) if held_out else None
        source = _CorpusSource(corpus, context, packing, bos, held_out)
        return EvalText(info, identity, rules, context, packing, bos, source)

    def _trained_with(self, run: Mapping[str, Any], live: bool) -> tuple[_TrainedModel, Mapping[str, Any]]:
        """The model that an SAE was trained on, and the corpus; as far as the SAE or its store tell."""
        inputs = run["inputs"]
        if live and isinstance(inputs.get("model"), Mapping):
            model = inputs["model"]
            recorded = _TrainedModel(model.get("name"), model.get("revision"), model.get("sha256"), "the SAE")
            return recorded, inputs.get("corpus") or {}
        manifest = self._manifest(inputs.get("activations"))
        if manifest is None:
            return _TrainedModel(run.get("model"), None, None, "the SAE"), {}
        return _TrainedModel(manifest.model, manifest.revision, manifest.model_sha256, "its store"), (
            manifest.corpus or {}
        )

    def _manifest(self, trained_on: Mapping[str, Any] | None) -> Manifest | None:
        """The manifest of the store that an SAE was trained on, if it is still there."""
        folder = None if trained_on is None else self._workspace.folder(Kind.ACTIVATIONS, trained_on["name"])
        if folder is None or trained_on is None or not (folder / Kind.ACTIVATIONS.mark).is_file():
            return None
        store = self._open(folder)
        return store.manifest if store.manifest_sha256 == trained_on["manifest_sha256"] else None

    def _choice(self, sae: str, trained: Mapping[str, Any]) -> CorpusChoice:
        options = self._options
        if options.corpus is not None:
            return CorpusChoice(
                options.corpus,
                options.corpus_config,
                options.split,
                options.text_column,
                options.chat_column,
                options.tokens_column,
            )
        name = trained.get("name")
        # Of a file or folder only the base name is recorded.
        if name is None or (name != BUILTIN and (trained.get("sha256") is not None or not looks_like_hub_id(name))):
            raise catalogue.TEXT_NOT_IN_STORE(
                f"{sae} was trained on the model as it ran over {name or 'a corpus'}; say where that text is with "
                f"--corpus, or give another one"
            )
        columns = {key: trained.get(key) for key in ("text_column", "chat_column", "tokens_column")}
        if name == BUILTIN:
            columns = {}
        return CorpusChoice(name, trained.get("config"), trained.get("split"), **columns)

    def _corpus(self, choice: CorpusChoice) -> Corpus:
        if choice not in self._corpora:
            self._corpora[choice] = open_corpus(choice)
        return self._corpora[choice]

    # The model -------------------------------------------------------------------------------------------------------

    def _model(self, recorded: _TrainedModel) -> ModelInfo:
        given = self._options.model
        name = given or recorded.name
        if name is None:
            raise catalogue.SOURCE_UNKNOWN(f"{recorded.recorded_by} does not say which model it is from; give --model")
        local = recorded.sha256 is not None and name not in assets.EMBEDDED_MODELS
        if given is None and local and not Path(name).is_dir():
            raise catalogue.MODEL_FOLDER_MISSING(
                f"the model {name!r} that {recorded.recorded_by} is from was a folder, and none of that name is here; "
                f"say where it is with --model DIR"
            )
        key = (name, None if given is not None else recorded.revision)
        if key not in self._models:
            self._models[key] = inspect_model(*key)
        info = self._models[key]
        if recorded.sha256 is not None and info.model_sha256 is not None and recorded.sha256 != info.model_sha256:
            raise catalogue.MODEL_MISMATCH(
                f"--model {name} is not the model that {recorded.recorded_by} is from ({recorded.name}): their weights "
                f"differ; give the right one with --model"
            )
        if given is not None and recorded.name not in (None, info.name) and recorded.sha256 != info.model_sha256:
            self._warn(f"{recorded.recorded_by} is from {recorded.name}; that --model {given} is the same is not known")
        # A folder may have another name than the one that was recorded; what is the same model keeps its name.
        same = recorded.sha256 is not None and recorded.sha256 == info.model_sha256
        return dataclasses.replace(info, name=recorded.name) if same and recorded.name else info

    @staticmethod
    def _check_fit(sae: str, run: Mapping[str, Any], info: ModelInfo) -> None:
        hook = str(run["hook"])
        try:
            require_hook(hook, info.n_layers, info.name, info.sites)
        except ArtifactError as error:
            error.reword(lambda message: f"{sae}: {message}")
            raise
        if run["d_in"] != info.d_model:
            raise catalogue.WIDTH_MISMATCH(
                f"{sae} reads vectors of width {run['d_in']}, {info.name} has width {info.d_model}; the SAE belongs "
                f"to another model, give that one with --model"
            )

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._reporter.warn(text)


def _model_identity(info: ModelInfo) -> dict[str, Any]:
    return {"model": info.name, "model_revision": info.revision, "model_sha256": info.model_sha256}


def _same_corpus(corpus: Corpus, trained: Mapping[str, Any]) -> bool:
    """Whether a corpus is the one trained on: by content where that is known, else by name, configuration and split."""
    if corpus.other_column != {key: trained[key] for key in ("chat_column", "tokens_column") if trained.get(key)}:
        return False
    if corpus.sha256 is not None and trained.get("sha256") is not None:
        return corpus.sha256 == trained["sha256"]
    return all(corpus.identity[key] == trained.get(key) for key in ("name", "config", "split")) and bool(trained)
