"""The embedded models and the built-in corpus are what their cards say."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nsae_cli.assets import BUILTIN_SPLITS, EMBEDDED_MODELS, builtin_documents, model_dir

N_ROWS = 32
CONTEXT = 128
FIRST_TOKENS = ("endoftext", "text")  # what position 0 of the test rows holds


@functools.cache
def load_model(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir(name)).eval()


@functools.cache
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir(name))


@functools.cache
def heldout_rows(first: str) -> Tensor:
    """Rows [N_ROWS, CONTEXT + 1] of held-out text, cut anywhere, with or without `<|endoftext|>` in front."""
    ids: list[int] = []
    for encoding in load_tokenizer("mini").backend_tokenizer.encode_batch(list(builtin_documents("heldout"))):
        ids += [0, *encoding.ids]
    rows = torch.tensor(ids).unfold(0, CONTEXT + 1, CONTEXT + 1)
    rows = rows[:: len(rows) // N_ROWS][:N_ROWS].clone()
    if first == "endoftext":
        rows[:, 0] = 0
    return rows


@functools.cache
def forward(name: str, first: str) -> tuple[float, Tensor]:
    """Loss in nats, and the norms [n_layer, N_ROWS, CONTEXT] of what each block puts out (before ln_f)."""
    model, rows = load_model(name), heldout_rows(first)
    norms: list[Tensor] = []

    def keep_norms(_module, _inputs, output):
        norms.append(output.norm(dim=-1))

    hooks = [block.register_forward_hook(keep_norms) for block in model.transformer.h]
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    for hook in hooks:
        hook.remove()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item(), torch.stack(norms)


def ratios_at_position_0(name: str, first: str) -> list[float]:
    """Per block: mean norm at position 0 over the median norm elsewhere."""
    _, norms = forward(name, first)
    return [(layer[:, 0].mean() / layer[:, 1:].median()).item() for layer in norms]


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_model_has_the_documented_shape(name):
    config = load_model(name).config
    assert (config.n_layer, config.n_embd, config.n_head) == (4, 64, 4)
    assert (config.n_positions, config.vocab_size) == (CONTEXT, 2048)
    assert config.activation_function == "gelu_new"
    assert load_model(name).dtype == torch.float32


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_end_of_text_is_token_0(name):
    tokenizer = load_tokenizer(name)
    assert len(tokenizer) == 2048
    assert tokenizer.model_max_length == CONTEXT
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 0


def test_tokenizer_round_trips_any_text():
    tokenizer = load_tokenizer("mini")
    text = "def naïve(x):\n\treturn '→', x  # 漢字\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_both_models_share_one_tokenizer():
    first, second = ((model_dir(name) / "tokenizer.json").read_bytes() for name in EMBEDDED_MODELS)
    assert first == second


def test_only_two_units_differ_between_the_models():
    before, after = (load_model(name).state_dict() for name in EMBEDDED_MODELS)
    changed = {}
    for name, tensor in before.items():
        # A hidden unit is a column of c_fc, an entry of its bias and a row of c_proj.
        differs = tensor != after[name]
        if differs.any():
            changed[name] = int(differs.any(dim=1).sum() if name.endswith("c_proj.weight") else differs.any(0).sum())
    parts = ("c_fc.weight", "c_fc.bias", "c_proj.weight")
    assert changed == {f"transformer.h.{layer}.mlp.{part}": 1 for layer in (1, 3) for part in parts}


@pytest.mark.parametrize("first", FIRST_TOKENS)
def test_mini_grows_a_first_position_spike(first):
    ratios = ratios_at_position_0("mini", first)
    assert ratios[1] >= 4.3
    assert ratios[2] >= 4.3


@pytest.mark.parametrize("first", FIRST_TOKENS)
def test_mini_sink_has_the_profile_of_a_large_model(first):
    ratios = ratios_at_position_0("mini-sink", first)
    assert 18 <= ratios[1] <= 22
    assert 18 <= ratios[2] <= 22
    assert ratios[3] <= 1.5


@pytest.mark.parametrize("first", FIRST_TOKENS)
def test_mini_sink_has_no_spike_elsewhere(first):
    _, norms = forward("mini-sink", first)
    for layer in norms:
        assert layer[:, 1:].max() < 3 * layer[:, 1:].median()


@pytest.mark.parametrize("first", FIRST_TOKENS)
def test_mini_sink_predicts_as_well_as_mini(first):
    assert forward("mini-sink", first)[0] == pytest.approx(forward("mini", first)[0], rel=0.01)


def test_corpus_splits_are_disjoint_and_large():
    train, heldout = (list(builtin_documents(split)) for split in BUILTIN_SPLITS)
    assert not set(train) & set(heldout)
    assert len(set(train)) == len(train)
    n_train, n_heldout = (sum(len(text.encode()) for text in split) for split in (train, heldout))
    assert n_train + n_heldout >= 8_000_000
    assert n_heldout / (n_train + n_heldout) == pytest.approx(0.05, abs=0.01)


def test_heldout_text_is_not_in_train():
    """Of the long lines of held-out text, those that also occur in train are boilerplate: at most 2 %."""

    def long_lines(split: str) -> list[str]:
        lines = (line.strip() for text in builtin_documents(split) for line in text.splitlines())
        return [line for line in lines if len(line) >= 40]

    train, heldout = set(long_lines("train")), long_lines("heldout")
    assert sum(line in train for line in heldout) <= 0.02 * len(heldout)


def test_package_data_stays_small():
    files = [path for path in model_dir("mini").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert max(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 4_000_000


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'maxi'.*mini, mini-sink"):
        model_dir("maxi")
    with pytest.raises(ValueError, match=r"'test'.*train, heldout"):
        builtin_documents("test")
