from __future__ import annotations

import math

import pytest

from nsae_cli.report import format as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "–"),
        (0, "0"),
        (0.0, "0"),
        (3125.4, "3,125"),
        (9.996, "10.0"),
        (999.96, "1,000"),
        (12, "12.0"),
        (0.04567, "0.0457"),
        (0.000214, "0.000214"),
        (0.00002, "<0.0001"),
        (-0.00002, ">-0.0001"),
        (-12.34, "-12.3"),
        (123_456, "123,456"),
        (12_345_678, "12.3M"),
        (999_960_000, "1.00B"),
        (2.5e9, "2.50B"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 %"),
        (1, "100 %"),
        (0.3118, "31.2 %"),
        (0.0078, "0.780 %"),
        (0.99999, ">99.9 %"),
        (0.00001, "<0.01 %"),
        (1.5, "150 %"),
    ],
)
def test_shares_are_percentages(value: float | None, text: str) -> None:
    assert fmt.percent(value) == text


def test_plain_numbers_have_no_padding_zeros() -> None:
    assert [fmt.plain(value) for value in (9.0, 37.5, 0.2, 3000.0, 100, 0.05)] == [
        "9",
        "37.5",
        "0.2",
        "3,000",
        "100",
        "0.05",
    ]
    assert [fmt.plain_percent(value) for value in (0.01, 0.005, 0.78, 1.0, 0.00001)] == [
        "1 %", "0.5 %", "78 %", "100 %", "<0.01 %",
    ]  # fmt: skip
    assert fmt.span(20.0, 140.0) == "20–140"
    assert fmt.span(9.0, 9.0) == "9"


def test_sizes_counts_and_quotients() -> None:
    assert [fmt.size_in_bytes(size) for size in (None, 512, 1536, 2 * 2**30, "12 files")] == [
        "–", "512 B", "1.50 KiB", "2.00 GiB", "12 files",
    ]  # fmt: skip
    assert fmt.count(1_234_567) == "1,234,567"
    assert fmt.quotient(1, 0) is None
    assert fmt.quotient(None, 2) is None
    assert fmt.quotient(3, 2) == 1.5


def test_tokens_show_their_white_space() -> None:
    assert fmt.token(" the") == "' the'"
    assert fmt.token("\n") == "'\\n'"
    assert len(fmt.token("x" * 100)) == 26


def test_the_source_says_what_was_not_recorded() -> None:
    assert fmt.source_line(None) == "context length and packing not recorded"
    assert fmt.source_line({"context_size": 128, "packing": True, "bos": True}) == (
        "context 128, packed, each context begins with the BOS token"
    )
    assert (
        fmt.source_line({"context_size": 1024, "packing": None, "bos": None}) == "context 1,024, packing not recorded"
    )
    merged = fmt.merged_source(
        {"context_size": 128, "packing": None, "embedded_note": "placed"},
        {"context_size": 9, "packing": False, "bos": True},
    )
    assert merged == {"context_size": 128, "packing": False, "bos": True, "embedded_note": "placed"}
    assert fmt.source_line(merged).endswith("each context begins with the BOS token, placed")


def test_labels_lose_what_they_share_and_stay_distinct() -> None:
    assert fmt.short_labels(["run/L6-relu-none", "run/L6-relu-sq"]) == ["none", "sq"]
    assert fmt.short_labels(["run/L6-relu-none"]) == ["L6-relu-none"]
    assert fmt.short_labels(["a/b", "a/b-c"]) == ["b", "b-c"]
    assert fmt.short_labels(["a", "a"]) == ["a", "a"]
    assert fmt.folded("tanh-relu-none-seed1", 10) == "tanh-relu-\nnone-seed1"
    assert max(map(len, fmt.folded("x" * 25, 10).split("\n"))) == 10


def test_models_in_folders_are_named_by_the_folder() -> None:
    assert fmt.model_name("/data/models/mini-sink/") == "mini-sink"
    assert fmt.model_name("openai-community/gpt2") == "openai-community/gpt2"
    assert fmt.layer_of("blocks.6.hook_resid_post") == 6
    assert fmt.layer_of("layer6") is None
