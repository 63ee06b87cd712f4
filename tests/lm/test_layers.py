import pytest

from nsae_cli.errors import UsageError
from nsae_cli.lm.layers import hook_name, parse_layers


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("all", list(range(12))),
        ("6", [6]),
        ("0,3", [0, 3]),
        ("3,0", [0, 3]),
        ("0-3", [0, 1, 2, 3]),
        ("0-2, 5,7-8", [0, 1, 2, 5, 7, 8]),
        (None, [6]),
    ],
)
def test_layer_lists(spec: str | None, layers: list[int]) -> None:
    assert parse_layers(spec, 12, "gpt2") == layers


def test_default_is_the_middle_layer() -> None:
    assert [parse_layers(None, n, "m") for n in (1, 3, 4)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("40", "layer 40: gpt2 has 0-11"),
        ("12", "layer 12: gpt2 has 0-11"),
        ("0-1000000000", "layer 1000000000: gpt2 has 0-11"),
        ("-1", "'-1' is not a layer"),
        ("five", "'five' is not a layer"),
        ("", "'' is not a layer"),
        ("1,,2", "'' is not a layer"),
        ("3-1", "3-1 runs backwards"),
        ("1,0-2", "layer 1 is named twice"),
        ("blocks.3", "'blocks.3' is not a layer"),
    ],
)
def test_refused_layer_lists(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"gpt2|--layers") as caught:
        parse_layers(spec, 12, "gpt2")
    assert message in str(caught.value)


def test_every_layer_problem_is_reported() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("x,40,3-1", 12, "gpt2")
    assert str(caught.value).count(";") >= 2
    assert all(part in str(caught.value) for part in ("'x'", "layer 40", "3-1 runs backwards"))


def test_hook_names() -> None:
    assert hook_name(3, "resid_pre") == "blocks.3.hook_resid_pre"
    assert hook_name(11, "resid_post") == "blocks.11.hook_resid_post"
