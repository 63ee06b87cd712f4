import pytest
import torch

from nsae_cli.metrics.groups import N_GROUPS, SINKS, group_sums, norm_groups, per_scope, zero_rows

EDGES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


def test_a_bin_includes_its_lower_edge_and_the_outer_bins_are_open() -> None:
    norm = torch.tensor([0.0, 0.99, 1.0, 1.5, 2.0, 8.99, 9.0, 4000.0])
    groups = norm_groups(norm, EDGES, torch.zeros(8, dtype=torch.bool))
    assert groups.tolist() == [0, 0, 1, 1, 2, 8, 9, 9]
    assert groups.dtype == torch.int64


def test_a_sink_is_in_no_bin() -> None:
    groups = norm_groups(torch.tensor([2.5, 2.5]), EDGES, torch.tensor([True, False]))
    assert groups.tolist() == [SINKS, 2]


def test_an_edge_between_two_float32_norms_separates_them() -> None:
    # 1 + 2⁻²³ is the next float32 after 1; the edge between the two would round to 1.
    norm = torch.tensor([1.0, 1.0 + 2**-23])
    edges = [1.0 + 2**-25, *EDGES[1:]]
    assert norm_groups(norm, edges, torch.zeros(2, dtype=torch.bool)).tolist() == [0, 1]


def test_edges_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="9 numbers"):
        norm_groups(torch.ones(1), EDGES[:-1], torch.zeros(1, dtype=torch.bool))


def test_zero_rows_are_judged_relative_to_the_scale() -> None:
    norm = torch.tensor([0.0, 4e-5, 6e-5, 1.0])
    assert zero_rows(norm, norm_scale=50.0).tolist() == [True, True, False, False]


def test_group_sums_and_scopes() -> None:
    sums = group_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, SINKS, 0]))
    assert sums.shape == (N_GROUPS, 2)
    scopes = per_scope(lambda groups: sums[groups, 1].sum().item())
    assert (scopes["all"], scopes["ns"], scopes["sinks"]) == (12.0, 8.0, 4.0)
    assert scopes["bins"] == [8.0] + [0.0] * 9


def test_a_non_finite_row_spoils_its_own_group_only() -> None:
    sums = group_sums(torch.tensor([[torch.nan], [3.0]]), torch.tensor([2, 5]))
    assert sums[2].isnan().all()
    assert sums[5].item() == 3.0
