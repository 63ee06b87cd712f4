"""Package data: the embedded models `mini` and `mini-sink`, their tokenizer and the built-in corpus.

Everything here is plain files next to this module, and importing it needs neither torch nor transformers: `model_dir`
gives a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read without a network.
"""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

EMBEDDED_MODELS = ("mini", "mini-sink")
BUILTIN_SPLITS = ("train", "heldout")

_HERE = Path(__file__).parent


def model_dir(name: str) -> Path:
    """Folder of an embedded model and its tokenizer, in the Hugging Face layout."""
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}: choose one of {', '.join(EMBEDDED_MODELS)}")
    return _HERE / name


def embedded_note(model: str | None) -> str | None:
    """What every table and figure of an embedded model has to say about it, or None."""
    return "mini-sink's sink is placed, not learned" if model == "mini-sink" else None


def builtin_documents(split: str) -> Iterator[str]:
    """Documents of the built-in corpus, in their stored (shuffled) order.

    No module or help topic has documents in both splits.
    """
    if split not in BUILTIN_SPLITS:
        raise ValueError(f"unknown split {split!r} of the built-in corpus: choose one of {', '.join(BUILTIN_SPLITS)}")
    return _read_jsonl(_HERE / "builtin" / f"{split}.jsonl.xz")


def _read_jsonl(path: Path) -> Iterator[str]:
    """The `text` field of each line; apart from `builtin_documents` so that an unknown split raises at the call."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]
