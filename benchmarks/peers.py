"""The peers' own training steps, called through their own classes, each from given weights.

Every function takes an SAE in nsae's form (x @ W_enc + b_enc, unit decoder rows) and returns a peer's step as a
function of float32 rows. Where a peer encodes x − b_dec, its encoder bias is b_enc + b_dec @ W_enc, so that all
sides compute the same activations at first. Learning rates are constant; no peer resamples or logs.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Callable
from unittest import mock

import torch

from nsae_cli.kernels.types import Weights

Step = Callable[[torch.Tensor], None]


def version(package: str) -> str:
    """The installed version of a peer's package."""
    return importlib.metadata.version(package)


def centred_bias(weights: Weights) -> torch.Tensor:
    """The encoder bias of an SAE that encodes x − b_dec."""
    return weights.b_enc + weights.b_dec @ weights.W_enc


def sae_lens_trainer(
    weights: Weights, *, l1: float, lr: float, batch_size: int, autocast: bool = False, centre: bool = True,
    k: int | None = None, steps: int = 10**7, lr_warm_up: int = 0, lr_decay: int = 0, l1_warm_up: int = 0
):  # fmt: skip
    """SAELens' SAETrainer around its StandardTrainingSAE, or its TopKTrainingSAE if `k` is given.

    Args:
        centre: `apply_b_dec_to_input`, True by default in SAELens; nsae does not do it.
    """
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_in, d_sae = weights.W_enc.shape
    device = str(weights.W_enc.device)
    shared = {"d_in": d_in, "d_sae": d_sae, "device": device, "apply_b_dec_to_input": centre}
    if k is None:
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shared, l1_coefficient=l1, l1_warm_up_steps=l1_warm_up))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, k=k))
    with torch.no_grad():
        for name, value in weights.named().items():
            getattr(sae, name).copy_(value)
        if centre:
            sae.b_enc.copy_(centred_bias(weights))
    config = SAETrainerConfig(
        total_training_samples=steps * batch_size,
        train_batch_size_samples=batch_size,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=lr_warm_up,
        lr_decay_steps=lr_decay,
        device=device,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, data_provider=iter(()))


def sae_lens(weights: Weights, **options) -> tuple[Step, object]:
    """`SAETrainer.step`, and the trainer."""
    trainer = sae_lens_trainer(weights, **options)

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, trainer


def dictionary_learning(weights: Weights, *, l1: float, lr: float) -> Step:
    """`StandardTrainer.update`: unit decoder columns kept by its ConstrainedAdam, no clipping."""
    for name in ("nnsight", "circuitsvis", "umap"):  # imported by its data and plotting code, which is not used here
        if name not in sys.modules:
            sys.modules[name] = mock.MagicMock()
    from dictionary_learning.trainers.standard import StandardTrainer

    d_in, d_sae = weights.W_enc.shape
    trainer = StandardTrainer(
        steps=10**9,
        activation_dim=d_in,
        dict_size=d_sae,
        layer=0,
        lm_name="none",
        lr=lr,
        l1_penalty=l1,
        warmup_steps=0,
        sparsity_warmup_steps=None,
        device=str(weights.W_enc.device),
    )
    ae = trainer.ae
    with torch.no_grad():
        ae.bias.copy_(weights.b_dec)
        ae.encoder.weight.copy_(weights.W_enc.t())
        ae.encoder.bias.copy_(centred_bias(weights))
        ae.decoder.weight.copy_(weights.W_dec.t())
    taken = 0

    def step(x: torch.Tensor) -> None:
        nonlocal taken
        trainer.update(taken, x)
        taken += 1

    return step


def sparsify(weights: Weights, *, k: int, lr: float) -> Step:
    """What sparsify's trainer does to one SAE in one step: TopK, FVU loss, signum, its defaults.

    Its `Trainer.fit` has no step that could be called, and reads from a running language model. These are its calls in
    their order, on its SparseCoder and its optimizer, without the hooks, the progress bar and the log.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it reports on import whether triton is there
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

    d_in, d_sae = weights.W_enc.shape
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=weights.W_enc.device)
    with torch.no_grad():
        coder.encoder.weight.copy_(weights.W_enc.t())
        coder.encoder.bias.copy_(centred_bias(weights))
        coder.W_dec.copy_(weights.W_dec)
        coder.b_dec.copy_(weights.b_dec)
    optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
    optimizer.train()
    did_fire = torch.zeros(d_sae, dtype=torch.bool, device=weights.W_enc.device)
    silent_for = torch.zeros(d_sae, dtype=torch.long, device=weights.W_enc.device)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        output = coder(x, total_variance=(x - x.mean(0)).pow(2).sum())
        did_fire[output.latent_indices.flatten()] = True
        float(output.fvu.detach())
        output.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent_for.add_(len(x))
        silent_for[did_fire] = 0
        did_fire.zero_()

    return step
