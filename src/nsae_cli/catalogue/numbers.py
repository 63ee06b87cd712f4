"""Exit code 5: values that are not finite, or that a dtype cannot hold. nsae stops before it stores or learns them."""

from nsae_cli.errors import Entry, NumericalError

MODEL_NOT_FINITE = Entry(
    "model-not-finite",
    NumericalError,
    "The model itself computes NaN or infinity, in its residual stream or its logits: as a rule an overflow of fp16, "
    "or damaged weights.",
    "Compute in a wider dtype (`--model-dtype bf16` or `fp32`), or check the weights.",
)
STORAGE_OVERFLOW = Entry(
    "storage-overflow",
    NumericalError,
    "A value is larger than the storage dtype can hold (fp16 ends at 65,504; the sinks of some models lie beyond). It "
    "is never stored as infinity.",
    "Store with `--dtype bf16` or `--dtype fp32`.",
)
STORE_NOT_FINITE = Entry(
    "store-not-finite",
    NumericalError,
    "The activations hold NaN or infinity, as a rule in a store of another tool. Nothing is trained on or measured "
    "over such rows.",
    "Collect again with a wider dtype, or leave such rows out of the store.",
)
LOSS_NOT_FINITE = Entry(
    "loss-not-finite",
    NumericalError,
    "The loss or a gradient became NaN or infinite. Training stops before the optimizer's step, so that the last "
    "checkpoint is sound.",
    "Lower `--lr`, or limit the gradient's norm with `--clip 1`.",
)
WEIGHTS_NOT_FINITE = Entry(
    "weights-not-finite",
    NumericalError,
    "An SAE's weights hold NaN or infinity.",
    "Get the SAE again; if its source is the same, its training went wrong.",
)
RECONSTRUCTION_NOT_FINITE = Entry(
    "reconstruction-not-finite",
    NumericalError,
    "An SAE's reconstructions, or the model's logits with them spliced in, are NaN or infinite: the SAE does not fit "
    "these activations, or the model's dtype cannot hold what it gives.",
    "Check that SAE and model belong together; try `--model-dtype fp32`.",
)
ALL_ROWS_ZERO = Entry(
    "all-rows-zero",
    NumericalError,
    "Every row of the activations is zero (or a sink), so that a typical norm is not defined.",
    "Collect the activations again, and look at what was harvested: `nsae norms`.",
)
