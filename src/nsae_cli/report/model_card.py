"""The README.md of a repository of SAEs on the Hugging Face hub: a model card, written from their run.json alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsae_cli.report import format as fmt

#: Says to the next `nsae push` that the card may be written again.
MARK = "<!-- Written by `nsae push` from run.json; the next push writes it again. -->"
_EMBEDDED = ("mini", "mini-sink")
#: Options that are said elsewhere or change no result.
_SAID = ("hook", "d_sae", "act", "k", "tokens", "seed")
_METRICS = (
    ("tokens", "tokens"),
    ("l0", "L0"),
    ("fvu_p0", "FVU"),
    ("explained_variance", "explained variance"),
    ("mre", "mean ‖x̂−x‖²/‖x‖²"),
    ("cosine", "cosine"),
    ("norm_ratio", "‖x̂‖/‖x‖"),
    ("shrinkage", "γ"),
    ("dead_fraction", "dead"),
    ("bias_ratio", "bias"),
)


@dataclass(frozen=True)
class CardEntry:
    """An SAE of the repository: its folder, its run.json, and the corpus that its cfg.json names."""

    folder: str
    run: Mapping[str, Any]
    corpus: str | None = None

    @property
    def act(self) -> str:
        """Its activation as it was trained."""
        return str((self.run.get("config") or {}).get("act", "relu"))

    @property
    def saved_act(self) -> str:
        """Its activation as it is saved: batchtopk is jumprelu with one threshold."""
        return "jumprelu" if self.act == "batchtopk" else self.act


def model_card(repository: str, entries: Sequence[CardEntry], license_: str | None) -> str:
    """The card of a repository: what, data, options, metrics with and without sinks and by norm bin, how to load.

    Args:
        repository: ``org/repo``.
        entries: its SAEs, in the order to be shown; at least one.
        license_: the licence's identifier; None to leave it out.
    """
    name = repository.partition("/")[2]
    parts = [
        _front_matter(entries, license_),
        MARK,
        f"# {name}",
        _what(entries),
        _data(entries),
        _overview(entries) if len(entries) > 1 else "",
        "## Metrics",
        _metrics_note(entries[0].run),
        *(_metrics(entry, folded=len(entries) > 1) for entry in entries),
        _options(entries),
        "## Loading",
        *_loadings(repository, entries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def is_written_by_nsae(card: str) -> bool:
    """Whether a card may be written again: nobody else's is."""
    return MARK in card


def license_of(card: str) -> str | None:
    """The licence that a card's front matter names; None where it names none."""
    front = card.split("\n---", 1)[0] if card.startswith("---") else ""
    found = re.search(r"^license: *([\w.\-]+) *$", front, flags=re.MULTILINE)
    return None if found is None else found[1]


# Head ----------------------------------------------------------------------------------------------------------------


def _front_matter(entries: Sequence[CardEntry], license_: str | None) -> str:
    # SAELens opens all but tanh-relu by itself.
    plain = all(entry.saved_act != "tanh-relu" for entry in entries)
    models = sorted({base for entry in entries if (base := _base_model(entry.run)) is not None})
    lines = [
        "---",
        f"library_name: {'saelens' if plain else 'nsae'}",
        "tags:",
        *(f"- {tag}" for tag in ("sparse-autoencoder", "saelens", "nsae", "interpretability")),
    ]
    if models:
        lines += ["base_model:", *(f"- {model}" for model in models)]
    if license_ is not None:
        lines.append(f"license: {license_}")
    return "\n".join([*lines, "---"])


def _base_model(run: Mapping[str, Any]) -> str | None:
    """The model's id on the hub; None for an embedded model or a local folder, which are not there."""
    model = run.get("model")
    if not isinstance(model, str) or model in _EMBEDDED:
        return None
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", model):
        return f"openai-community/{model}"
    return model if re.fullmatch(r"[\w.\-]+/[\w.\-]+", model) else None


def _what(entries: Sequence[CardEntry]) -> str:
    runs = [entry.run for entry in entries]
    models, hooks = _each(fmt.model_name(run.get("model")) for run in runs), _each(f"`{run['hook']}`" for run in runs)
    if len(entries) == 1:
        run, entry = runs[0], entries[0]
        k = (run.get("config") or {}).get("k")
        act = f"{entry.act}, k = {k}" if k else entry.act
        what = (
            f"A sparse autoencoder (SAE) on {hooks} of {models}: {fmt.count(run['d_sae'])} features, "
            f"{fmt.count(run['d_in'])} wide, activation {act}."
        )
    else:
        what = f"{len(entries)} sparse autoencoders (SAEs) on {hooks} of {models}."
    notes = ", ".join(dict.fromkeys(str(run["embedded_note"]) for run in runs if run.get("embedded_note")))
    versions = _each(str((run.get("versions") or {}).get("nsae", "?")) for run in runs)
    acts = {entry.saved_act: _FORMULAS[entry.saved_act] for entry in entries if entry.saved_act in _FORMULAS}
    formulas = "\n".join(f"    acts = {formula}  # {act}" if len(acts) > 1 else f"    acts = {formula}"
                         for act, formula in acts.items())  # fmt: skip
    return (
        f"{what} Trained with nsae {versions}.{' Note: ' + notes + '.' if notes else ''}\n\n"
        f"Weights are float32, in units of the raw activations of the Hugging Face model (no folded or centred "
        f"weights):\n\n    pre_acts = x @ W_enc + b_enc\n{formulas}\n    x_hat = acts @ W_dec + b_dec"
    )


_FORMULAS = {
    "relu": "relu(pre_acts)",
    "tanh-relu": "tanh(relu(pre_acts))",
    "topk": "relu(pre_acts) of the k largest pre_acts of each row, 0 elsewhere",
    "jumprelu": "relu(pre_acts) where pre_acts > threshold, 0 elsewhere",
}


def _data(entries: Sequence[CardEntry]) -> str:
    runs = [entry.run for entry in entries]
    tokens = _each(fmt.count((run.get("counts") or {}).get("tokens")) for run in runs)
    rows = [
        ("model", _each(fmt.model_name(run.get("model")) for run in runs)),
        ("hook", _each(f"`{run['hook']}`" for run in runs)),
        ("trained on", _each(fmt.trained_on(run) or fmt.MISSING for run in runs)),
        ("contexts", _each(fmt.source_line(_without_note(run)) for run in runs)),
        ("rows seen by each SAE", tokens),
    ]
    rows.insert(1, ("corpus", _each(entry.corpus for entry in entries if entry.corpus)))
    return "## Data\n\n" + _table(["", ""], [list(row) for row in rows])


def _without_note(run: Mapping[str, Any]) -> dict[str, Any]:
    return {**run, "embedded_note": None}


# Metrics -------------------------------------------------------------------------------------------------------------


def _metrics_note(run: Mapping[str, Any]) -> str:
    context = fmt.source_line(_without_note(run))
    return (
        "On held-out tokens, which no SAE was trained on. Sinks are the few tokens of extreme norm, as a rule the "
        f"first of a context ({context}): they are told apart because they dominate every average. FVU: unexplained "
        "share of the variance; γ: 1 means no shrinkage; dead: share of features silent on these tokens; bias: share "
        "of the loss for errors ÷ share of tokens, 1 where every token counts alike. Norm bins are tenths of the "
        "training tokens that are no sinks, by ‖x‖."
    )


def _overview(entries: Sequence[CardEntry]) -> str:
    heads = ["folder", "activation", "`--l2-norm`", "features", "α", "L0"]
    heads += ["FVU without sinks", "FVU with sinks", "dead"]
    rows = []
    for entry in entries:
        config, metrics = entry.run.get("config") or {}, entry.run.get("metrics") or {}
        without, all_ = metrics.get("ns") or {}, metrics.get("all") or {}
        rows.append(
            [
                f"`{entry.folder}`",
                entry.act,
                str(config.get("l2_norm", fmt.MISSING)),
                fmt.count(entry.run.get("d_sae")),
                fmt.number(entry.run.get("alpha")),
                fmt.number(without.get("l0")),
                fmt.number(without.get("fvu_p0")),
                fmt.number(all_.get("fvu_p0")),
                fmt.percent(all_.get("dead_fraction")),
            ]
        )
    return "## SAEs\n\n" + _table(heads, rows)


def _metrics(entry: CardEntry, *, folded: bool) -> str:
    metrics, edges = entry.run.get("metrics") or {}, entry.run.get("edges")
    scopes: list[tuple[str, Mapping[str, Any]]] = [
        ("all tokens", metrics.get("all") or {}),
        ("without sinks", metrics.get("ns") or {}),
        ("sinks", metrics.get("sinks") or {}),
    ]
    scopes += [(_bin(number, edges), values) for number, values in enumerate(metrics.get("bins") or [])]
    heads = ["", *(label for _, label in _METRICS)]
    rows = [[label, *(_cell(key, values.get(key)) for key, _ in _METRICS)] for label, values in scopes]
    table = _table(heads, rows)
    nbi = (metrics.get("ns") or {}).get("nbi")
    if nbi is not None:
        low, high = ((metrics["ns"]).get(key) for key in ("nbi_low", "nbi_high"))
        table += (
            f"\n\nNorm bias index: {fmt.number(nbi)} (95 % {fmt.number(low)} to {fmt.number(high)}; 0 where the "
            f"relative error does not depend on the norm)."
        )
    if not folded:
        return table
    return f"<details><summary><code>{entry.folder}</code></summary>\n\n{table}\n\n</details>"


def _bin(number: int, edges: Any) -> str:
    """``norm bin 3 (3.77 to 3.86)``; the outer ones are open."""
    if not isinstance(edges, list) or not edges:
        return f"norm bin {number}"
    low = fmt.number(edges[number - 1]) if 0 < number <= len(edges) else None
    high = fmt.number(edges[number]) if number < len(edges) else None
    shown = f"below {high}" if low is None else f"from {low}" if high is None else f"{low} to {high}"
    return f"norm bin {number}, ‖x‖ {shown}"


def _cell(key: str, value: Any) -> str:
    if key == "tokens":
        return fmt.count(value)
    return fmt.percent(value) if key == "dead_fraction" else fmt.number(value)


# Options -------------------------------------------------------------------------------------------------------------


def _options(entries: Sequence[CardEntry]) -> str:
    configs = [entry.run.get("config") or {} for entry in entries]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [
        [f"`{key}`", values]
        for key in keys
        if (values := _each(_option(config.get(key)) for config in configs)) != fmt.MISSING or key in _SAID
    ]
    return "## Options\n\n" + _table(["option of `nsae train`", ""], rows)


def _option(value: Any) -> str:
    if value is None:
        return fmt.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Loading -------------------------------------------------------------------------------------------------------------


def _loadings(repository: str, entries: Sequence[CardEntry]) -> list[str]:
    """The code for one SAE of each activation: what is to be typed differs by it alone."""
    kinds: dict[str, list[CardEntry]] = {}
    for entry in entries:
        kinds.setdefault(entry.saved_act, []).append(entry)
    parts = []
    for act, alike in kinds.items():
        if len(kinds) > 1:
            parts.append(f"### {act}")
        parts.append(_loading(repository, alike[0], others=[entry.folder for entry in alike[1:]]))
    return parts


def _loading(repository: str, entry: CardEntry, *, others: Sequence[str]) -> str:
    where = f"{repository}:{entry.folder}"
    d_in, hook = int(entry.run["d_in"]), re.sub(r"[^\w.\-]", "_", str(entry.run["hook"]))
    other = ""
    if others:
        other = f" In the same way, with its own folder{' and k' if entry.saved_act == 'topk' else ''}, each of "
        other += ", ".join(f"`{folder}`" for folder in others) + "."
    register = ""
    if entry.saved_act == "tanh-relu":
        register = "import nsae_cli.interop.saelens\n\nnsae_cli.interop.saelens.register()  # for tanh-relu\n"
    x = f"x = torch.randn(4, {d_in})  # rows of {hook}"
    k = (entry.run.get("config") or {}).get("k")
    act = {
        "relu": "acts = torch.relu(pre_acts)",
        "tanh-relu": "acts = torch.tanh(torch.relu(pre_acts))",
        "topk": (
            f"top = pre_acts.topk({k}, dim=-1)\n"
            "acts = torch.zeros_like(pre_acts).scatter(-1, top.indices, torch.relu(top.values))"
        ),
        "jumprelu": 'acts = torch.relu(torch.where(pre_acts > sae["threshold"], pre_acts, 0))',
    }[entry.saved_act]
    return f"""The code below loads `{entry.folder}`.{other}

nsae, which also measures it (`nsae audit {where}`) and fetches it (`nsae pull {where}`):

```python
import torch
from nsae_cli.interop.opening import open_sae

{x}
sae = open_sae("{where}").sae
acts, x_hat = sae.reconstruct(x)
```

[SAELens](https://github.com/decoderesearch/SAELens), version 6:

```python
import torch
from sae_lens import SAE
{register}
{x}
sae = SAE.from_pretrained("{repository}", "{entry.folder}")
acts = sae.encode(x)
x_hat = sae.decode(acts)
```

safetensors and torch alone:

```python
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

{x}
sae = load_file(hf_hub_download("{repository}", "{entry.folder}/sae_weights.safetensors"))
pre_acts = x @ sae["W_enc"] + sae["b_enc"]
{act}
x_hat = acts @ sae["W_dec"] + sae["b_dec"]
```"""


# Markdown ------------------------------------------------------------------------------------------------------------


def _each(values: Any) -> str:
    """The different values among several SAEs', in their order."""
    return ", ".join(dict.fromkeys(values)) or fmt.MISSING


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(heads), ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
