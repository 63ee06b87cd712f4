"""Reading the weights of others: every tensor known by name, of the expected shape, finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nsae_cli import catalogue
from nsae_cli.kernels.types import Weights
from nsae_cli.sae.autoencoder import SparseAutoencoder
from nsae_cli.store import commit

#: Sizes by letter; a shape is given as letters, ``nd`` for [d_sae, d_in].
Sizes = Mapping[str, int]


def read_tensors(
    path: Path,
    shapes: Mapping[str, str],
    sizes: Sizes,
    *,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file as float32, by name.

    Args:
        path: the file.
        shapes: the tensors that are read, each with its shape in letters of `sizes`; ``""`` is a single number.
        sizes: what the letters stand for.
        optional: those of `shapes` that may be missing.
        ignored: tensors that may be there and change nothing. Any other is refused: it may change what is computed.

    Raises:
        ArtifactError: damaged, a tensor missing, unknown, of another shape or not of real numbers.
        NumericalError: NaN or infinity.
    """
    try:
        found = load_file(path, backend="pread")
    except (SafetensorError, OSError) as error:
        commit.refuse_unread(error, path)
        reason = str(error).splitlines()[0]
        raise catalogue.FOREIGN_TENSORS(
            f"{path} cannot be read as safetensors ({reason}); get the file again"
        ) from error
    unknown = sorted(set(found) - set(shapes) - set(ignored))
    if unknown:
        raise catalogue.FOREIGN_TENSORS(
            f"{path}: nsae does not know the tensor {unknown[0]!r} and so not what this SAE computes; "
            f"expected {', '.join(shapes)}"
        )
    tensors = {}
    for name, letters in shapes.items():
        tensor = found.get(name)
        if tensor is None:
            if name in optional:
                continue
            raise catalogue.FOREIGN_TENSORS(
                f"{path}: the tensor {name!r} is missing; there are {', '.join(sorted(found))}"
            )
        shape = tuple(sizes[letter] for letter in letters)
        if tuple(tensor.shape) != shape:
            raise catalogue.FOREIGN_TENSORS(
                f"{path}: {name} has shape {list(tensor.shape)}, expected {list(shape)} by the configuration beside it"
            )
        if not tensor.is_floating_point() and tensor.numel() != 1:
            raise catalogue.FOREIGN_TENSORS(f"{path}: {name} is {tensor.dtype}, expected floating point")
        tensors[name] = tensor.float()
        refuse_non_finite(path, name, tensor)
    return tensors


def refuse_non_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Looks at every value of a tensor.

    Raises:
        NumericalError: NaN or infinity.
    """
    bad = ~torch.isfinite(tensor)
    if bad.any():
        first = [int(index) for index in bad.nonzero()[0]]
        raise catalogue.WEIGHTS_NOT_FINITE(
            f"{path}: {name} holds {int(bad.sum()):,} values that are not finite, the first at {first}; "
            f"the SAE is damaged, get it again"
        )


def plain_sae(
    act: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    subtract_b_dec: bool,
    input_scale: float = 1.0,
    k: int | None = None,
    threshold: torch.Tensor | None = None,
) -> SparseAutoencoder:
    """A plain SAE of W_enc, b_enc, W_dec and b_dec, with what is done to its input folded in.

    On x' = s·x: acts = act((x' − b_dec)·W_enc + b_enc) and x̂ = (acts·W_dec + b_dec)/s, hence W_enc·s,
    b_enc − b_dec·W_enc, W_dec/s, b_dec/s. Folded in float64, rounded once.

    Args:
        act: the activation.
        tensors: W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in].
        subtract_b_dec: whether b_dec is subtracted from the input.
        input_scale: s.
        k: of topk.
        threshold: of jumprelu, [d_sae].
    """
    W_enc, b_enc, W_dec, b_dec = (tensors[name].double() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    if subtract_b_dec:
        b_enc = b_enc - b_dec @ W_enc
    weights = Weights(
        (W_enc * input_scale).float(), b_enc.float(), (W_dec / input_scale).float(), (b_dec / input_scale).float()
    )
    return SparseAutoencoder(act, weights, k, threshold)


def as_jumprelu(
    tensors: Mapping[str, torch.Tensor], b_gate: torch.Tensor, r_mag: torch.Tensor, b_mag: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A gated SAE as one of jumprelu: tensors with W_enc and b_enc, and the thresholds.

    The gate z + b_gate > 0 with z = x·W_enc and the magnitude relu(m), m = e^r·z + b_mag, share W_enc, so the gate is
    m > θ with θ = b_mag − e^r·b_gate (Rajamanoharan et al., 2404.16014, section 3.2).
    """
    gain = r_mag.double().exp()
    threshold = b_mag.double() - gain * b_gate.double()
    return {**tensors, "W_enc": tensors["W_enc"].double() * gain, "b_enc": b_mag}, threshold


def topk_of(value: object, d_sae: int, where: Path) -> int:
    """k of a topk SAE.

    Raises:
        ArtifactError: not a whole number from 1 to d_sae.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= d_sae:
        raise catalogue.FOREIGN_CONFIG(f"{where}: k is {value!r}, expected a whole number from 1 to {d_sae:,}")
    return value


def size_of(config: Mapping[str, object], key: str, where: Path) -> int:
    """A width that a configuration must name.

    Raises:
        ArtifactError: missing or no positive whole number.
    """
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise catalogue.FOREIGN_CONFIG(f"{where}: {key} is {value!r}, expected a positive whole number")
    return value


def finite_scale(value: object, where: Path, key: str) -> float:
    """A factor that a configuration names.

    Raises:
        ArtifactError: not a positive finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise catalogue.FOREIGN_CONFIG(f"{where}: {key} is {value!r}, expected a positive number")
    return float(value)
