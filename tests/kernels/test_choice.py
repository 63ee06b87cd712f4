"""Which kernel steps, and when it changes."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from problems import Problem

from nsae_cli.errors import UsageError
from nsae_cli.kernels import calibration, select
from nsae_cli.kernels.calibration import Point
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.entries import TooManyEntriesError
from nsae_cli.kernels.native import library
from nsae_cli.kernels.select import AdaptiveKernel, choose
from nsae_cli.kernels.update import GradientBuffer
from nsae_cli.sae.nonlinearity import NONLINEARITIES

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RELU = NONLINEARITIES["relu"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


BAD_TYPES = '[{"machine": "m", "kind": "torch", "d_in": "wide", "d_sae": 1, "density": 0.5}]'


def step(kernel: AdaptiveKernel, active: float) -> str:
    """Takes a step in which this share of the entries is active; returns the name of the kernel that took it."""
    problem = Problem((32, 8, 200), torch.float32)
    name = kernel.name
    z = problem.pre_acts()
    problem.weights.b_enc.sub_(torch.quantile(z, 1 - active).float())
    kernel.backward(problem.x, problem.weights, GradientBuffer(problem.weights), **problem.arguments("relu", "l1"))
    return "dense" if name == "dense" else "sparse"


def test_steps_change_with_the_density_and_do_not_flicker():
    kernel = choose("auto", "auto", CPU).make(8, 200, RELU)
    crossover = kernel.describe()["crossover_density"]
    taken = [step(kernel, share) for share in (0.5, 0.5, 0.22, 0.21, 0.1, 0.01, 0.21, 0.22, 0.6, 0.21, 0.18, 0.01, 0.5)]
    assert crossover == calibration.DEFAULTS[choose("auto", "auto", CPU).kind] == 0.2
    # .22 and .21 are within 15 % of .2: whoever is at work goes on.
    assert taken == ["dense"] * 5 + ["sparse"] * 4 + ["dense"] * 3 + ["sparse"]


def test_asked_for_kernels_never_change():
    for option in ("dense", "sparse"):
        kernel = choose(option, "auto", CPU).make(8, 200, RELU)
        assert [step(kernel, share) for share in (0.5, 0.01, 0.9)] == [option] * 3
        assert kernel.describe()["crossover_density"] is None


def test_a_resumed_kernel_goes_on_where_it_was():
    first = choose("auto", "auto", CPU).make(8, 200, RELU)
    step(first, 0.01)
    calibration.save_points([Point(calibration.machine(CPU), choose("auto", "auto", CPU).kind, 8, 200, 0.001)])
    second = choose("auto", "auto", CPU).make(8, 200, RELU)
    assert second.describe()["crossover_density"] == 0.001
    second.load_state(first.state())
    assert step(second, 0.22) == "sparse"
    assert second.describe()["crossover_density"] == 0.2  # the run's own, not what was measured since


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_auto_takes_the_best_that_is_there_and_says_why(monkeypatch, certified, compiled):
    monkeypatch.setattr(select.certified, "has_bf16_products", lambda: certified)
    if not compiled:
        monkeypatch.setattr(library, "load", lambda isa=None: None)
    choice = choose("auto", "auto", CPU)
    assert choice.kind == ("torch" if not compiled else "native-certified" if certified else "native-fp32")
    words = "torch's CSR" if not compiled else "certified" if certified else "no bf16 products in this processor"
    assert words in choice.reason
    kernel = choice.make(8, 200, RELU)
    step(kernel, 0.001)
    assert step(kernel, 0.001) == "sparse"


def test_what_is_not_there_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # no triton
    for kernel, precision, words in (("sparse", "auto", "--kernel sparse"), ("auto", "certified", "--precision cert")):
        for device in (CUDA, torch.device("mps")):
            with pytest.raises(UsageError, match=f"{words}.*only on the CPU, and on CUDA with triton"):
                choose(kernel, precision, device)
    for device in (CPU, CUDA):
        with pytest.raises(UsageError, match="only sparse steps"):
            choose("dense", "certified", device)
    monkeypatch.setattr(library, "load", lambda isa=None: None)
    with pytest.raises(UsageError, match="compiled loops, which this installation lacks"):
        choose("auto", "certified", CPU)


def test_cuda_steps_sparsely_only_once_it_has_been_timed_there(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    untimed = choose("auto", "auto", CUDA)
    assert (untimed.kind, untimed.name) == ("none", "dense")
    assert "nsae bench --calibrate" in untimed.reason
    with pytest.raises(UsageError, match="give --kernel sparse too"):
        choose("auto", "certified", CUDA)
    assert choose("sparse", "auto", CUDA).kind == "triton-certified"
    calibration.save_points([Point(calibration.machine(CUDA), "triton-certified", 768, 6144, 0.008)])
    assert choose("auto", "fp32", CUDA).kind == "none"
    calibration.save_points([Point(calibration.machine(CUDA), "triton-fp32", 768, 6144, 0.004)])
    for precision in ("auto", "certified", "fp32"):
        timed = choose("auto", precision, CUDA)
        assert (timed.certified, timed.dense) == (precision != "fp32", True)
        assert timed.kind == f"triton-{'fp32' if precision == 'fp32' else 'certified'}"
    assert calibration.crossover("triton-fp32", CUDA, 768, 24576) == 0.004
    assert calibration.crossover("triton-fp32", CPU, 768, 24576) is None


def test_cuda_multiplies_in_bf16_unless_told_otherwise():
    assert choose("auto", "auto", CUDA).dense_dtype is torch.bfloat16
    assert choose("auto", "fp32", CUDA).dense_dtype is None
    assert choose("auto", "auto", CPU).dense_dtype is None


def test_measured_crossovers_of_this_machine_come_first_and_the_nearest_shape_wins():
    here = calibration.machine(CPU)
    calibration.save_points(
        [
            Point(here, "native-fp32", 64, 512, 0.3),
            Point(here, "native-fp32", 768, 6144, 0.1),
            Point("another machine", "torch", 64, 512, 0.9),
        ]
    )
    assert calibration.crossover("native-fp32", CPU, 64, 1024) == 0.3
    assert calibration.crossover("native-fp32", CPU, 1024, 16384) == 0.1
    assert calibration.crossover("torch", CPU, 64, 512) == calibration.DEFAULTS["torch"]
    calibration.save_points([Point(here, "native-fp32", 64, 512, 0.25)])
    assert calibration.crossover("native-fp32", CPU, 64, 512) == 0.25
    assert len(calibration.load_points()) == 3


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 1}', '[{"machine": 3}]', BAD_TYPES])
def test_a_damaged_cache_is_no_cache(text):
    calibration.cache_file().parent.mkdir(parents=True)
    calibration.cache_file().write_text(text)
    assert calibration.crossover("torch", CPU, 8, 8) == calibration.DEFAULTS["torch"]
    calibration.save_points([Point("m", "torch", 1, 1, 0.5)])
    assert len(json.loads(calibration.cache_file().read_text())) == 1


def test_without_a_home_folder_there_is_no_cache(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(calibration.Path, "home", no_home)
    assert calibration.crossover("torch", CPU, 8, 8) == calibration.DEFAULTS["torch"]


def test_a_sparse_step_that_keeps_giving_batches_back_is_given_up():
    class Refusing:
        name = "refusing"
        asked = 0

        def backward(self, *arguments, **options):
            self.asked += 1
            raise TooManyEntriesError(10, 5)

    refusing = Refusing()
    kernel = AdaptiveKernel(DenseStep(), refusing, crossover=0.2, density=0.01)
    assert [step(kernel, 0.01) for _ in range(8)] == ["sparse"] * 3 + [
        "dense"
    ] * 5  # asked, then taken by the dense one
    assert refusing.asked == 3
    resumed = AdaptiveKernel(DenseStep(), refusing, crossover=0.2, density=0.01)
    resumed.load_state(kernel.state())
    assert step(resumed, 0.01) == "dense"
    assert step(resumed, 0.01) == "dense"
    assert refusing.asked == 3


def test_the_gradients_memory_is_given_back_with_the_first_sparse_step():
    kernel, problem = choose("auto", "auto", CPU).make(8, 200, RELU), Problem((32, 8, 200), torch.float32)
    buffer = GradientBuffer(problem.weights)
    problem.weights.b_enc.sub_(100)
    kernel.backward(problem.x, problem.weights, buffer, **problem.arguments("relu", "l1"))
    assert buffer._gradients is None
    assert kernel.name != "dense"
