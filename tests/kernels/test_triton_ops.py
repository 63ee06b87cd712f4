"""The Triton operations in Triton's interpreter (tests/conftest.py turns it on) against torch's, and a compilation.

The interpreter runs the kernels' code on CPU tensors, program by program. It shows wrong indices, masks, bounds and
sums. It does not show races (programs run one after another) and does not multiply bfloat16: there the kernel
multiplies the same bfloat16 numbers in float32. `benchmarks/bench_gpu.py` checks both on a GPU.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import Problem, assert_close, assert_same

from nsae_cli.kernels.adam import Adam
from nsae_cli.kernels.certified import round_rows
from nsae_cli.kernels.decoder import normalise_rows_
from nsae_cli.kernels.dense import DenseStep
from nsae_cli.kernels.entries import Entries, TooManyEntriesError
from nsae_cli.kernels.native import library
from nsae_cli.kernels.native_ops import NativeOps
from nsae_cli.kernels.reference import step_gradients
from nsae_cli.kernels.select import AdaptiveKernel, choose
from nsae_cli.kernels.sparse import SparseStep
from nsae_cli.kernels.torch_ops import TorchOps
from nsae_cli.kernels.types import Weights
from nsae_cli.kernels.update import GradientBuffer, Updater
from nsae_cli.sae.nonlinearity import NONLINEARITIES
from nsae_cli.sae.penalty import PENALTIES

if sys.platform != "linux":
    pytest.skip("triton is there on Linux only", allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from nsae_cli.kernels.triton_kernels import features
from nsae_cli.kernels.triton_ops import TritonOps

# Biases that leave no entry, one in a thousand or so, a few percent, half, and nearly all.
DENSITIES = {"none": -50.0, "one": -3.6, "few": -2.0, "half": 0.0, "all": 3.0}
VARIANTS = list(itertools.product([False, True], [False, True]))  # certified, deterministic
COMBINATIONS = list(itertools.product(NONLINEARITIES, PENALTIES))


def problem(shape: tuple[int, int, int], bias: float = -0.8, noisy: bool = False) -> Problem:
    made = Problem(shape, torch.float32, bias=bias, noisy=noisy)
    made.weights = made.weights.by_feature()
    return made


def find(ops: TritonOps | TorchOps, made: Problem, top_k: int | None = None, threshold: float = 0.0) -> Entries:
    weights = made.weights
    return ops.active(made.x, weights, weights.b_enc, noise=made.noise, threshold=threshold, top_k=top_k)


def assert_same_entries(found: Entries, expected: Entries) -> None:
    assert torch.equal(found.row_ptr, expected.row_ptr)
    assert torch.equal(found.cols, expected.cols)
    torch.testing.assert_close(found.pre_acts, expected.pre_acts, rtol=1e-6, atol=2e-6)


def random_columns(made: Problem, seed: int = 0):
    """A batch's entries by TorchOps and values of every kind for them."""
    entries = find(TorchOps(), made)
    generator = torch.Generator().manual_seed(seed)
    delta, pull, dots = torch.randn(3, len(entries.cols), generator=generator)
    along = torch.randn(len(made.weights.b_enc), generator=generator)
    return entries, delta, pull, dots, along


@pytest.mark.parametrize(("certified", "deterministic"), VARIANTS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_entries(width, density, certified, deterministic):
    made = problem((11, 9, width), DENSITIES[density])
    assert_same_entries(find(TritonOps(certified, deterministic), made), find(TorchOps(), made))


@pytest.mark.parametrize(("certified", "deterministic"), VARIANTS)
def test_entries_of_several_tiles(certified, deterministic):
    """More than a tile in each of rows, features and depth, none of them full."""
    made = problem((137, 70, 131), -1.5, noisy=True)
    expected = find(TorchOps(), made)
    ops = TritonOps(certified, deterministic)
    found = find(ops, made)
    assert_same_entries(found, expected)
    again = find(ops, made)
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(again).values(), strict=True))
    if certified:
        assert len(expected.cols) <= ops.evaluated <= 1.1 * len(expected.cols)


@pytest.mark.parametrize("deterministic", [False, True])
def test_entries_of_a_wide_sae_above_a_threshold(deterministic):
    made = problem((33, 16, 1023), noisy=True)
    expected = find(TorchOps(), made, threshold=1.3)
    assert 0.02 < len(expected.cols) / (33 * 1023) < 0.2
    assert_same_entries(find(TritonOps(False, deterministic), made, threshold=1.3), expected)


@pytest.mark.parametrize("certified", [False, True])
def test_no_active_entry_is_missed_among_ties(certified):
    """Pre-activations are multiples of 1/16 around the threshold, exact in float32: 0 itself is not active."""
    made = problem((40, 8, 50))
    made.x = (made.x * 4).round() / 4
    made.weights.W_enc.copy_((made.weights.W_enc * 4).round() / 4)
    made.weights.b_enc.copy_((made.weights.b_enc * 4).round() / 4)
    z = made.x @ made.weights.W_enc + made.weights.b_enc
    assert int((z == 0).sum()) > 3
    assert torch.equal(find(TritonOps(certified), made).row_ptr.diff(), (z > 0).sum(1))


@pytest.mark.parametrize(("certified", "deterministic"), VARIANTS)
def test_a_nan_is_an_entry(certified, deterministic):
    made = problem((5, 9, 20))
    made.x[2, 3] = float("nan")
    found = find(TritonOps(certified, deterministic), made)
    assert found.counts[2] == 20
    assert found.pre_acts[found.row_ptr[2] : found.row_ptr[3]].isnan().all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_candidates_are_those_of_the_bound(deterministic, monkeypatch):
    """The kernel's test against the formula in `certified.py`, in float64, every term of it large enough to count."""
    made = problem((40, 24, 60))
    made.weights.W_enc.mul_(3)
    made.weights.b_enc += 5000
    made.noise = torch.randn(40, 60, generator=torch.Generator().manual_seed(5)) - 5000
    ops, found = TritonOps(True, deterministic), {}
    monkeypatch.setattr(ops, "_evaluate", lambda row_ptr, cols, *_: (row_ptr, found.setdefault("cols", cols), cols))
    entries = find(ops, made, threshold=0.5)
    candidates = torch.zeros(40, 60, dtype=torch.bool)
    candidates[entries.rows(), entries.cols.long()] = True

    rounded, shadow = round_rows(made.x, made.weights.b_dec), ops._shadow
    z = rounded.rows.double() @ shadow.copy.double().t()
    bias = made.weights.b_enc.double() + made.weights.b_dec.double() @ made.weights.W_enc.double()
    value = z + bias + made.noise + rounded.slack[:, None]
    terms = {
        "rounding of x": rounded.row_a[:, None].double() * shadow.norm,
        "rounding of W_enc": rounded.row_b[:, None].double() * shadow.rest,
        "arithmetic": (z.abs() + bias.abs() + made.noise.abs()) * 2.0**-20,
    }
    bound = value + sum(terms.values())
    near = (bound - 0.5).abs() < 2e-3  # numbers of 5000 are rounded to 2.4e-4
    assert torch.equal(candidates | near, (bound > 0.5) | near)
    for name, term in terms.items():
        assert not torch.equal(candidates | near, (bound - term > 0.5) | near), name


@pytest.mark.parametrize("top_k", [1, 3, 64])
@pytest.mark.parametrize("certified", [False, True])
def test_top_k(certified, top_k):
    made = problem((11, 9, 64), -0.5, noisy=True)
    assert_same_entries(find(TritonOps(certified), made, top_k), find(TorchOps(), made, top_k))


@pytest.mark.parametrize(("certified", "deterministic"), VARIANTS)
def test_room_grows_and_more_than_allowed_is_said(certified, deterministic):
    made = problem((3, 5, 400), 0.3)  # more than 128 entries per row
    expected = find(TorchOps(), made)
    assert len(expected.cols) > 128 * 3
    assert_same_entries(find(TritonOps(certified, deterministic), made), expected)
    with pytest.raises(TooManyEntriesError, match=r"^7\d\d active entries, room for 120$"):
        find(TritonOps(certified, deterministic, most_density=0.1), made)


def test_a_batch_with_too_many_entries_takes_a_dense_step():
    made = problem((12, 5, 40))
    sparse = SparseStep(TritonOps(False, most_density=0.05))
    kernel = AdaptiveKernel(DenseStep(), sparse, crossover=0.01, density=0.001)
    assert kernel.name.startswith("triton")
    arguments = {
        "activation": NONLINEARITIES["relu"],
        "penalty": PENALTIES["l1"],
        "error_weight": made.error_weight,
        "sparsity_weight": made.sparsity_weight,
    }
    found = kernel.backward(made.x, made.weights, GradientBuffer(made.weights), **arguments)
    expected = made.run(DenseStep(), "relu", "l1")
    assert kernel.name == "dense"
    assert_same((found.result, found.full()), expected, 0.0)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_decode_and_row_sums(width, density):
    made = problem((11, 9, width), DENSITIES[density])
    entries = find(TorchOps(), made)
    acts = entries.pre_acts
    wide = made.to(torch.float64)
    error, sq_error, dots = TorchOps().decode(entries, acts.double(), wide.weights, wide.x)
    found = TritonOps(False).decode(entries, acts, made.weights, made.x)
    assert_close(found[0], error, 2e-6, "error")
    assert_close(found[1], sq_error, 2e-6, "sq_error")
    if len(acts):
        assert_close(found[2], dots, 3e-6, "dots")
    torch.testing.assert_close(TritonOps(False).row_sums(entries, acts), TorchOps().row_sums(entries, acts))


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("width", [1, 7, 64])
def test_entries_by_feature(width, density):
    made = problem((11, 9, width), DENSITIES[density])
    entries, delta, pull, dots, _ = random_columns(made)
    found = TritonOps(False).by_feature(entries, width, delta, pull, dots)
    expected = TorchOps().by_feature(entries, width, delta, pull, dots)
    for name in ("col_ptr", "rows", "delta", "pull"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.sum_delta, expected.sum_delta, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.sum_along, expected.sum_along, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "density", "dense_share"),
    [
        *(((11, 9, width), density, share) for width in (1, 7, 64) for density in DENSITIES for share in (0.0, 0.3, 1)),
        ((11, 5, 1023), "few", 0.3),
    ],
)
def test_gradients(shape, density, dense_share):
    """dense_share 0 sends every feature through the dense product, 0.3 some of them, 1 none."""
    made = problem(shape, DENSITIES[density])
    entries, delta, pull, dots, along = random_columns(made)
    columns = TorchOps().by_feature(entries, shape[2], delta, pull, dots)
    error = torch.randn(made.x.shape, generator=torch.Generator().manual_seed(3))
    expected, found = made.weights.zeros_like(), Weights(*(torch.full_like(t, 7.0) for t in made.weights.tensors()))
    TorchOps().gradients(columns, made.x, error, along, made.weights, expected)
    ops = TritonOps(False, dense_share=dense_share)
    slots = ops._frequent(columns, made.x, error)[0]
    frequent = columns.counts > dense_share * 11
    assert torch.equal(frequent, torch.zeros_like(frequent) if slots is None else slots >= 0)
    ops.gradients(columns, made.x, error, along, made.weights, found)
    torch.testing.assert_close(found.W_enc, expected.W_enc, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(found.W_dec, expected.W_dec, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("act", "penalty"), COMBINATIONS)
def test_a_whole_step_equals_autograd(act, penalty, noisy):
    made = problem((23, 16, 50), noisy=noisy)
    expected = made.to(torch.float64).run(step_gradients, act, penalty)
    assert_same(made.run(SparseStep(TritonOps(certified=True)), act, penalty), expected, 5e-6)
    assert_same(made.run(SparseStep(TritonOps(False, deterministic=True)), act, penalty), expected, 5e-6)


@pytest.mark.parametrize("shape", [(0, 4, 7), (1, 1, 1), (5, 4, 1)])
@pytest.mark.parametrize("certified", [False, True])
def test_a_step_of_odd_shapes(certified, shape):
    made = problem(shape, 0.5)
    expected = made.to(torch.float64).run(step_gradients, "tanh-relu", "l1-decoder-norm")
    step = SparseStep(TritonOps(certified))
    if shape[0]:
        assert_same(made.run(step, "tanh-relu", "l1-decoder-norm"), expected, 5e-6)
    else:
        _, gradients = made.run(step, "tanh-relu", "l1-decoder-norm")
        assert not any(gradient.any() for gradient in gradients.tensors())


def test_inputs_are_left_alone():
    made = problem((20, 12, 40), noisy=True)
    before = [t.clone() for t in (made.x, made.noise, made.error_weight, *made.weights.tensors())]
    made.run(SparseStep(TritonOps(True)), "relu", "l1-decoder-norm")
    after = (made.x, made.noise, made.error_weight, *made.weights.tensors())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def five_updates(step: SparseStep | DenseStep, made: Problem, decoder: str, penalty: str) -> tuple[Weights, Adam]:
    weights = made.weights.to(torch.float32).by_feature()
    normalise_rows_(weights.W_dec)
    updater, into = Updater(weights, decoder, None), GradientBuffer(weights)
    for number in range(5):
        gradients = step.backward(
            made.x.roll(number, 0),
            weights,
            into,
            activation=NONLINEARITIES["relu"],
            penalty=PENALTIES[penalty],
            error_weight=made.error_weight,
            sparsity_weight=made.sparsity_weight,
        )
        updater.step(gradients, 0.003 * (number + 1))
    return weights, updater.adam


@pytest.mark.parametrize(
    ("decoder", "penalty", "dense_share"),
    [("unit", "l1", 1.0), ("bounded", "tanh", 0.1), ("free", "l1-decoder-norm", 1.0)],
)
def test_five_updates_equal_the_dense_and_the_compiled_ones(decoder, penalty, dense_share):
    made = problem((16, 13, 24), -0.2)
    ops = TritonOps(certified=True, dense_share=dense_share)
    found, adam = five_updates(SparseStep(ops), made, decoder, penalty)
    twins: list[SparseStep | DenseStep] = [DenseStep()]
    if loops := library.load():
        twins.append(SparseStep(NativeOps(loops, certified=True)))
    for twin in twins:
        expected, expected_adam = five_updates(twin, made, decoder, penalty)
        for name, tensor in expected.named().items():
            assert_close(found.named()[name], tensor, 5e-6, name)
        for name, tensor in expected_adam.state().items():
            assert_close(adam.state()[name], tensor, 5e-6, name)
    # The copy of the encoder that the update wrote is that of the weights as they are, with bounds that hold.
    shadow, encoder = ops._shadow, found.W_enc.t()
    assert torch.equal(shadow.copy, encoder.bfloat16())
    exact = torch.linalg.vector_norm(encoder.double(), dim=1)
    rest = torch.linalg.vector_norm(encoder.double() - shadow.copy.double(), dim=1)
    assert ((shadow.norm >= exact) & (shadow.norm <= exact * 1.002)).all()
    assert ((shadow.rest >= rest) & (shadow.rest <= rest * 1.002)).all()
    shadow.rest.zero_()
    shadow.refresh(found.W_enc)  # not made anew …
    assert not shadow.rest.any()
    found.W_enc.mul_(2)
    shadow.refresh(found.W_enc)  # … until somebody else changes the weights
    torch.testing.assert_close(shadow.rest.double(), 2 * rest, rtol=2e-3, atol=0)


def test_the_copy_rounds_as_torch_does():
    # Ties to both sides, a carry into the exponent, a subnormal number, a NaN.
    encoder = torch.tensor([[0.0, -0.0, 1.00390625, 1.01171875, -1.00390625, 1.9999999, 3e-40, float("nan")]])
    copy, norm, rest = torch.empty(1, 8, dtype=torch.int16), torch.empty(1), torch.empty(1)
    features.shadow[(1,)](encoder, copy, norm, rest, 8, 1.0, 0.0, BD=8)
    assert torch.equal(copy[0, :7], encoder.bfloat16().view(torch.int16)[0, :7])
    assert copy.view(torch.bfloat16)[0, 7].isnan()


def test_one_transfer_to_the_host_per_step(monkeypatch):
    """Of the ways in which torch reads a tensor, `active` takes one, once; nothing else does."""
    reads = []

    def counting(name):
        original = getattr(torch.Tensor, name)

        def read(self, *arguments):
            reads.append(name)
            return original(self, *arguments)

        return read

    made = problem((9, 6, 20))
    step = SparseStep(TritonOps(certified=True))
    made.run(step, "relu", "l1")
    kernels_read_in_the_interpreter = []
    original_run = InterpretedFunction.run

    def run(self, *arguments, **options):
        before = len(reads)
        result = original_run(self, *arguments, **options)
        kernels_read_in_the_interpreter.extend(reads[before:])
        del reads[before:]
        return result

    monkeypatch.setattr(InterpretedFunction, "run", run)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counting(name))
    made.run(step, "relu", "l1")
    assert reads == ["tolist"]


def test_the_kernel_that_cuda_gets():
    kernel = choose("sparse", "certified", torch.device("cuda")).make(8, 64, NONLINEARITIES["relu"])
    assert kernel.name == "triton, certified bf16 encoder"


TYPES = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "int16": "*i16", "int32": "*i32", "int64": "*i64"}
COMPILE = Path(__file__).with_name("compile_kernels.py")


def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    """Every launch of a step at d_in 768 is compiled for compute capability 9.0; this needs no GPU."""
    launches: dict[str, dict] = {}
    original_run = InterpretedFunction.run

    def run(self, *arguments, grid, warmup, num_warps=4, num_stages=3, enable_fp_fusion, **options):
        names = list(self.arg_names)
        values = dict(zip(names, arguments, strict=False)) | options
        arguments_of: dict[str, list] = {}
        for name in names:
            value = values[name]
            if isinstance(value, torch.Tensor):
                arguments_of[name] = ["type", TYPES[str(value.dtype).removeprefix("torch.")]]
            elif name.isupper() or value is None:
                arguments_of[name] = ["constant", False if name == "WIDEN" else value]
            else:
                arguments_of[name] = ["type", "fp32" if isinstance(value, float) else "i32"]
        launch = {"module": self.fn.__module__, "kernel": self.fn.__name__, "arguments": arguments_of}
        launch["options"] = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
        launches[json.dumps(launch)] = launch
        return original_run(self, *arguments, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    made = problem((8, 768, 12), 0.0)
    for ops in (TritonOps(True), TritonOps(False, deterministic=True, dense_share=1.0)):
        five_updates(SparseStep(ops), made, "bounded", "l1")
        made.run(SparseStep(ops), "relu", "l1")
    kernels = [launch["kernel"] for launch in launches.values()]
    assert len(set(kernels)) == 12
    assert kernels.count("find_in_two_passes") == 1  # one compiled kernel makes both passes
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(COMPILE)],
        input=json.dumps(list(launches.values())),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == len(launches)
    # The certified product is on Hopper's tensor cores.
    assert {name for name, uses_tensor_cores in compiled if uses_tensor_cores} == {"find_reserved"}


def test_the_benchmark_runs():
    script = Path(__file__).parents[2] / "benchmarks" / "bench_gpu.py"
    options = "--device cpu --shape 8,12,5 --l0 2 --rounds 1 --repeats 1 --backend eager"
    done = subprocess.run([sys.executable, str(script), *options.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("missed 0 added 0") == 3
    assert done.stdout.count("0 of 1 repeats differ") == 3
    assert done.stdout.count(" ms, ") == 6
