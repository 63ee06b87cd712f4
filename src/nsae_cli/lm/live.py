"""Training rows straight from a model: `nsae train --from-model`. No vector touches the disk.

The corpus's contexts are numbered as in a store; every twentieth is held out. They are harvested window by window
(`windows`), one window in memory at a time, and the training rows of a window are permuted by a generator seeded from
(seed, epoch, window), as `store.batches` does it. So the order is a pure function of the options and the position:
going on from a checkpoint harvests the first window, from which profile and held-out rows are taken, and the window
that was in memory; contexts between them are tokenized and passed over.

Where one window covers the whole corpus, all of this equals training on a store of the same rows in one shard, bit by
bit. In longer corpora the rows are the same, in another order, and the profile is that of the first window.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn, TypeVar

import torch

from nsae_cli import catalogue, interrupt
from nsae_cli.device import choose_device, one_thread_if_small
from nsae_cli.errors import Interrupted, NsaeError
from nsae_cli.lm.config import BatchRoom, CollectConfig, ResolvedConfig, resolve
from nsae_cli.lm.corpus import Corpus, open_corpus
from nsae_cli.lm.harvest import Harvester, HarvestSpec
from nsae_cli.lm.layers import hook_name
from nsae_cli.lm.loading import DTYPE_NAMES, ModelInfo, inspect_model, load_model
from nsae_cli.lm.packing import Context, Packer
from nsae_cli.lm.quiet import quiet_libraries
from nsae_cli.lm.tokenizing import DocumentTokenizer, load_tokenizer_for
from nsae_cli.lm.windows import ContextWindows, PlannedWindow
from nsae_cli.reporter import Reporter, SilentReporter
from nsae_cli.store.batches import Batch, HookRows, cut_batches, split_rows, stable_seed
from nsae_cli.store.contexts import HELD_OUT_EVERY
from nsae_cli.store.profile import HookProfile, find_massive, profile_rows
from nsae_cli.store.provenance import Provenance
from nsae_cli.store.shards import describe_changes

#: Text up to which the default of --tokens is counted out; tokenizing so much takes seconds.
COUNTED_BYTES = 32 * 2**20

_POSITION = "stream/position"

T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """Harvested rows of one window, in the order of the corpus.

    Attributes:
        number: of the window in its epoch.
        x: by hook, in the storage dtype, [rows, d_model], on the training device.
        norms: by hook, float32 [rows].
        massive: by hook, rows that sink rule 3 catches, bool [rows].
        positions: index in the context, int64 [rows].
        contexts: number of the context in the corpus, int64 [rows].
    """

    number: int
    x: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    massive: dict[str, torch.Tensor]
    positions: torch.Tensor
    contexts: torch.Tensor

    @property
    def held_out(self) -> torch.Tensor:
        """Rows that are never trained on, bool [rows]."""
        return self.contexts % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    def sinks(self, profile: HookProfile) -> torch.Tensor:
        """Rows that are sinks at the profile's hook, bool [rows]."""
        return profile.flag_rows(self.norms[profile.hook], self.positions, self.massive[profile.hook]).any

    def rows(self, profile: HookProfile) -> HookRows:
        """All rows of a hook, on the training device."""
        x, norms = self.x[profile.hook], self.norms[profile.hook]
        groups = profile.groups(norms, self.sinks(profile))
        return HookRows(x, norms.to(x.device), groups.to(x.device), profile.is_zero(norms).to(x.device))


class LiveSource:
    """Rows that a model makes while SAEs train on them; a `training.source.TrainingSource`.

    Args:
        config: model, corpus and what is read of them; `tokens`, `norms`, `seed` and `name` are not used.
        buffer_rows: most rows of a window.

    Raises:
        UsageError: an option that does not fit model or corpus.
        ArtifactError: the model is damaged.
        ResourceError: model, hub, corpus or device not available.
    """

    def __init__(self, config: CollectConfig, buffer_rows: int) -> None:
        with _own_option_names(), quiet_libraries():
            self._device, _ = choose_device(config.device)
            self._info: ModelInfo = inspect_model(config.model, config.revision)
            self._corpus: Corpus = open_corpus(config.corpus_choice(self._info.embedded))
            room = BatchRoom(buffer_rows, "--buffer")
            whole = config.model_copy(update={"tokens": "all", "norms": "stored"})
            self._resolved: ResolvedConfig = resolve(whole, self._info, self._corpus, self._device, room)
        self._buffer_rows = buffer_rows
        self._pilot: Window | None = None
        self._profiles: dict[str, HookProfile] = {}
        self._held_out: dict[str, HookRows] = {}
        self._held_out_contexts = torch.empty(0, dtype=torch.int64)
        self._pilot_rows = 0
        self._groups: dict[str | None, _Group] = {}
        self._reporter: Reporter = SilentReporter()

    # What it is ------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """``{model}-live``."""
        return f"{self._info.name.rsplit('/', 1)[-1]}-live"

    @property
    def label(self) -> str:
        """For messages."""
        return f"--from-model {self._info.name}"

    @property
    def inputs(self) -> dict[str, Any]:
        """Model, corpus and how they were harvested."""
        resolved = self._resolved
        return {
            "model": {"name": resolved.model, "revision": resolved.revision, "sha256": resolved.model_sha256},
            "corpus": {
                "name": resolved.corpus,
                "config": resolved.corpus_config,
                "split": resolved.split,
                "revision": resolved.corpus_revision,
                "sha256": resolved.corpus_sha256,
                "text_column": resolved.text_column,
                **self._corpus.other_column,
            },
            "harvest": {
                "site": resolved.site,
                "context": resolved.context,
                "packing": resolved.packing,
                "bos": resolved.bos,
                "harvest_batch_size": resolved.batch_size,
                "dtype": resolved.dtype,
                "model_dtype": resolved.model_dtype,
            },
        }

    @property
    def name_key(self) -> dict[str, Any]:
        """The inputs."""
        return self.inputs

    def changes_from(self, inputs: Mapping[str, Any]) -> str | None:
        """In which options another live source differs."""
        return describe_changes(_as_options(inputs), _as_options(self.inputs)) if "model" in inputs else None

    @property
    def hooks(self) -> list[str]:
        """Hooks of the chosen layers."""
        return [hook_name(layer, self._resolved.site) for layer in self._resolved.layers]

    @property
    def d_in(self) -> int:
        """The model's width."""
        return self._info.d_model

    @property
    def provenance(self) -> Provenance:
        """Model and corpus by name."""
        resolved = self._resolved
        return Provenance(resolved.model, resolved.corpus, resolved.context, resolved.packing, resolved.bos)

    @property
    def run_details(self) -> dict[str, Any]:
        """The pilot's size."""
        return {"pilot": {"rows": self._pilot_rows, "held_out_rows": len(self._held_out_contexts)}}

    @property
    def profiled_rows(self) -> int:
        """Rows of the pilot."""
        return self._pilot_rows

    def epoch_rows(self, tokens: int | None) -> int | None:
        """Training rows of the corpus, where no tokens are given; that takes tokenizing it.

        Raises:
            UsageError: the corpus is too large for it, or makes no context.
        """
        if tokens is not None:
            return None
        if self._corpus.text_bytes is None or self._corpus.text_bytes > COUNTED_BYTES:
            raise catalogue.OPTION_MISSING(
                f"--tokens is missing: how many rows --corpus {self._corpus.name} makes is not known before it is "
                f"read; say how many each SAE is to see"
            )
        with quiet_libraries():
            held_out = HELD_OUT_EVERY - 1
            rows = sum(len(c) for number, c in enumerate(self._contexts()) if number % HELD_OUT_EVERY != held_out)
        if not rows:
            self._refuse_empty()
        return rows

    # Rows ------------------------------------------------------------------------------------------------------------

    def prepare(self, reporter: Reporter) -> None:
        """Harvests the pilot, the first window: profiles and held-out rows are taken from it.

        Raises:
            UsageError: the corpus makes no context.
            NumericalError: values that are not finite or do not fit the storage dtype.
            Interrupted: a signal asked to stop.
        """
        self._reporter = reporter
        self._groups = {}
        planned = self.windows().window(0)
        if planned is None:
            self._refuse_empty()
        with reporter.task("harvesting the pilot", planned.rows, "rows") as task:
            self._pilot = pilot = self.harvest(planned, lambda rows: task.advance(rows))
        self._pilot_rows = len(pilot.positions)
        held_out = pilot.held_out
        self._held_out_contexts = pilot.contexts[held_out]
        for hook in self.hooks:
            self._profiles[hook] = profile = profile_rows(
                _PilotRows(self.name, hook, pilot.norms[hook], pilot.positions, pilot.massive[hook], held_out)
            )
            rows = pilot.rows(profile)
            self._held_out[hook] = rows.select(held_out.to(rows.x.device)).to(torch.device("cpu"))
        reporter.note(
            f"pilot: the first {self._pilot_rows:,} rows of {self._corpus.name} give sinks, norm bins and scales; "
            f"{len(self._held_out_contexts):,} of them are held out for the evaluation"
        )

    def profile(self, hook: str) -> HookProfile:
        """The profile of a hook, from the pilot."""
        return self._profiles[hook]

    def held_out_rows(self, profile: HookProfile, batch_size: int) -> Iterator[tuple[HookRows, torch.Tensor]]:
        """The pilot's held-out rows."""
        rows = self._held_out[profile.hook]
        live = ~rows.zero
        yield from split_rows(rows.select(live), self._held_out_contexts[live], batch_size)

    def stream(self, profiles: Sequence[HookProfile], batch_size: int, seed: int, drop_sinks: bool) -> LiveStream:
        """Batches of one seed. Streams of other seeds share the windows; a hook whose sinks are dropped has its own.

        Without sinks a window lasts shorter, so that such a stream runs ahead of the others.
        """
        assert self._pilot is not None, "prepare comes first"
        key = profiles[0].hook if drop_sinks else None
        if key not in self._groups:
            # One of them is enough to say that the corpus begins again.
            reporter = SilentReporter() if self._groups else self._reporter
            self._groups[key] = _Group(self, profiles, batch_size, drop_sinks, self._pilot, reporter)
            if len(self._groups) > 1:
                self._reporter.note(f"--sinks drop at {key}: rows come from a further pass of the model")
        return LiveStream(self._groups[key], seed)

    def mixed_bytes(self, streams: Mapping[tuple[int, str | None], int]) -> int:
        """Memory of the windows: one for all seeds, and one for each hook whose sinks are dropped, of all hooks."""
        window = self._pilot_rows * self.d_in * DTYPE_NAMES[self._resolved.dtype].itemsize * len(self.hooks)
        return window * len({dropped for _, dropped in streams})

    def windows(self) -> ContextWindows:
        """The corpus's windows, from its beginning."""
        return ContextWindows(self._contexts, self._resolved.batch_size, self._buffer_rows)

    def harvest(self, planned: PlannedWindow, advance: Callable[[int], None] = lambda rows: None) -> Window:
        """Runs the model over a window's contexts.

        Args:
            planned: the window.
            advance: called with the number of rows of each batch that is done.
        """
        # The groups that still need the pilot hold it themselves.
        self._pilot = None
        harvester, resolved = self._harvester, self._resolved
        hooks, device, rows = self.hooks, self._device, planned.rows
        dtype = DTYPE_NAMES[resolved.dtype]
        contexts = torch.arange(planned.first_context, planned.first_context + sum(map(len, planned.batches)))
        lengths = torch.tensor([len(context) for batch in planned.batches for context in batch])
        window = Window(
            number=planned.number,
            x={hook: torch.empty(rows, self.d_in, dtype=dtype, device=device) for hook in hooks},
            norms={hook: torch.empty(rows) for hook in hooks},
            massive={hook: torch.empty(rows, dtype=torch.bool) for hook in hooks},
            positions=torch.empty(rows, dtype=torch.int64),
            contexts=contexts.repeat_interleave(lengths),
        )
        start = 0
        # The largest product is the MLP's, four times the model's width.
        product = 4 * resolved.batch_size * resolved.context * self.d_in**2
        with _own_option_names(), quiet_libraries(), one_thread_if_small(product, device):
            for batch in harvester.harvest(_until_stopped(planned.batches)):
                part = slice(start, start + batch.rows)
                window.positions[part] = batch.positions
                for column, hook in enumerate(hooks):
                    norms = batch.norms[:, column]
                    window.x[hook][part] = batch.vectors[hook]
                    window.norms[hook][part] = norms
                    window.massive[hook][part] = find_massive(norms, partial(batch.vectors.__getitem__, hook))
                start = part.stop
                advance(batch.rows)
        return window

    @cached_property
    def _harvester(self) -> Harvester:
        """Loads the weights."""
        resolved = self._resolved
        layers = tuple(resolved.layers)
        spec = HarvestSpec(resolved.site, layers, layers, DTYPE_NAMES[resolved.dtype], on_device=True)
        with _own_option_names():
            model = load_model(self._info, self._device, DTYPE_NAMES[resolved.model_dtype])
        return Harvester(model, self._info.family, spec, self._device, self._tokenizer.text_of)

    @cached_property
    def _tokenizer(self) -> DocumentTokenizer:
        with _own_option_names(), quiet_libraries():
            return load_tokenizer_for(self._corpus.content, self._info, self._reporter)

    def _contexts(self) -> Iterator[Context]:
        """The contexts of the whole corpus, from its beginning."""
        resolved, tokenizer = self._resolved, self._tokenizer
        packer = Packer(resolved.layout(tokenizer.separator, None))
        return packer.contexts(tokenizer.encode_batches(_until_stopped(self._corpus.documents())))

    def _refuse_empty(self) -> NoReturn:
        raise catalogue.CORPUS_TOO_SHORT(
            f"corpus {self._corpus.name} is empty, or too short for one context of {self._resolved.context} tokens; "
            f"give another --corpus, a smaller --context, or --no-packing"
        )


def _as_options(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs under the names of the options that set them."""
    model, corpus = inputs.get("model") or {}, inputs.get("corpus") or {}
    return {
        "from_model": model.get("name"),
        "revision": model.get("revision"),
        "model_sha256": model.get("sha256"),
        "corpus": corpus.get("name"),
        "corpus_config": corpus.get("config"),
        "split": corpus.get("split"),
        "text_column": corpus.get("text_column"),
        "chat_column": corpus.get("chat_column"),
        "tokens_column": corpus.get("tokens_column"),
        "corpus_revision": corpus.get("revision"),
        "corpus_sha256": corpus.get("sha256"),
        **(inputs.get("harvest") or {}),
    }


#: Options of collect that have another name here.
_RENAMED = {"--model": "--from-model", "--batch-size": "--harvest-batch-size"}


@contextlib.contextmanager
def _own_option_names() -> Iterator[None]:
    """Messages from the parts that `collect` has too name the options of `nsae train`."""

    def renamed(text: str) -> str:
        return re.sub(r"(--model|--batch-size)(?![\w-])", lambda found: _RENAMED[found[0]], text)

    try:
        yield
    except NsaeError as error:
        error.reword(renamed)
        raise


def _until_stopped(items: Iterable[T]) -> Iterator[T]:
    """The same items, unless a signal asks to stop: whoever trains saves the step in hand."""
    for item in items:
        if (signum := interrupt.stop_requested()) is not None:
            raise Interrupted(signum, "stopped while harvesting, no step is lost; run the same command to go on")
        yield item


@dataclass(frozen=True)
class _PilotRows:
    """The pilot's rows of one hook as one block, for its profile. The vectors are not needed and not kept."""

    name: str
    hook: str
    _norms: torch.Tensor
    _positions: torch.Tensor
    _massive: torch.Tensor
    _held_out: torch.Tensor

    def __len__(self) -> int:
        return 1

    def norms(self, block: int) -> torch.Tensor:
        return self._norms

    def positions(self, block: int) -> torch.Tensor:
        return self._positions

    def massive(self, block: int) -> torch.Tensor:
        return self._massive

    def held_out(self, block: int) -> torch.Tensor:
        return self._held_out


class _Group:
    """Streams that use up their rows at the same rate, and so share windows: all seeds, with or without sinks.

    Args:
        source: harvests.
        profiles: one per hook.
        batch_size: rows per batch.
        drop_sinks: leave out the rows that are sinks at the (one) hook.
        pilot: the first window.
        reporter: is told when the corpus begins again.
    """

    def __init__(
        self,
        source: LiveSource,
        profiles: Sequence[HookProfile],
        batch_size: int,
        drop_sinks: bool,
        pilot: Window,
        reporter: Reporter,
    ) -> None:
        assert len(profiles) == 1 or not drop_sinks, "hooks have different sinks, so they cannot share rows"
        self._source, self._profiles, self._reporter = source, profiles, reporter
        self._batch_size, self._drop_sinks = batch_size, drop_sinks
        self._window: Window | None = pilot
        self._windows = source.windows()
        self.seeds: list[int] = []
        #: Epoch, window, and how many rows of the window are used up.
        self.position = (0, 0, 0)
        self._rows: Batch = {}
        self._orders: dict[int, torch.Tensor] = {}
        self._steps: Iterator[dict[tuple[int, str], HookRows]] | None = None
        self._taken = 0
        self._latest: dict[tuple[int, str], HookRows] = {}
        self._said = False

    def batch(self, number: int, seed: int) -> Batch:
        """The `number`-th batch from where the group began, of one seed. Seeds take turns: no number is skipped."""
        if self._steps is None:
            self._steps = self._batches()
        if number == self._taken:
            self._latest = next(self._steps)
            self._taken += 1
        return {profile.hook: self._latest[seed, profile.hook] for profile in self._profiles}

    def first_rows(self, count: int, seed: int) -> Batch:
        """The rows that the first window begins with, on the CPU."""
        self._enter(0, 0)
        return {hook: rows.to(torch.device("cpu")) for hook, rows in self._take_of(seed, slice(0, count)).items()}

    def origin(self, index: int, seed: int) -> str:
        """Where the row `index` of the batch taken last comes from."""
        row = self.position[2] - self._batch_size + index
        if row < 0:
            return "a row of an earlier window"
        window = self._window
        assert window is not None
        at = int(self._orders[seed][row])
        return f"position {int(window.positions[at]):,} of context {int(window.contexts[at]):,}"

    def go_to(self, position: tuple[int, int, int]) -> None:
        """Begins there instead of at the beginning."""
        self.position = position

    def _batches(self) -> Iterator[dict[tuple[int, str], HookRows]]:
        keys = [(seed, profile.hook) for seed in self.seeds for profile in self._profiles]
        carried: dict[tuple[int, str], list[HookRows]] = {key: [] for key in keys}
        epoch, number, start = self.position
        while True:
            epoch, number = self._enter(epoch, number)
            count = len(self._orders[self.seeds[0]])
            for used, batch in cut_batches(carried, self._take, count, self._batch_size, start):
                self.position = epoch, number, used
                yield batch
            number, start = number + 1, 0

    def _enter(self, epoch: int, number: int) -> tuple[int, int]:
        """Puts the window into memory, or the next epoch's first one if the corpus has ended; returns which."""
        planned = None
        if self._window is None or self._window.number != number:
            planned = self._windows.window(number)
            if planned is None:
                epoch, number = epoch + 1, 0
                self._say_that_rows_come_again(epoch)
        if self._window is None or self._window.number != number:
            planned = planned or self._windows.window(number)
            assert planned is not None, "a corpus that made a pilot makes it again"
            # The old window's memory is free before the new one is filled.
            self._window, self._rows, self._latest = None, {}, {}
            self._window = self._source.harvest(planned)
        window = self._window
        if not self._rows:
            self._rows = {profile.hook: window.rows(profile) for profile in self._profiles}
        keep = ~window.held_out
        if self._drop_sinks:
            keep &= ~window.sinks(self._profiles[0])
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(stable_seed("rows", seed, epoch, number))
            # All rows are permuted, then the unwanted taken out, as a store's stream does it.
            order = torch.randperm(len(keep), generator=generator)
            self._orders[seed] = order[keep[order]].to(next(iter(window.x.values())).device)
        return epoch, number

    def _say_that_rows_come_again(self, epoch: int) -> None:
        if not self._said:
            self._reporter.note(
                f"the corpus has ended: epoch {epoch + 1} begins; its rows come again in another order, "
                f"as in every epoch that may follow"
            )
        self._said = True

    def _take(self, part: slice) -> dict[tuple[int, str], HookRows]:
        return {(seed, hook): rows for seed in self.seeds for hook, rows in self._take_of(seed, part).items()}

    def _take_of(self, seed: int, part: slice) -> Batch:
        index = self._orders[seed][part]
        return {hook: rows.select(index) for hook, rows in self._rows.items()}


class LiveStream:
    """Batches of one seed; a `training.source.TrainingStream`."""

    def __init__(self, group: _Group, seed: int) -> None:
        self._group, self._seed = group, seed
        group.seeds.append(seed)

    def batches(self, first_step: int) -> Iterator[Batch]:
        """Endless batches, from the position that was loaded, else from the beginning."""
        return (self._group.batch(number, self._seed) for number in itertools.count())

    def first_rows(self, count: int) -> Batch:
        """Up to `count` rows that a run begins with, at most one window."""
        return self._group.first_rows(count, self._seed)

    def origin(self, step: int, index: int) -> str:
        """``position 5 of context 812``: where a row of the latest batch comes from."""
        return self._group.origin(index, self._seed)

    def state(self) -> dict[str, torch.Tensor]:
        """Epoch, window, and rows of the window that are used up, int64 [3]."""
        return {_POSITION: torch.tensor(self._group.position)}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from there. A missing entry is a KeyError."""
        epoch, window, used = state[_POSITION].tolist()
        self._group.go_to((epoch, window, used))
