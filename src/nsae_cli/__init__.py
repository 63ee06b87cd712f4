"""nsae: train sparse autoencoders on a language model's residual stream and measure what high-norm tokens do to them.

From Python: `load_sae(folder)` opens a finished SAE (encode, decode, forward), `open_activations(folder)` a store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsae_cli.sae.autoencoder import SparseAutoencoder
    from nsae_cli.store.shards import open_activations

__version__ = "0.1.0"
__all__ = ["__version__", "load_sae", "open_activations"]


def load_sae(path: Any) -> SparseAutoencoder:
    """Opens a finished SAE: a folder that `nsae train` wrote.

    Returns:
        The autoencoder in units of the raw activations, with encode, decode and forward.

    Raises:
        nsae_cli.errors.ArtifactError: unfinished, damaged or of another version.
    """
    from nsae_cli.store.sae_folder import load_sae as load_saved

    return load_saved(path).sae


def __getattr__(name: str) -> Any:
    # Imported on demand: `nsae --help` must not wait for torch.
    if name == "open_activations":
        from nsae_cli.store.shards import open_activations

        return open_activations
    raise AttributeError(name)
