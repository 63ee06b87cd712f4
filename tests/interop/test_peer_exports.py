"""With the peers' packages installed: they open what `nsae export` writes and compute the same.

sae_lens and eai-sparsify as for the other peer tests, and `pip install --no-deps dictionary-learning`.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from exported_saes import assert_same, made, rows

from nsae_cli.interop.export_formats import WRITERS

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


def written(tmp_path, act, target):
    """An SAE and its export."""
    found = made(tmp_path / "sae", act)
    (tmp_path / "out").mkdir()
    return found, WRITERS[target](found, tmp_path / "out")


@pytest.fixture
def sae_lens(monkeypatch):
    """The package, which forgets after the test what was registered in it."""
    package = pytest.importorskip("sae_lens", reason="the peer sae_lens is not installed")
    monkeypatch.setattr(package.registry, "SAE_CLASS_REGISTRY", dict(package.registry.SAE_CLASS_REGISTRY))
    return package


def opened(made_):
    """What the code that `nsae export` prints makes, under the names that it gives."""
    names: dict[str, object] = {}
    exec(made_.code.format(path=str(made_.folder), name="an SAE"), names)
    return names


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu", "tanh-relu"])
@pytest.mark.parametrize("target", ["saelens", "saebench"])
def test_saelens(sae_lens, tmp_path, act, target):
    found, made_ = written(tmp_path, act, target)
    names, x = opened(made_), rows()
    theirs = names["sae"]
    acts = theirs.encode(x)
    if target == "saebench":
        assert names["selected_saes"] == [("an SAE", theirs)]
        # What SAEBench asks of the SAE objects that it is given.
        assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_layer) == ("blocks.6.hook_resid_post", 6)
        assert theirs.cfg.metadata.model_name == "gpt2"
        assert theirs.W_dec.shape == (32, 8)
        if act in ("relu", "jumprelu"):
            torch.testing.assert_close(theirs.W_dec.norm(dim=1), torch.ones(32))
            acts = acts / found.sae.weights.W_dec.norm(dim=1)
    assert_same(found, x, acts, theirs(x))


@pytest.mark.parametrize("act", ["relu", "topk"])
def test_sparsify(tmp_path, act):
    pytest.importorskip("sparsify", reason="the peer eai-sparsify is not installed")
    found, made_ = written(tmp_path, act, "sparsify")
    theirs, x = opened(made_)["sae"], rows()
    top_acts, top_indices, _ = theirs.encode(x)
    acts = torch.zeros(len(x), found.sae.d_sae).scatter_(1, top_indices, top_acts)
    assert_same(found, x, acts, theirs.decode(top_acts, top_indices))
    from sparsify import SparseCoder

    assert list(SparseCoder.load_many(str(tmp_path / "out"), local=True)) == ["h.6"]


@pytest.mark.parametrize("act", ["relu", "topk", "jumprelu"])
def test_dictionary_learning(tmp_path, act, monkeypatch):
    for module in ("nnsight", "zstandard"):  # imported by the package's buffers only
        if importlib.util.find_spec(module) is None:
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
            sys.modules[module].LanguageModel = object
    pytest.importorskip("dictionary_learning", reason="the peer dictionary-learning is not installed")
    found, made_ = written(tmp_path, act, "dictionary-learning")
    names, x = opened(made_), rows()
    theirs = names["sae"]
    assert_same(found, x, theirs.encode(x), theirs(x))
    trainer = names["config"]["trainer"]
    assert (trainer["layer"], trainer["lm_name"], trainer["submodule_name"]) == (6, "gpt2", "resid_post_layer_6")
