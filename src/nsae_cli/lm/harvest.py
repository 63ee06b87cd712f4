"""Contexts → residual vectors and their norms, the forward stopped after the deepest wanted layer.

The model runs its own `forward`; hooks on its modules (`ports`) read what passes by, and an exception ends the pass
once the deepest wanted residual has been read. So nothing of the architecture is repeated here, no later block, final
norm or logit is computed, and ``resid_post`` of the last block is what the block returns (`hidden_states[-1]` is that
after the final norm).
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nsae_cli import catalogue
from nsae_cli.lm.families import Family, blocks_of
from nsae_cli.lm.layers import Site, hook_name
from nsae_cli.lm.packing import Context
from nsae_cli.lm.ports import port_of


class _DeepestLayerRead(Exception):  # noqa: N818 - not an error: it ends a forward pass
    """The deepest wanted residual has been read."""


class ResidualReader:
    """Reads the residual stream, or what is added to it, at chosen layers of a Hugging Face transformer.

    Args:
        model: with or without a head, in evaluation mode.
        family: where it keeps its parts.
        site: where to read.
        layers: 0-based.
    """

    def __init__(self, model: nn.Module, family: Family, site: Site, layers: Sequence[int]) -> None:
        self._base: nn.Module = model.base_model  # type: ignore[assignment]  # every transformers model has it
        self._blocks = blocks_of(self._base, family)
        self._family = family
        self._site = site
        self._layers = sorted(layers)

    def run(self, token_ids: Tensor, take: Callable[[int, Tensor], None]) -> None:
        """One pass over a batch.

        Args:
            token_ids: int64 [batch, position], on the model's device. Shorter contexts are padded at the end, where the
                causal mask keeps pads from reaching any other position.
            take: called with each wanted layer and its residual [batch, position, d_model], shallowest first. The
                tensor belongs to the model: copy what is to be kept.
        """

        def receive(layer: int, residual: Tensor) -> None:
            # OPT's MLP works on rows without a batch.
            take(layer, residual.reshape(*token_ids.shape, residual.shape[-1]))
            if layer == self._layers[-1]:
                raise _DeepestLayerRead

        with contextlib.ExitStack() as hooks, torch.inference_mode():
            for layer in self._layers:
                port = port_of(self._blocks[layer], self._family, self._site)
                hooks.callback(port.on_pass(partial(receive, layer)).remove)
            with contextlib.suppress(_DeepestLayerRead):
                self._base(input_ids=token_ids, use_cache=False)


@dataclass(frozen=True)
class HarvestedBatch:
    """Rows of some contexts, pads dropped, on the CPU (vectors: where the spec says).

    Attributes:
        contexts: how many contexts they come from.
        tokens, positions, documents: int32 [rows].
        norms: ‖x‖₂ of the model's own output, float32 [rows, norm layer].
        vectors: by hook name, in the storage dtype, [rows, d_model].
    """

    contexts: int
    tokens: Tensor
    positions: Tensor
    documents: Tensor
    norms: Tensor
    vectors: dict[str, Tensor]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def row_tensors(self) -> dict[str, Tensor]:
        """Everything by the name it has in a shard."""
        index = {"tokens": self.tokens, "positions": self.positions, "documents": self.documents}
        return {**self.vectors, **index, "norms": self.norms}


@dataclass(frozen=True)
class HarvestSpec:
    """What to read and how to store it.

    Attributes:
        site: where to read.
        vector_layers: layers whose vectors are kept.
        norm_layers: layers whose norms are kept; contains `vector_layers`.
        storage_dtype: of the kept vectors.
        on_device: leave the vectors on the model's device.
    """

    site: Site
    vector_layers: tuple[int, ...]
    norm_layers: tuple[int, ...]
    storage_dtype: torch.dtype
    on_device: bool = False


class Harvester:
    """Runs the model over batches of contexts.

    Args:
        model: in evaluation mode.
        family: where it keeps its blocks.
        spec: what to read.
        device: the model's.
        text_of: a token as text, for messages.
    """

    def __init__(
        self, model: nn.Module, family: Family, spec: HarvestSpec, device: torch.device, text_of: Callable[[int], str]
    ) -> None:
        self._reader = ResidualReader(model, family, spec.site, spec.norm_layers)
        self._spec = spec
        self._device = device
        self._text_of = text_of

    def harvest(self, batches: Iterable[Sequence[Context]]) -> Iterator[HarvestedBatch]:
        """Rows of each batch, in order. On CUDA the copies of one batch run while the next is computed.

        Raises:
            NumericalError: a value is not finite, or does not fit the storage dtype.
            ResourceError: the device's memory is too small for a batch.
        """
        ahead = 1 if self._device.type == "cuda" else 0
        in_flight: deque[_InFlight] = deque()
        for batch in batches:
            in_flight.append(self._launch(batch))
            if len(in_flight) > ahead:
                yield self._land(in_flight.popleft())
        while in_flight:
            yield self._land(in_flight.popleft())

    def _launch(self, contexts: Sequence[Context]) -> _InFlight:
        token_ids, keep = _pad(contexts)
        kept = None if keep is None else keep.to(self._device)
        norms: list[Tensor] = []
        largest: list[Tensor] = []
        vectors: dict[str, Tensor] = {}

        def take(layer: int, residual: Tensor) -> None:
            rows = residual.reshape(-1, residual.shape[-1])
            if kept is not None:
                rows = rows[kept]
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
            if layer in self._spec.vector_layers:
                largest.append(rows.abs().amax(dim=1).float())
                kept_rows = rows.to(self._spec.storage_dtype, copy=True)
                hook = hook_name(layer, self._spec.site)
                vectors[hook] = kept_rows if self._spec.on_device else self._to_cpu(kept_rows)

        with memory_errors(self._device):
            self._reader.run(token_ids.to(self._device, non_blocking=True), take)
            norms_on_cpu, largest_on_cpu = (self._to_cpu(torch.stack(columns, dim=1)) for columns in (norms, largest))
        copied = torch.cuda.Event() if self._device.type == "cuda" else None
        if copied is not None:
            copied.record()
        return _InFlight(contexts, norms_on_cpu, largest_on_cpu, vectors, copied)

    def _to_cpu(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.cpu()
        # Only pinned memory can be filled while the device computes on.
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)

    def _land(self, batch: _InFlight) -> HarvestedBatch:
        if batch.copied is not None:
            batch.copied.synchronize()
        contexts = batch.contexts
        harvested = HarvestedBatch(
            contexts=len(contexts),
            tokens=torch.from_numpy(np.concatenate([context.tokens for context in contexts])),
            positions=torch.cat([torch.arange(len(context), dtype=torch.int32) for context in contexts]),
            documents=torch.from_numpy(np.concatenate([context.documents for context in contexts])),
            norms=batch.norms,
            vectors=batch.vectors,
        )
        self._check(harvested, batch.largest)
        return harvested

    def _check(self, batch: HarvestedBatch, largest: Tensor) -> None:
        finite = torch.isfinite(batch.norms)
        if not finite.all():
            # The shallowest layer first: that is where it began.
            column, row = (int(i) for i in (~finite).T.nonzero()[0])
            more = int((~finite[:, column]).sum()) - 1
            others = f" and in {more:,} more rows of its batch" if more else ""
            raise catalogue.MODEL_NOT_FINITE(
                f"layer {self._spec.norm_layers[column]}: a residual that is not finite at {self._place(batch, row)}"
                f"{others}; try another --model-dtype, or check the model's weights"
            )
        overflowing = (largest > torch.finfo(self._spec.storage_dtype).max).nonzero()
        if len(overflowing):
            row, column = (int(i) for i in overflowing[0])
            value = float(largest[row, column])
            raise catalogue.STORAGE_OVERFLOW(
                f"layer {self._spec.vector_layers[column]}: {value:,.0f} at {self._place(batch, row)} "
                f"is too large for fp16 (at most 65,504); use --dtype bf16"
            )

    def _place(self, batch: HarvestedBatch, row: int) -> str:
        token = int(batch.tokens[row])
        return (
            f"token {self._text_of(token)!r} (id {token}) at position {int(batch.positions[row])} "
            f"of document {int(batch.documents[row])}"
        )


@dataclass(frozen=True)
class _InFlight:
    """A batch whose copies to the CPU may still be under way."""

    contexts: Sequence[Context]
    norms: Tensor
    largest: Tensor  # max_j |x_j| before the cast, float32 [rows, vector layer]
    vectors: dict[str, Tensor]
    copied: torch.cuda.Event | None


def _pad(contexts: Sequence[Context]) -> tuple[Tensor, Tensor | None]:
    """Token ids int64 [batch, longest], and the flat indices of tokens that are no pads (None where there are none)."""
    lengths = np.array([len(context) for context in contexts])
    padded = np.zeros((len(contexts), lengths.max()), dtype=np.int64)
    for row, context in zip(padded, contexts, strict=True):
        row[: len(context)] = context.tokens
    if (lengths == lengths.max()).all():
        return torch.from_numpy(padded), None
    real = np.arange(lengths.max()) < lengths[:, None]
    return torch.from_numpy(padded), torch.from_numpy(np.flatnonzero(real))


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turns what torch raises when memory runs out into a sentence with a remedy.

    Raises:
        ResourceError: out of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # Only CUDA has a type of its own for this; the CPU's allocator and MPS raise RuntimeError.
        texts = ("out of memory", "not enough memory", "can't allocate memory")
        if isinstance(error, RuntimeError) and not any(text in str(error).lower() for text in texts):
            raise
        raise catalogue.OUT_OF_MEMORY(
            f"out of memory on {device} while running the model; lower --batch-size"
        ) from error
