import pytest
import torch

from nsae_cli.device import choose_device
from nsae_cli.errors import ResourceError


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "device", "reason"),
    [
        (True, True, "cuda", "cuda: Some GPU (--device auto: the fastest that is there)"),
        (False, True, "mps", "mps (--device auto: the fastest that is there)"),
        (False, False, "cpu", "(--device auto: no CUDA and no MPS)"),
    ],
)
def test_auto_says_why(cuda: bool, mps: bool, device: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda, mps)
    chosen, why = choose_device("auto")
    assert chosen.type == device
    assert why.endswith(reason)


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=False, mps=False)
    with pytest.raises(ResourceError, match=r"--device cuda: .* finds no such device here; use --device cpu"):
        choose_device("cuda")
    assert choose_device("cpu")[0] == torch.device("cpu")
