"""The work of `nsae eval`: from SAEs to the artifacts `evals/NAME`."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nsae_cli import catalogue
from nsae_cli.analysis.behaviour import BehaviourStudy, Evaluation, Subject, batch_contexts
from nsae_cli.analysis.documents import read_document
from nsae_cli.analysis.eval_text import EvalOptions, EvalText, TextResolver
from nsae_cli.analysis.saes import choose_saes, result_names
from nsae_cli.assets import embedded_note
from nsae_cli.device import choose_device
from nsae_cli.lm.loading import DTYPE_NAMES, DTypeName, ModelInfo, choose_model_dtype, load_model
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.texts import Text
from nsae_cli.metrics.sae_lens_names import sae_lens_names
from nsae_cli.reporter import Reporter
from nsae_cli.sae.objective import Objective
from nsae_cli.store import commit
from nsae_cli.store.sae_folder import load_sae
from nsae_cli.store.shards import describe_changes
from nsae_cli.store.workspace import Artifact, Kind, Workspace, log_timing
from nsae_cli.training.evaluate import evaluate

FORMAT_VERSION = 1
CONTEXTS = "contexts.safetensors"


@dataclass
class EvalArtifact:
    """One SAE's evaluation: the artifact, its eval.json and whether it was there already."""

    artifact: Artifact
    document: dict[str, Any]
    already_complete: bool


@dataclass
class EvalResult:
    """What a run made: one artifact per SAE, in the order of the SAEs."""

    results: list[EvalArtifact]

    @property
    def already_complete(self) -> bool:
        """Whether every artifact was there before."""
        return all(result.already_complete for result in self.results)


def run_eval(
    references: Sequence[str],
    activations: str | None,
    options: EvalOptions,
    workspace: Workspace,
    name: str | None,
    reporter: Reporter,
) -> EvalResult:
    """Evaluates SAEs on held-out text, or finds their evaluations complete.

    Each artifact is complete as soon as its SAE is done, so that the same command goes on after an interruption.

    Args:
        references: names or paths of SAEs and groups; empty for the newest.
        activations: a store whose held-out text is used instead of that of the store trained on.
        options: as given.
        workspace: where SAEs and stores are, and where the results go.
        name: of the result; with several SAEs each adds its cell's name.
        reporter: for progress and warnings.

    Raises:
        UsageError: nothing of that name, a name that holds another evaluation, no text to use.
        ArtifactError: damaged or unfinished artifacts; SAE, text and model that do not fit together.
        ResourceError: model, hub, corpus, device, memory or disk not available.
        NumericalError: an SAE or the model gives values that are not finite.
        Interrupted: a signal asked to stop.
    """
    saes = choose_saes(references, workspace, reporter, from_hub=True)
    names = result_names(saes, name)
    if twice := sorted({one for one in names if names.count(one) > 1}):
        raise catalogue.SAME_OUTPUT(
            f"two SAEs would both be evaluated as {twice[0]}; give them one by one, each with a --name"
        )
    device, why = choose_device(options.device)
    model_dtype = choose_model_dtype(options.model_dtype, device)
    with quiet_libraries():
        resolver = TextResolver(activations, options, workspace, reporter)
        jobs = [
            _Job.plan(sae, result_name, resolver, options, model_dtype, workspace)
            for sae, result_name in zip(saes, names, strict=True)
        ]
        done = {job.name: document for job in jobs if (document := job.earlier()) is not None}
        waiting = [job for job in jobs if job.name not in done]
        for job in jobs:
            if job.name in done:
                workspace.tidy(job.artifact.path, reporter)
        if done and waiting:
            reporter.note(f"{len(done)} of {len(jobs)} evaluations are already complete")
        fresh: dict[str, dict[str, Any]] = {}
        runner = _Runner(options, device, model_dtype, workspace, reporter)
        if waiting:
            reporter.note(f"device {why}, {model_dtype}")
        for _, group in itertools.groupby(sorted(waiting, key=lambda job: job.shared_key), lambda job: job.shared_key):
            for job, document in runner.run(list(group)):
                fresh[job.name] = document
    return EvalResult([EvalArtifact(job.artifact, (done | fresh)[job.name], job.name in done) for job in jobs])


@dataclass(frozen=True)
class _Job:
    """One SAE to evaluate. Its weights are loaded when its turn comes."""

    sae: Artifact
    run: dict[str, Any]
    text: EvalText
    options: dict[str, Any]
    artifact: Artifact

    @classmethod
    def plan(
        cls,
        sae: Artifact,
        name: str,
        resolver: TextResolver,
        options: EvalOptions,
        model_dtype: DTypeName,
        workspace: Workspace,
    ) -> _Job:
        run = load_sae(sae.path).run
        recorded = {"bins": options.bins, "tokens": options.tokens, "model_dtype": model_dtype}
        folder = workspace.folder(Kind.EVAL, name)
        return cls(sae, run, resolver.of(sae.name, run), recorded, Artifact(Kind.EVAL, name, folder))

    @property
    def name(self) -> str:
        return self.artifact.name

    @property
    def wanted(self) -> dict[str, Any]:
        """What the evaluation depends on."""
        return {
            "sae": {"name": self.sae.name, "weights_sha256": self.run.get("weights_sha256")},
            "rows": self.text.identity,
            "options": self.options,
        }

    @property
    def shared_key(self) -> str:
        """Equal for SAEs that can share passes of the model."""
        return json.dumps([self.text.text_key, self.run["hook"], repr(self.text.rules)])

    def earlier(self) -> dict[str, Any] | None:
        """The document of a complete evaluation of this name.

        Raises:
            UsageError: it is another evaluation.
            ArtifactError: it is damaged.
        """
        if not (self.artifact.path / Kind.EVAL.mark).is_file():
            return None
        document = read_document(self.artifact, required=("sae", "rows", "options", "metrics", "behaviour"))
        wanted = self.wanted
        rows = {key: document["rows"].get(key) for key in wanted["rows"]}
        if {"sae": document["sae"], "rows": rows, "options": document["options"]} == wanted:
            return document
        raise catalogue.NAME_TAKEN(
            f"--name {self.name} holds another evaluation ({_difference(document, wanted)}); choose another --name"
        )


def _difference(document: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = document["sae"], wanted["sae"]
    if old != new:
        return f"SAE {old['name']} " + ("has changed since" if old["name"] == new["name"] else f"-> {new['name']}")
    if document["options"] != wanted["options"]:
        return describe_changes(document["options"], wanted["options"])
    for key, value in wanted["rows"].items():
        if document["rows"].get(key) != value:
            before, after = (part.get("name") if isinstance(part, Mapping) else part for part in
                             (document["rows"].get(key), value))  # fmt: skip
            return f"{key} {before} has changed since" if before == after else f"{key} {before} -> {after}"
    return "the rows have changed"


class _Runner:
    """Evaluates groups of SAEs that share model, text and hook."""

    def __init__(
        self,
        options: EvalOptions,
        device: torch.device,
        model_dtype: DTypeName,
        workspace: Workspace,
        reporter: Reporter,
    ) -> None:
        self._options, self._device, self._dtype = options, device, model_dtype
        self._workspace, self._reporter = workspace, reporter
        self._model: tuple[ModelInfo, nn.Module] | None = None
        self._text: tuple[str, Text] | None = None

    def run(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, dict[str, Any]]]:
        """The jobs' documents, each after its artifact is complete."""
        first = jobs[0]
        info = first.text.info
        if self._text is None or self._text[0] != first.text.text_key:
            self._text = (first.text.text_key, first.text.read(self._options.tokens))
            text = self._text[1]
            where = first.text.identity["activations"] or first.text.identity["corpus"] or {}
            kind = "held-out contexts" if first.text.identity["held_out"] else "contexts"
            self._reporter.note(f"{len(text.contexts):,} {kind}, {text.tokens:,} tokens of {where.get('name')}")
        text = self._text[1]
        study = BehaviourStudy(
            self._loaded(info),
            info.family,
            str(first.run["hook"]),
            text,
            first.text.rules,
            bins=self._options.bins,
            batch_size=self._options.batch_size or batch_contexts(self._device, text.longest, info.vocab_size),
            reporter=self._reporter,
        )
        started = time.perf_counter()
        for job, evaluation in zip(jobs, study.evaluate(map(self._subject, jobs)), strict=True):
            document = _document(job, study, text, evaluation)
            with self._workspace.writing(job.artifact.path, self._reporter):
                commit.make_folder(job.artifact.path)
                commit.remove_leftovers(job.artifact.path)
                commit.write_tensors(job.artifact.path / CONTEXTS, evaluation.tensors)
                document = commit.write_document(job.artifact.path / Kind.EVAL.mark, document, [CONTEXTS])
            with contextlib.suppress(OSError):
                seconds = round(time.perf_counter() - started, 3)
                log_timing(job.artifact.path, "eval", device=str(self._device), together=len(jobs), seconds=seconds)
            yield job, document

    def _loaded(self, info: ModelInfo) -> nn.Module:
        if self._model is None or self._model[0] != info:
            self._model = None  # so that there are never two in memory
            self._model = (info, load_model(info, self._device, DTYPE_NAMES[self._dtype], with_head=True))
        return self._model[1]

    def _subject(self, job: _Job) -> Subject:
        sae = load_sae(job.sae.path).sae
        objective, unit = Objective.from_run(job.run), job.run["config"]["decoder"] == "unit"
        return Subject(job.sae.name, sae.to(self._device), lambda rows: evaluate(sae, objective, unit, rows).metrics)


def _document(job: _Job, study: BehaviourStudy, text: Text, evaluation: Evaluation) -> dict[str, Any]:
    rules, thresholds = study.rules, study.rules.thresholds
    return {
        "format_version": FORMAT_VERSION,
        "sae": job.wanted["sae"],
        "rows": {**job.text.identity, "contexts": len(text.contexts), "tokens": text.tokens},
        "options": job.options,
        "model": job.text.info.name,
        "embedded_note": embedded_note(job.text.info.name),
        "context_size": job.text.context_size,
        "packing": job.text.packing,
        "bos": job.text.bos,
        "hook": job.run["hook"],
        "d_in": job.run["d_in"],
        "d_sae": job.run["d_sae"],
        "config": job.run["config"],
        "norm_scale": rules.norm_scale,
        "edges": None if rules.edges is None else list(rules.edges),
        "sinks": {
            "rules_from": rules.source,
            **study.sink_counts.to_json(),
            "median": thresholds.median,
            "median_position0": thresholds.median_position0,
            "median_elsewhere": thresholds.median_elsewhere,
        },
        "metrics": evaluation.metrics,
        "behaviour": evaluation.behaviour,
        "sae_lens": sae_lens_names(evaluation.metrics, evaluation.behaviour),
    }
