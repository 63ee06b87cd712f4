import torch

from nsae_cli.metrics.deadness import FiredWindow

A, B, NONE = torch.tensor([1, 0, 0, 0]) > 0, torch.tensor([0, 1, 0, 0]) > 0, torch.zeros(4) > 0


def test_a_feature_dies_when_its_last_batch_has_left_the_window() -> None:
    window = FiredWindow(4, window_tokens=100)
    window.update(A, 60)
    assert window.dead_fraction() == 0.75  # over the 60 tokens seen
    window.update(B, 60)
    assert window.dead_fraction() == 0.5  # tokens 21…120: part of A's batch
    window.update(NONE, 39)
    assert window.dead_fraction() == 0.5  # tokens 60…159: A's last token is number 60
    window.update(NONE, 1)
    assert window.dead_fraction() == 0.75  # tokens 61…160
    assert window.dead().tolist() == [True, False, True, True]


def test_nothing_is_silent_over_a_window_that_is_not_full() -> None:
    window = FiredWindow(4, window_tokens=100)
    assert window.silent().tolist() == [False] * 4
    window.update(A, 99)
    assert window.silent().tolist() == [False] * 4
    window.update(NONE, 1)
    assert window.silent().tolist() == [False, True, True, True]
    window.update(NONE, 98)
    assert not window.silent()[0]
    window.update(NONE, 1)
    assert window.silent().all()


def test_a_feature_that_fires_again_is_alive() -> None:
    window = FiredWindow(4, window_tokens=10)
    for fired in (A, NONE, NONE):
        window.update(fired, 10)
    assert window.dead_fraction() == 1
    window.update(A, 10)
    assert window.dead_fraction() == 0.75


def test_before_any_token_nothing_is_known() -> None:
    assert FiredWindow(4).dead_fraction() is None


def test_a_restored_window_goes_on_as_if_nothing_had_happened() -> None:
    window, restored = FiredWindow(4, window_tokens=100), FiredWindow(4, window_tokens=100)
    window.update(A, 60)
    state = window.state()
    window.update(B, 70)
    restored.load_state(state)
    assert restored.dead_fraction() == 0.75  # the state is a copy, untouched by later updates
    restored.update(B, 70)
    assert restored.dead().tolist() == window.dead().tolist() == [False, False, True, True]
    restored.update(NONE, 30)
    assert restored.dead_fraction() == 0.75
