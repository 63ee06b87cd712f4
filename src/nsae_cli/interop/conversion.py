"""What to type to turn other people's pickles into what nsae reads. nsae never unpickles anything itself."""

from __future__ import annotations

from pathlib import Path

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def how_to_convert(path: Path) -> str:
    """Ends the sentence “nsae reads safetensors only; …” for a pickle."""
    if path.name == "ae.pt":
        return f"convert it with: {_python(dictionary_learning_snippet(path.name, 'ae.safetensors'))} in its folder"
    if path.stem.isdigit() and path.suffix == ".pt":  # OpenAI's are named after their layer
        return f"one of OpenAI's is converted with the snippet in docs/formats.md, 'OpenAI': nsae then reads {_OPENAI}"
    return (
        "if its library saves state dicts (as dictionary_learning and OpenAI do), docs/formats.md, 'SAEs from "
        "elsewhere', shows how to convert it; otherwise save it again from there in SAELens' layout"
    )


_OPENAI = "the folder with openai.json and openai.safetensors"


def dictionary_learning_snippet(source: str, target: str) -> str:
    """Python that keeps a state dict's tensors. `weights_only` refuses anything but tensors and plain values."""
    return (
        "import torch; from safetensors.torch import save_file; "
        f"state = torch.load({source!r}, map_location='cpu', weights_only=True); "
        f"save_file({{name: tensor.contiguous() for name, tensor in state.items()}}, {target!r})"
    )


def openai_snippet(source: str, folder: str, location: str, layer: int) -> str:
    """Python that splits one of OpenAI's state dicts into tensors and a JSON file."""
    return f"""import json, torch
from safetensors.torch import save_file
state = torch.load({source!r}, map_location="cpu", weights_only=True)
config = {{key: state.pop(key) for key in ("activation", "activation_state_dict") if key in state}}
n_latents, n_inputs = state["encoder.weight"].shape
config |= {{"location": {location!r}, "layer": {layer}, "n_inputs": n_inputs, "n_latents": n_latents}}
tensors = {{name: value.contiguous() for name, value in state.items() if torch.is_tensor(value)}}
save_file(tensors, {folder!r} + "/openai.safetensors")
json.dump(config, open({folder!r} + "/openai.json", "w"))
"""


def _python(code: str) -> str:
    return f'python -c "{code}"'
