"""The other direction: SAELens (6 and later), and with it SAEBench, opens nsae's tanh-relu SAEs.

    import nsae_cli.interop.saelens
    nsae_cli.interop.saelens.register()
    sae = sae_lens.SAE.load_from_disk("nsae-runs/saes/NAME")

nsae saves relu, topk and jumprelu SAEs as SAELens' own architectures, which need nothing. A tanh-relu SAE has the
architecture ``nsae_tanh_relu``, which SAELens refuses until it has been registered, rather than take it for relu.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from nsae_cli.sae.nonlinearity import TanhRelu
from nsae_cli.store.sae_folder import ARCHITECTURES

ARCHITECTURE = ARCHITECTURES["tanh-relu"]


def register() -> None:
    """Makes SAELens open SAEs of the architecture ``nsae_tanh_relu``. Calling it again changes nothing.

    Raises:
        ImportError: sae_lens 6 or later is not installed.
    """
    from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class

    if ARCHITECTURE not in SAE_CLASS_REGISTRY:
        register_sae_class(ARCHITECTURE, *_classes())


@cache
def _classes() -> tuple[Any, Any]:
    """The SAE's class and its configuration's; made on demand, since sae_lens is no dependency of nsae."""
    from sae_lens import StandardSAE, StandardSAEConfig

    class TanhReluSAEConfig(StandardSAEConfig):  # type: ignore[misc, unused-ignore]
        """The configuration of `StandardSAE` under another name."""

        @classmethod
        def architecture(cls) -> str:
            return ARCHITECTURE

    class TanhReluSAE(StandardSAE):  # type: ignore[misc, unused-ignore]
        """acts = tanh(relu(x @ W_enc + b_enc)), x̂ = acts @ W_dec + b_dec."""

        def get_activation_fn(self) -> Any:
            return _tanh_relu

        def fold_W_dec_norm(self) -> None:
            # SAEBench folds wherever it can and goes on where it meets this very error.
            raise NotImplementedError(
                "tanh(relu) is not homogeneous: decoder norms cannot be moved into the encoder without changing the SAE"
            )

    return TanhReluSAE, TanhReluSAEConfig


def _tanh_relu(pre_acts: torch.Tensor) -> torch.Tensor:
    return TanhRelu().value(pre_acts)
