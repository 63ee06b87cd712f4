"""How option values are written: sizes, shares, lists, layers, devices."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from nsae_cli.device import choose_device
from nsae_cli.errors import ResourceError, UsageError
from nsae_cli.values import Size, parse_fraction, parse_layers, parse_size, split_list, validate_options


@pytest.mark.parametrize(
    ("text", "size"),
    [("2000", 2000), ("500k", 500_000), ("1.5M", 1_500_000), ("1B", 10**9), ("2g", 2 * 10**9), ("1e6", 10**6),
     ("2_048", 2048), (7, 7), (1e4, 10_000), (" 3 k ", 3000), ("9007199254740993", 9007199254740993)],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0.0001k", "1e-3", "nan", "inf", True, None, 1.5, "1kk", "1e19",
                                  "9" * 400, "1e999", "٣"])  # fmt: skip
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="expected a"):
        parse_size(text)


def test_shares_and_lists() -> None:
    assert [parse_fraction(text) for text in ("1%", "0.01", "100 %", 0.5)] == [0.01, 0.01, 1.0, 0.5]
    for text in ("x", "nan", "inf%", ""):
        with pytest.raises(ValueError, match=r"1% or 0\.01"):
            parse_fraction(text)
    assert (split_list("a, b"), split_list(3), split_list(["a"])) == (["a", "b"], [3], ["a"])
    for text in ("", "a,", "a,,b", []):
        with pytest.raises(ValueError, match="without gaps"):
            split_list(text)
    with pytest.raises(ValueError, match="each value once"):
        split_list("a,a")


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", [1, 2, 3, 7]), ("7", [7]), (7, [7]), ("3,1", [1, 3]), ("1-3", [1, 2, 3]), ("1-2, 7", [1, 2, 7]),
     ([1, "2-3"], [1, 2, 3])],
)  # fmt: skip
def test_layers(text: str | int | list[int | str], layers: list[int]) -> None:
    assert parse_layers(text, [3, 1, 2, 7], "it") == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [("0", "layer 0: it has 1-3,7"), ("2-7", "layer 4: it has 1-3,7"), ("0-99999999999", "layer 99999999999: it has"),
     ("five", "'five' is not a layer"), ("-1", "'-1' is not a layer"), ("3-1", "3-1 runs backwards"),
     ("1,1-2", "layer 1 is named twice"), ("", "'' is not a layer"), ("٣", "is not a layer")],
)  # fmt: skip
def test_what_is_no_layer(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers(text, [3, 1, 2, 7], "it")
    assert message in str(caught.value)


def test_every_layer_problem_is_reported() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("x,9,3-1", [1, 2], "it")
    assert len(caught.value.problems) == 3


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    scale: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    rows: Size = Field(5, ge=2, le=10)
    flag: bool = False
    word: str = Field("x", min_length=1)


def test_problems_in_the_words_of_the_command_line() -> None:
    with pytest.raises(UsageError) as caught:
        validate_options(Options, {"scale": "-2", "rows": "11", "flag": "maybe", "word": "", "other": 1})
    assert caught.value.problems == [
        "--scale -2: expected auto or more than 0",
        "--rows 11: expected at most 10",
        "--flag maybe: expected true or false",
        "--word '': expected a text",
        "--other is not an option of this command",
    ]
    assert str(caught.value) == "; ".join(caught.value.problems)
    assert validate_options(Options, {"scale": "2", "rows": "1e1"}) == Options(scale=2, rows=10)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "Some GPU")
    assert choose_device("cuda:1") == (torch.device("cuda:1"), "cuda:1: Some GPU (--device cuda:1)")
    with pytest.raises(ResourceError, match="--device cuda:2: there are cuda:0 to cuda:1"):
        choose_device("cuda:2")
