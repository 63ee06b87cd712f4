"""Exit codes 4, 5 and 6: scenarios."""

from __future__ import annotations

import errno
import io
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from provoking import Place, commands, edit, scenario, system_error
from safetensors.torch import load_file, save_file

from hand_store import HOOK, make_rows, write_foreign, write_full
from nsae_cli.store import commit

COLLECT = ["collect", "--model", "mini", "--tokens", "2k", "--device", "cpu", "--name", "new"]

commands(HUB_NOT_FOUND="collect --model ./nowhere")


def _disk_fails(place: Place, code: int) -> list[Any]:
    place.empty()

    def fail(operation: str, path: object) -> None:
        if operation == "fsync":
            raise system_error(code, path)

    place.patch.setattr(commit, "fault_hook", fail)
    return COLLECT


@scenario("DISK_FULL")
def _(place: Place) -> list[Any]:
    return _disk_fails(place, errno.ENOSPC)


@scenario("FILE_SIZE_LIMIT")
def _(place: Place) -> list[Any]:
    return _disk_fails(place, errno.EFBIG)


@scenario("NO_PERMISSION")
def _(place: Place) -> list[Any]:
    return _disk_fails(place, errno.EACCES)


@scenario("WRITE_FAILED")
def _(place: Place) -> list[Any]:
    return _disk_fails(place, errno.EIO)


@scenario("DISK_TOO_SMALL")
def _(place: Place) -> list[Any]:
    place.empty()
    usage = namedtuple("usage", "total used free")
    place.patch.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    return COLLECT


@scenario("FOLDER_MISSING")
def _(place: Place) -> list[Any]:
    place.workspace = place.corpus("file", b"")
    return ["list"]


@scenario("READ_FAILED")
def _(place: Place) -> list[Any]:
    place.empty()
    text = place.corpus("a.txt", b"a text " * 1000)
    opened = Path.open

    def fail(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == text.name:
            raise system_error(errno.EIO, path)
        return opened(path, *arguments, **options)

    place.patch.setattr(Path, "open", fail)
    return ["collect", "--model", "mini", "--corpus", text, "--device", "cpu"]


@scenario("STDOUT_FAILED")
def _(place: Place) -> list[Any]:
    class Full(io.StringIO):
        """The first that is made, which is stdout, takes nothing."""

        made = 0

        def __init__(self) -> None:
            super().__init__()
            self.full, Full.made = Full.made == 0, Full.made + 1

        def write(self, text: str) -> int:
            if self.full:
                raise system_error(errno.ENOSPC)
            return super().write(text)

    place.patch.setattr("command.io.StringIO", Full)
    return ["list"]


@scenario("SYSTEM_ERROR")
def _(place: Place) -> list[Any]:
    place.empty()
    place.raises("shutil.disk_usage", system_error(errno.ESTALE, place.workspace))
    return COLLECT


@scenario("CANNOT_WORK")
def _(place: Place) -> list[Any]:
    place.workspace = place.corpus("file", b"")
    place.patch.setenv("HF_HUB_OFFLINE", "1")
    return ["doctor"]


@scenario("OUT_OF_MEMORY")
def _(place: Place) -> list[Any]:
    place.empty()
    place.raises("transformers.AutoModel.from_pretrained", torch.OutOfMemoryError("CUDA out of memory."))
    return COLLECT


@scenario("DEVICE_MISSING")
def _(place: Place) -> list[Any]:
    place.patch.setattr(torch.cuda, "is_available", lambda: False)
    return ["train", "--seed", "9", "--device", "cuda"]


def _hub_answers(place: Place, kind: str) -> list[Any]:
    from huggingface_hub import errors

    answer = getattr(errors, kind)
    place.empty()
    place.raises("huggingface_hub.HfApi.model_info", answer.__new__(answer))  # without the response that it quotes
    return ["collect", "--model", "some/model"]


@scenario("HUB_UNREACHABLE")
def _(place: Place) -> list[Any]:
    place.empty()
    place.raises("huggingface_hub.HfApi.model_info", system_error(errno.ENETUNREACH))
    place.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place.tmp / "cache"))
    return ["collect", "--model", "gpt2"]


@scenario("HUB_GATED")
def _(place: Place) -> list[Any]:
    return _hub_answers(place, "GatedRepoError")


@scenario("HUB_REVISION")
def _(place: Place) -> list[Any]:
    return [*_hub_answers(place, "RevisionNotFoundError"), "--revision", "x"]


@scenario("DOWNLOAD_FAILED")
def _(place: Place) -> list[Any]:
    from nsae_cli.lm.hub import HubRepository

    place.empty()
    found = HubRepository(True, "0" * 40, ("config.json", "model.safetensors"))
    place.patch.setattr("nsae_cli.lm.loading.ask_hub", lambda *_: found)
    place.raises("nsae_cli.lm.loading.hf_hub_download", system_error(errno.ECONNRESET))
    return ["collect", "--model", "some/model"]


@scenario("MODEL_FOLDER_MISSING")
def _(place: Place) -> list[Any]:
    place.damaged()
    edit(place.store / "manifest.json", model="my-model", model_sha256="0" * 64)
    edit(place.cell / "run.json", model="my-model")
    return ["eval", place.cell_name, "--activations", place.store.name, "--name", "new", "--device", "cpu"]


# Numbers -------------------------------------------------------------------------------------------------------------


@scenario("MODEL_NOT_FINITE")
def _(place: Place) -> list[Any]:
    place.empty()
    folder = place.model()
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor.flatten()[:1].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return ["collect", "--model", folder, "--corpus", "builtin", "--tokens", "2k", "--device", "cpu"]


@scenario("STORAGE_OVERFLOW")
def _(place: Place) -> list[Any]:
    place.damaged()
    return ["alter", "--stretch-norms", "1000", "--name", "new"]


@scenario("STORE_NOT_FINITE")
def _(place: Place) -> list[Any]:
    rows = make_rows()
    for x in rows.x.values():
        x[7, 3] = torch.inf
    place.empty()
    return ["norms", write_foreign(place.tmp / "foreign", rows, [480]), "--name", "new"]


@scenario("ALL_ROWS_ZERO")
def _(place: Place) -> list[Any]:
    place.empty()
    rows = make_rows()
    rows.x = {hook: torch.zeros_like(x) for hook, x in rows.x.items()}
    return ["norms", write_foreign(place.tmp / "zero", rows, [480]), "--name", "new"]


@scenario("LOSS_NOT_FINITE")
def _(place: Place) -> list[Any]:
    place.damaged()
    return ["train", "--lr", "1e37", "--lr-warm-up", "0", "--tokens", "20k", "--device", "cpu", "--name", "new"]


@scenario("WEIGHTS_NOT_FINITE")
def _(place: Place) -> list[Any]:
    folder = place.golden("saelens6-standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][3, 2] = torch.nan
    save_file(tensors, folder / "sae_weights.safetensors")
    return ["audit", folder, "--hook", "blocks.1.hook_resid_post", "--model", "mini"]


@scenario("RECONSTRUCTION_NOT_FINITE")
def _(place: Place) -> list[Any]:
    place.empty()
    folder = place.golden("saelens6-standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"] *= 1e38
    save_file(tensors, folder / "sae_weights.safetensors")
    rows = write_full(place.tmp / "rows", make_rows(d_in=8), [480])
    return ["audit", folder, "--activations", rows, "--hook", HOOK, "--no-behaviour", "--device", "cpu"]


@scenario("FOLDER_BUSY")
def _(place: Place) -> list[Any]:
    folder = place.empty() / "activations"
    folder.mkdir(parents=True)
    holder = {"host": "another-machine", "pid": 1, "started": "2026-01-01 00:00:00"}
    (folder / ".new.lock").write_text(json.dumps(holder))
    return COLLECT


def _push(place: Place, **answers: Any) -> list[Any]:
    """A push to a hub of which these methods answer, or raise, as told."""
    place.workspace = place.finished
    place.patch.setenv("HF_TOKEN", "hf_token")
    for method, answer in answers.items():
        if isinstance(answer, BaseException):
            place.raises(f"huggingface_hub.HfApi.{method}", answer)
        else:
            place.patch.setattr(f"huggingface_hub.HfApi.{method}", lambda *_, answer=answer, **__: answer)
    return ["push", place.cell_name, "org/saes", "--yes"]


def _hub_error(kind: str, status: int) -> BaseException:
    from huggingface_hub import errors

    error: BaseException = getattr(errors, kind).__new__(getattr(errors, kind))
    error.response = namedtuple("response", "status_code")(status)  # type: ignore[attr-defined]
    return error


@scenario("HUB_LOGIN")
def _(place: Place) -> list[Any]:
    return _push(place, whoami=_hub_error("HfHubHTTPError", 401))


@scenario("HUB_REFUSED")
def _(place: Place) -> list[Any]:
    gone = _hub_error("RepositoryNotFoundError", 404)
    return _push(place, whoami={}, model_info=gone, create_repo=_hub_error("HfHubHTTPError", 403))


@scenario("UPLOAD_FAILED")
def _(place: Place) -> list[Any]:
    gone = _hub_error("RepositoryNotFoundError", 404)
    return _push(place, whoami={}, model_info=gone, create_repo=system_error(errno.ECONNRESET))
