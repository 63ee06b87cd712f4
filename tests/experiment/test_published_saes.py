"""experiments/020: the configurations resolve offline, name SAEs that exist, and run on folders of these layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

import fake_hub
from command import nsae
from nsae_cli.experiment.config import load_config
from nsae_cli.interop.hub import HubReference
from nsae_cli.interop.opening import open_sae
from nsae_cli.store.workspace import Workspace

FOLDER = Path(__file__).parents[2] / "experiments" / "020-published-saes"
CONFIGS = {"res-jb": [13], "openai": [12], "apollo": [3, 2, 2, 2]}


def references(config: dict[str, Any]) -> list[HubReference]:
    """Every SAE that a configuration names."""
    named = []
    for stage in config["stages"]:
        named += [*stage["audit"]["saes"], *filter(None, [stage["audit"].get("reference")])]
    found = [HubReference.parse(name) for name in named]
    return [one for one in found if one is not None]


def read(name: str) -> dict[str, Any]:
    """A configuration as plain values."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_it_resolves_without_a_network(tmp_path: Path, name: str) -> None:
    stages = load_config(FOLDER / f"{name}.yaml", Workspace(tmp_path / "runs"))
    assert [len(stage.reads) for stage in stages if isinstance(stage.reads, list)] == CONFIGS[name]
    assert {stage.command for stage in stages} == {"audit"}
    assert all(stage.options.tokens == 200_000 and stage.options.behaviour for stage in stages)
    assert all(stage.options.centre is (True if name == "res-jb" else None) for stage in stages)
    assert [stage.options.reference is not None for stage in stages] == [False, True, True, True][: len(stages)]


def test_every_configuration_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_saelens_knows_every_one_of_them(name: str) -> None:
    """Its list of published SAEs has the repository and the folder."""
    pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = {(release.repo_id, path) for release in get_pretrained_saes_directory().values()
             for path in release.saes_map.values()}  # fmt: skip
    asked = {(one.repository, one.folder) for one in references(read(name))}
    assert asked <= known


# The same stages on small SAEs of these layouts -----------------------------------------------------------------------


def flat_config(**values: object) -> bytes:
    """cfg.json as SAELens wrote it before version 6, as all of these have it."""
    flat = {"d_in": 64, "d_sae": 96, "dtype": "torch.float32", "device": "cpu", "model_name": "mini-sink",
            "hook_layer": 3, "hook_head_index": None, "context_size": 128, "prepend_bos": True,
            "dataset_path": "Skylion007/openwebtext", "sae_lens_training_version": "3.12.1"}  # fmt: skip
    return json.dumps(flat | values).encode()


LAYOUTS = {
    "res-jb": {"hook_point": "blocks.3.hook_resid_pre", "hook_point_head_index": None},
    "openai": {
        "hook_name": "blocks.2.hook_resid_post", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8},
        "normalize_activations": "layer_norm", "apply_b_dec_to_input": True, "architecture": "standard",
    },
    "apollo": {
        "hook_name": "blocks.3.hook_resid_pre", "activation_fn_str": "relu", "apply_b_dec_to_input": False,
        "normalize_activations": "none", "architecture": "standard", "finetuning_scaling_factor": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_its_stages_run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = read(name)
    config["defaults"]["audit"] |= {"tokens": 1280, "behaviour": name == "apollo", "device": "cpu"}
    config["stages"] = config["stages"][:2]
    for stage in config["stages"]:
        stage["audit"]["saes"] = stage["audit"]["saes"][:2]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    [group] = (finished / "saes").iterdir()
    weights = load_file(group / "L2-relu" / "sae_weights.safetensors")
    folder = {"cfg.json": flat_config(**LAYOUTS[name]), "sae_weights.safetensors": save(weights),
              "sparsity.safetensors": save({"sparsity": torch.zeros(96)})}  # fmt: skip
    with fake_hub.serve() as hub:
        fake_hub.use(hub, monkeypatch, tmp_path / "cache", token=None)
        for one in references(config):
            there = hub.repositories.get(one.repository) or hub.add(one.repository, {})
            there.commit({**there.files, **{f"{one.folder}/{file}": content for file, content in folder.items()}})
        said = nsae("--workspace", tmp_path / "runs", "--json", "run", path)
    assert said.code == 0, said.err
    results = said.json["result"]
    asked = [reference for stage in config["stages"] for reference in stage["audit"]["saes"]]
    assert [result["sae"]["name"] for result in results] == asked
    prefix = config["stages"][0]["audit"]["name"]
    assert sorted(path.name for path in (tmp_path / "runs" / "audits").iterdir()) == sorted(
        f"{prefix}-{HubReference.parse(one).folder}" for one in asked
    )
    for result in results:
        assert result["sae"]["format"] == "SAELens < 6"
        assert result["model"] == "mini-sink"
        assert result["rows"]["rows"] == 1280
        assert result["metrics"]["all"]["mre"] > 0
        assert result["centred"] == (name == "res-jb")
        assert result["sae"]["architecture"] == ("topk" if name == "openai" else "standard")
        assert (result["behaviour"] is not None) == (name == "apollo")
    if name == "apollo":
        assert [result["nbi_rel"] is not None for result in results] == [False, False, True, True]


def test_apollos_own_files(tmp_path: Path) -> None:
    """Their state dict: four tensors, decoder rows normalised already."""
    generator = torch.Generator().manual_seed(3)
    state = {"encoder.weight": (32, 8), "encoder.bias": (32,), "decoder.weight": (8, 32), "decoder.bias": (8,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in state.items()}
    file = tmp_path / "e2e_similar_l0_layer_6.pt"
    torch.save(tensors, file)
    subprocess.run([sys.executable, FOLDER / "convert_apollo.py", file], check=True, capture_output=True)
    found = open_sae(str(file.with_suffix("")))
    assert (found.hook, found.model) == ("blocks.6.hook_resid_pre", "gpt2")
    x = torch.randn(5, 8, generator=generator)
    acts = torch.relu(torch.nn.functional.linear(x, tensors["encoder.weight"], tensors["encoder.bias"]))
    x_hat = torch.nn.functional.linear(acts, tensors["decoder.weight"], tensors["decoder.bias"])
    torch.testing.assert_close(found.sae.reconstruct(x), (acts, x_hat))
