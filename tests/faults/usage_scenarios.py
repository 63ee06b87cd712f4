"""Exit code 2: scenarios."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from provoking import GOLDEN, Place, commands, edit, scenario

from hand_store import make_rows, write_foreign, write_full

commands(
    COMMAND_LINE="frobnicate",
    OPTION_VALUE="train --act gelu",
    OPTION_DOES_NOT_FIT="collect --model mini --context 129",
    OPTION_WITHOUT_EFFECT="collect --model mini --revision main",
    REFUSED_COMBINATION="train --d-sae 96 --expansion-factor 4",
    NAME_INVALID="train --name a/b",
    NAME_TAKEN="analyze-top-norms --top 5%",
    OPTIONS_CHANGED="collect --model mini-sink --tokens 30k --device cpu --name {place.store.name}",
    OUTPUT_IS_INPUT="alter --permute-norms --name {place.store.name}",
    NOT_FOUND="train nope",
    SAE_NOT_FOUND="audit no/such/sae",
    ANALYSIS_MISSING="compare --evals nope",
    BASELINE_UNKNOWN="compare --baseline nope",
    ALPHA_SOURCE="train --d-sae 32 --alpha-from {place.group.name}",
    PLOT_INPUT="plot activation x",
    LAYER_NOT_THERE="train --layers 0",
    CONTEXT_TOO_LONG="eval --corpus builtin --context 4096",
    CORPUS_NOT_FOUND="collect --model mini --corpus ./none.txt",
)


@scenario("OPTION_MISSING")
def _(place: Place) -> list[Any]:
    place.patch.setattr("nsae_cli.lm.live.COUNTED_BYTES", 10)
    return ["train", "--from-model", "mini", "--corpus", place.corpus("a.txt", b"a text " * 1000), "--device", "cpu"]


@scenario("KERNEL_MISSING")
def _(place: Place) -> list[Any]:
    place.patch.setattr("nsae_cli.kernels.native.library.load", lambda: None)
    return ["train", "--precision", "certified", "--device", "cpu", "--seed", "9"]


@scenario("WORKSPACE_EMPTY")
def _(place: Place) -> list[Any]:
    place.empty()
    return ["norms"]


@scenario("SEVERAL_SAES")
def _(place: Place) -> list[Any]:
    shutil.copytree(GOLDEN / "saelens6-standard", place.tmp / "several" / "a")
    shutil.copytree(GOLDEN / "saelens6-standard", place.tmp / "several" / "b")
    return ["audit", place.tmp / "several"]


@scenario("SAME_OUTPUT")
def _(place: Place) -> list[Any]:
    folders = [Path(shutil.copytree(place.cell, place.tmp / parent / "L2-relu")) for parent in ("here", "there")]
    return ["eval", *folders]


@scenario("STORE_OF_SAE_MISSING")
def _(place: Place) -> list[Any]:
    place.damaged()
    place.store.rename(place.store.with_name("elsewhere"))
    return ["analyze-top-norms", "--name", "new"]


@scenario("SOURCE_UNKNOWN")
def _(place: Place) -> list[Any]:
    return ["audit", place.golden("saelens6-standard", metadata={"sae_lens_version": "6.0.0"})]


@scenario("COMPARED_TWICE")
def _(place: Place) -> list[Any]:
    place.damaged()
    name = place.cell_name
    shutil.copytree(place.group, place.group.with_name("twin"))
    edit(place.workspace / "saes" / "twin" / "L2-relu" / "run.json", weights_sha256="0" * 64)
    return ["compare", name, "twin/L2-relu", "--name", "new"]


@scenario("CORPUS_EMPTY")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", "mini", "--corpus", place.corpus("a.txt", b"")]


@scenario("CORPUS_TOO_SHORT")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", "mini", "--corpus", place.corpus("a.txt", b"too short")]


@scenario("CORPUS_COLUMN")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", "mini", "--corpus", place.corpus("a.jsonl", b'{"content": "a"}\n')]


@scenario("CORPUS_ENCODING")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", "mini", "--corpus", place.corpus("a.txt", b"\xff\xfe")]


@scenario("CORPUS_FORMAT")
def _(place: Place) -> list[Any]:
    return ["collect", "--model", "mini", "--corpus", place.corpus("a.jsonl", b"no json\n")]


@scenario("CORPUS_CHOICE")
def _(place: Place) -> list[Any]:
    from nsae_cli.lm.hub import HubRepository

    place.patch.setattr("nsae_cli.lm.corpus.ask_hub", lambda *_: HubRepository(True, "0" * 40, ()))
    place.raises("datasets.load_dataset", ValueError("Unknown split 'x'. Should be one of ['train']."))
    return ["collect", "--model", "mini", "--corpus", "some/text", "--split", "x", "--device", "cpu"]


@scenario("NO_ROWS")
def _(place: Place) -> list[Any]:
    place.empty()
    return ["train", write_foreign(place.tmp / "none", make_rows(contexts=0), [0]), "--device", "cpu"]


@scenario("NOTHING_HELD_OUT")
def _(place: Place) -> list[Any]:
    place.damaged()
    rows = make_rows(contexts=10, d_in=64)
    return ["analyze-top-norms", "--name", "new", "--activations", write_full(place.tmp / "few", rows, [80])]


@scenario("TEXT_NOT_IN_STORE")
def _(place: Place) -> list[Any]:
    place.empty()
    return ["norms", "--probe", "--name", "new", write_foreign(place.tmp / "foreign", make_rows(), [480])]


@scenario("MODEL_FAMILY")
def _(place: Place) -> list[Any]:
    folder = place.model()
    edit(folder / "config.json", model_type="mamba")
    return ["collect", "--model", folder]


@scenario("CONFIG_UNREADABLE")
def _(place: Place) -> list[Any]:
    return ["run", place.corpus("c.yaml", b"stages: [")]


@scenario("CONFIG_PROBLEMS")
def _(place: Place) -> list[Any]:
    return ["run", place.corpus("c.yaml", b"stages:\n  - colect: {}\n")]
