import pytest
import torch

from nsae_cli.metrics.groups import NON_SINKS, SINKS
from nsae_cli.metrics.norm_bias import EffectiveBatchFraction, NormMoments, alpha_eff, effective_batch_fraction


def test_esf_of_worked_weights() -> None:
    # (1 + 1 + 4)² / (3·(1 + 1 + 16)) = 36/54
    assert effective_batch_fraction(6, 18, 3) == pytest.approx(2 / 3)
    streamed = EffectiveBatchFraction()
    streamed.update(torch.tensor([4.0]))
    streamed.update(torch.tensor([1.0, 1.0], dtype=torch.float16))
    assert streamed.compute() == pytest.approx(2 / 3)


def test_esf_is_the_share_of_the_rows_that_count() -> None:
    streamed = EffectiveBatchFraction()
    streamed.update(torch.tensor([5.0, 5.0, 0.0, 0.0, 0.0]))
    assert streamed.compute() == pytest.approx(0.4)


def test_esf_without_weight_is_undefined() -> None:
    assert EffectiveBatchFraction().compute() is None
    assert effective_batch_fraction(0, 0, 5) is None


@pytest.fixture
def moments() -> NormMoments:
    moments = NormMoments()
    moments.update(torch.tensor([1.0, 4.0]), torch.tensor([0, 2]))
    moments.update(torch.tensor([2.0, 10.0], dtype=torch.float16), torch.tensor([0, SINKS]))
    return moments


def test_pre_flight_esf_is_that_of_the_powers_of_the_norms(moments: NormMoments) -> None:
    # p = 0, a = n²: 1, 16, 4 and 100 for the sink. ns: 21²/(3·273); all: 121²/(4·10273).
    assert moments.effective_batch_fraction(0, NON_SINKS) == pytest.approx(441 / 819)
    assert moments.effective_batch_fraction(0) == pytest.approx(14641 / 41092)
    # p = 1, a = n: 17²/(4·121).
    assert moments.effective_batch_fraction(1) == pytest.approx(289 / 484)
    assert moments.effective_batch_fraction(2) == pytest.approx(1)


@pytest.mark.parametrize(
    ("p", "q", "h", "bin0", "bin2", "sinks"),
    [
        # ns means: n 7/3, n² 7, 1/n 7/12. Bin 0 (1, 2): n 3/2, n² 5/2, 1/n 3/4. Bin 2: 4. Sink: 10.
        (0, 0, 1, (1.5 / 2.5) / (1 / 3), (1 / 4) / (1 / 3), (1 / 10) / (1 / 3)),
        (0, 0, 0, 7 / 2.5, 7 / 16, 7 / 100),
        (1, 0, 0, (7 / 3) / 1.5, (7 / 3) / 4, (7 / 3) / 10),
        (2, 0, 1, 1.5 * 3 / 7, 4 * 3 / 7, 10 * 3 / 7),
        (1, 1, 0, (0.75 / 1.5) * 4, (1 / 16) * 4, (1 / 100) * 4),
        (2, 1, 1, 1, 1, 1),
    ],
)
def test_alpha_eff_of_worked_norms(
    moments: NormMoments, p: int, q: int, h: int, bin0: float, bin2: float, sinks: float
) -> None:
    relative = alpha_eff(moments, l2_power=p, l1_power=q, degree=h)
    assert relative["bins"][0] == pytest.approx(bin0)
    assert relative["bins"][2] == pytest.approx(bin2)
    assert relative["sinks"] == pytest.approx(sinks)
    assert relative["ns"] == pytest.approx(1)
    assert relative["bins"][1] is None


def test_alpha_eff_without_non_sinks_is_undefined() -> None:
    moments = NormMoments()
    moments.update(torch.tensor([10.0]), torch.tensor([SINKS]))
    assert alpha_eff(moments, 0, 0, 1)["sinks"] is None
