"""Environment variables that change what nsae computes, where it looks, or how fast it is."""

from __future__ import annotations

import os
from collections.abc import Iterator

from nsae_cli.doctor.check import Check, note, ok
from nsae_cli.doctor.redaction import shown_value

_NAMES = (
    *("CC", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES"),
    *("CUBLAS_WORKSPACE_CONFIG", "ATEN_CPU_CAPABILITY", "NVIDIA_TF32_OVERRIDE", "LD_LIBRARY_PATH", "LD_PRELOAD"),
    *("PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONPATH", "TMPDIR", "XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    *("SLURM_JOB_ID", "MALLOC_ARENA_MAX", "HUGGING_FACE_HUB_TOKEN"),
)
_BEGINNINGS = (
    *("NSAE_", "OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TORCH", "PYTORCH_", "ONEDNN_", "DNNL_"),
    *("TRITON_", "HF_", "TRANSFORMERS_", "DATASETS_"),
)
#: By variable: the value, beside none, that changes nothing, and what every other one does to a run.
_REMARKS = {
    "TRITON_INTERPRET": ("0", "Triton's kernels are interpreted, very slowly; unset it"),
    "CUDA_LAUNCH_BLOCKING": ("0", "every GPU operation is waited for, slowly; unset it"),
    "ATEN_CPU_CAPABILITY": ("", "torch leaves instruction sets of the processor unused; unset it"),
    "NVIDIA_TF32_OVERRIDE": ("0", "float32 products are rounded to TF32; unset it for exact float32"),
}


def look_at_environment() -> Iterator[Check]:
    """Each of them that is set; secrets are named without their value."""
    found = False
    for name, value in sorted(os.environ.items()):
        if name.upper() in _NAMES or name.startswith(_BEGINNINGS):
            found = True
            yield _variable(name, value)
    if not found:
        yield ok("variables", "none set that change results")


def _variable(name: str, value: str) -> Check:
    shown = shown_value(name, value)
    harmless, remark = _REMARKS.get(name, ("", ""))
    if remark and value.strip() not in ("", harmless):
        return note(name, shown, remark, value=shown)
    return ok(name, shown or "(empty)", value=shown)
