from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import wavprune
from tests.support.cases import bits, model_of, normal, weight_of
from wavprune import PruneReport
from wavprune.errors import WavpruneError

Settings = dict[str, Any]
PRUNE: list[Callable[..., PruneReport]] = [wavprune.fast.prune, wavprune.reference.prune]
NAN, INF = math.nan, math.inf

each_entry = pytest.mark.parametrize("run", PRUNE, ids=["fast", "reference"])


def net() -> nn.ModuleDict:
    return model_of(first=normal(4, 3, 3, 3), second=normal(4, 4, 3, 5), last=normal(4, 4, 3, 3))


def weights(model: nn.Module) -> dict[str, bytes]:
    """The bits of every parameter that has some."""
    return {
        name: bits(value)
        for name, value in model.named_parameters()
        if not (
            nn.parameter.is_lazy(value) or value.is_meta or value.is_sparse or value.is_quantized
        )
    }


def assert_refused(
    model: nn.Module,
    kind: type[Exception],
    *said: str,
    run: Callable[..., PruneReport] = wavprune.fast.prune,
    **settings: Any,
) -> None:
    """Pruning raises, the message says all of it, and no weight has changed."""
    before = weights(model)
    with pytest.raises(kind) as caught:
        run(model, **settings)
    assert type(caught.value) is kind
    for words in said:
        assert words in str(caught.value)
    assert weights(model) == before


NAMES = [
    ("wavelet", "harr", ["unknown wavelet 'harr'", "haar", "uhaar", "106"]),
    ("wavelet", "Db4", ["'Db4'", "close to it", "db4"]),
    ("wavelet", "bior4,4", ["'bior4,4'", "bior4.4"]),
    ("wavelet", "morlet", ["'morlet'", "allowed"]),
    ("wavelet", "", ["unknown wavelet ''", "allowed"]),
    ("mode", "periodisation", ["unknown mode 'periodisation'", "periodization", "antireflect"]),
    ("method", "size", ["unknown method 'size'", "dwt, min_weight, random"]),
    ("scope", "model", ["unknown scope 'model'", "layer, global"]),
    ("device", "gpu", ["unknown device 'gpu'", "'cpu', 'cuda'"]),
    ("device", "meta", ["device 'meta' holds no values", "allowed"]),
]


@each_entry
@pytest.mark.parametrize(("name", "value", "said"), NAMES)
def test_unknown_names(
    run: Callable[..., PruneReport], name: str, value: str, said: list[str]
) -> None:
    assert_refused(net(), WavpruneError, *said, run=run, **{name: value})


def test_unknown_backends() -> None:
    known = f"allowed: auto, {', '.join(wavprune.backends.names())}"
    assert_refused(net(), WavpruneError, "'eagr'", "close to it: eager", known, backend="eagr")
    assert_refused(net(), WavpruneError, "unknown backend 'mkl'; allowed", known, backend="mkl")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_a_device_that_this_machine_lacks() -> None:
    assert_refused(net(), WavpruneError, "device 'mps' is not available here", device="mps")


@pytest.mark.parametrize("name", ["wavelet", "mode", "method", "scope", "backend", "device"])
@pytest.mark.parametrize("value", [3, b"haar", ["haar"]])
def test_names_that_are_no_strings(name: str, value: Any) -> None:
    assert_refused(net(), TypeError, name, repr(value), **{name: value})


NUMBERS = [
    ("level", 0, WavpruneError, "an integer, 1 or more"),
    ("level", -2, WavpruneError, "an integer, 1 or more"),
    ("level", True, TypeError, "an integer, 1 or more"),
    ("level", 1.5, TypeError, "an integer, 1 or more"),
    ("level", 2.0, TypeError, "an integer, 1 or more"),
    ("level", "2", TypeError, "an integer, 1 or more"),
    ("level", NAN, TypeError, "an integer, 1 or more"),
    ("sparsity", 1, WavpruneError, "[0, 1)"),
    ("sparsity", 1.0, WavpruneError, "[0, 1)"),
    ("sparsity", 80, WavpruneError, "[0, 1)"),
    ("sparsity", -0.1, WavpruneError, "[0, 1)"),
    ("sparsity", INF, WavpruneError, "[0, 1)"),
    ("sparsity", -INF, WavpruneError, "[0, 1)"),
    pytest.param("sparsity", 10**400, WavpruneError, "[0, 1)", id="more than a float holds"),
    ("sparsity", NAN, WavpruneError, "not NaN"),
    ("sparsity", np.float32("nan"), WavpruneError, "not NaN"),
    ("sparsity", "0.5", TypeError, "a number"),
    ("sparsity", True, TypeError, "a number"),
    ("sparsity", 0.5 + 0j, TypeError, "a number"),
    ("percentile", -0.5, WavpruneError, "[0, 100]"),
    ("percentile", 100.1, WavpruneError, "[0, 100]"),
    ("percentile", INF, WavpruneError, "[0, 100]"),
    ("percentile", NAN, WavpruneError, "not NaN"),
    ("percentile", "50", TypeError, "a number"),
    ("percentile", False, TypeError, "a number"),
    ("seed", -1, WavpruneError, "from 0 to"),
    ("seed", 2**63, WavpruneError, "from 0 to"),
    ("seed", 1.0, TypeError, "an integer"),
    ("seed", None, TypeError, "an integer"),
    ("force_level", 1, TypeError, "True or False"),
    ("force_level", None, TypeError, "True or False"),
]


@each_entry
@pytest.mark.parametrize(("name", "value", "kind", "allowed"), NUMBERS)
def test_numbers_out_of_range_and_of_other_types(
    run: Callable[..., PruneReport], name: str, value: Any, kind: type[Exception], allowed: str
) -> None:
    given = [] if value != value else [repr(value)]
    assert_refused(net(), kind, name, allowed, *given, run=run, **{name: value})


@each_entry
def test_amounts_that_exclude_each_other(run: Callable[..., PruneReport]) -> None:
    both: Settings = {"sparsity": 0.5, "percentile": 20}
    assert_refused(net(), WavpruneError, "sparsity=0.5", "percentile=20", "one of", run=run, **both)
    per_layer: Settings = {"percentile": 20, "scope": "global"}
    assert_refused(net(), WavpruneError, "percentile=20", "scope='global'", run=run, **per_layer)
    drawn: Settings = {"percentile": 20, "method": "random"}
    assert_refused(net(), WavpruneError, "percentile=20", "'random'", run=run, **drawn)


def test_a_forced_level_that_pywavelets_cannot_run() -> None:
    # A border of one value has no reflection.
    model = model_of(first=normal(4, 3, 3, 3), row=normal(4, 4, 2, 7))
    forced: Settings = {"wavelet": "haar", "mode": "reflect", "level": 2, "force_level": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Level value")
        assert_refused(model, WavpruneError, "'row'", "reflect", **forced)


# The model and its layers.


@each_entry
def test_what_is_no_model(run: Callable[..., PruneReport]) -> None:
    for given, kind in ((net().state_dict(), "OrderedDict"), (None, "NoneType"), ("a", "str")):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, not {kind}"):
            run(given)


@each_entry
def test_a_model_without_a_convolution(run: Callable[..., PruneReport]) -> None:
    for model in (nn.Linear(3, 3), nn.Sequential(nn.PReLU(3), nn.BatchNorm2d(3))):
        assert_refused(model, WavpruneError, f"{type(model).__name__} has no convolution", run=run)


PATTERNS = [
    ("frist", ["'frist' matches no layer", "first, second, last"]),
    (["first", "third"], ["'third' matches no layer"]),
    ("layer*", ["'layer*' matches no layer"]),
    ("re:irst", ["'re:irst' matches no layer"]),
    ("re:(", ["'re:('", "not a regular expression"]),
    ("", ["'' matches no layer"]),
    ([], ["is empty"]),
]


@each_entry
@pytest.mark.parametrize("name", ["targets", "ignore"])
@pytest.mark.parametrize(("value", "said"), PATTERNS)
def test_patterns_that_match_nothing(
    run: Callable[..., PruneReport], name: str, value: Any, said: list[str]
) -> None:
    assert_refused(net(), WavpruneError, name, *said, run=run, **{name: value})


@pytest.mark.parametrize("name", ["targets", "ignore"])
@pytest.mark.parametrize(("value", "given"), [(3, "3"), ([3], "3"), (["first", None], "None")])
def test_patterns_that_are_no_strings(name: str, value: Any, given: str) -> None:
    assert_refused(net(), TypeError, name, f"not {given}", **{name: value})


def test_nothing_left_to_prune() -> None:
    said = "no layer is left to prune", "'*'", "'first'"
    assert_refused(net(), WavpruneError, *said, targets="first", ignore="*")


NON_FINITE: list[dict[str, Any]] = [
    {"wavelet": "uhaar"},
    {"wavelet": "haar", "percentile": 50},
    {"wavelet": "haar", "percentile": 0},
    {"wavelet": "klt"},
    {"wavelet": "dct", "scope": "global"},
    {"method": "min_weight"},
    {"method": "min_weight", "percentile": 10},
    {"method": "min_weight", "sparsity": 0},
    {"method": "random"},
    {"method": "random", "scope": "global"},
]


@each_entry
@pytest.mark.parametrize("settings", NON_FINITE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinity_in_the_last_layer(
    run: Callable[..., PruneReport], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    for values in ([NAN], [INF], [-INF, INF], [NAN, INF, -INF]):
        model = net().to(dtype)
        flat = weight_of(model, "last").detach().view(-1)
        flat[torch.arange(len(values)) * 31 + 5] = torch.tensor(values, dtype=dtype)
        said = "layer 'last'", f"{len(values)} of 144 weights are NaN or infinite", "finite"
        assert_refused(model, WavpruneError, *said, run=run, **settings)


@pytest.mark.parametrize("backend", wavprune.backends.names())
def test_nan_in_every_backend(backend: str) -> None:
    if backend in wavprune.backends.unavailable():
        pytest.skip(wavprune.backends.unavailable()[backend])
    model = net()
    with torch.no_grad():
        weight_of(model, "last")[1, 2, 0, 1] = NAN
    assert_refused(
        model, WavpruneError, "layer 'last': 1 of 144", method="min_weight", backend=backend
    )


def test_nan_in_a_layer_that_is_not_selected_is_no_matter() -> None:
    model = net()
    with torch.no_grad():
        weight_of(model, "last")[0] = NAN
    assert len(wavprune.fast.prune(model, ignore="last")) == 2


def quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(normal(4, 4, 3, 3), 0.1, 0, torch.qint8)


def with_last(weight: torch.Tensor) -> nn.ModuleDict:
    model = net()
    last = nn.Conv2d(1, 1, 1)
    last.weight = nn.Parameter(weight, requires_grad=False)
    model["last"] = last
    return model


WEIGHTS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "meta": (lambda: torch.empty(4, 4, 3, 3, device="meta"), "meta device"),
    "quantised": (quantised, "quantised (torch.qint8)"),
    "sparse": (lambda: normal(4, 4, 3, 3).to_sparse(), "sparse (torch.sparse_coo)"),
    "int32": (lambda: torch.ones(4, 4, 3, 3, dtype=torch.int32), "dtype torch.int32"),
    "bool": (lambda: torch.ones(4, 4, 3, 3, dtype=torch.bool), "dtype torch.bool"),
    "complex": (lambda: torch.ones(4, 4, 3, 3, dtype=torch.complex64), "dtype torch.complex64"),
    "float8": (lambda: normal(4, 4, 3, 3).to(torch.float8_e5m2), "dtype torch.float8_e5m2"),
    "flat": (lambda: normal(9), "shape (9,)"),
    "expanded": (lambda: normal(4, 1, 3, 3).expand(4, 4, 3, 3), "overlaps itself in memory"),
    "windows": (lambda: normal(400).as_strided((4, 4, 3, 3), (9, 2, 3, 1)), "strides (9, 2, 3, 1)"),
}


@each_entry
@pytest.mark.parametrize(("weight", "said"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_other_kinds(
    run: Callable[..., PruneReport], weight: Callable[[], torch.Tensor], said: str
) -> None:
    model = with_last(weight())
    assert_refused(model, WavpruneError, "layer 'last'", said, "allowed", "float32", run=run)


def parts(*weights: torch.Tensor) -> nn.ModuleDict:
    """Convolutions whose weights are these views."""
    model = nn.ModuleDict()
    for i, weight in enumerate(weights):
        model[f"part{i}"] = conv = nn.Conv2d(1, 1, 1)
        conv.weight = nn.Parameter(weight, requires_grad=False)
    return model


@each_entry
def test_weights_that_share_a_part_of_their_memory(run: Callable[..., PruneReport]) -> None:
    shared = normal(8, 8, 3, 3)
    said = "'part0'", "'part1'", "share a part of their memory", "allowed"
    assert_refused(parts(shared[:5], shared[4:]), WavpruneError, *said, run=run)
    assert_refused(parts(shared, shared[:, 2:3]), WavpruneError, *said, run=run)
    halves = shared.view(torch.bfloat16)
    assert_refused(parts(shared, halves[2:, ..., 1::2]), WavpruneError, *said, run=run)
    # The last lies in the first, and short ones that share nothing lie between.
    woven = shared[:, ::2], shared[1:2, 1::2], shared[2:3, 1::2], shared[3:4]
    assert_refused(parts(*woven), WavpruneError, "'part0'", "'part3'", "share a part", run=run)


@each_entry
def test_weights_that_are_woven_into_each_other_are_pruned(
    run: Callable[..., PruneReport],
) -> None:
    shared = normal(8, 8, 3, 3)
    apart = parts(shared[:, ::2].clone(), shared[:, 1::2].clone())
    woven = parts(shared[:, ::2], shared[:, 1::2])
    for model in (apart, woven):
        run(model, sparsity=0.5)
    for one, other in zip(apart.children(), woven.children(), strict=True):
        assert weights(one)["weight"] == weights(other)["weight"]
    # Elements 0, 2, 3 and 5: two axes that cross each other without meeting.
    crossing = torch.zeros(80).as_strided((2, 2, 3, 3), (2, 3, 24, 8))
    crossing.copy_(normal(2, 2, 3, 3))
    assert run(parts(crossing), sparsity=0.5).kept == 18


@each_entry
def test_lazy_layers(run: Callable[..., PruneReport]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Lazy modules are a new feature")
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    assert_refused(model, WavpruneError, "layer '1'", "not initialised yet", run=run)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def torch_prune(conv: nn.Conv2d) -> None:
    prune.l1_unstructured(conv, "weight", 0.5)  # type: ignore[no-untyped-call]


def old_weight_norm(conv: nn.Conv2d) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.weight_norm(conv)


PARAMETRIZATIONS: dict[str, Callable[[nn.Conv2d], object]] = {
    "register_parametrization": lambda conv: parametrize.register_parametrization(
        conv, "weight", Doubled()
    ),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old_weight_norm,
    "prune": torch_prune,
}


@each_entry
@pytest.mark.parametrize("apply", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_weights_that_are_computed(
    run: Callable[..., PruneReport], apply: Callable[[nn.Conv2d], object]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    last = model[1]
    assert isinstance(last, nn.Conv2d)
    apply(last)
    assert_refused(model, WavpruneError, "layer '1'", "parametrization", run=run)
    assert [layer.name for layer in run(model, ignore="1")] == ["0"]


def test_another_modules_parametrization_is_no_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), parametrizations.weight_norm(nn.Linear(4, 4)))
    assert len(wavprune.fast.prune(model)) == 1


# match.


@pytest.fixture
def report() -> PruneReport:
    return wavprune.fast.prune(net())


@each_entry
def test_match_goes_with_no_other_amount(
    run: Callable[..., PruneReport], report: PruneReport
) -> None:
    for name in ("sparsity", "percentile"):
        assert_refused(
            net(),
            WavpruneError,
            "match",
            f"{name}=0.5",
            run=run,
            match=report,
            method="min_weight",
            **{name: 0.5},
        )


@each_entry
def test_match_goes_with_the_other_methods_only(
    run: Callable[..., PruneReport], report: PruneReport
) -> None:
    said = "match", "'min_weight' or 'random'", "'dwt'"
    assert_refused(net(), WavpruneError, *said, run=run, match=report)
    globally: Settings = {"method": "random", "scope": "global", "match": report}
    assert_refused(net(), WavpruneError, "match", "scope='global'", run=run, **globally)


@pytest.mark.parametrize("method", ["min_weight", "random"])
def test_match_is_a_report(method: str) -> None:
    for given in (0.5, {"sparsity": 0.5}):
        kind = type(given).__name__
        assert_refused(net(), TypeError, "match", kind, method=method, match=given)


def test_match_knows_every_layer(report: PruneReport) -> None:
    renamed = model_of(first=normal(4, 3, 3, 3), other=normal(4, 4, 3, 5))
    unknown = "match", "no layer 'other'", "first, second, last"
    assert_refused(renamed, WavpruneError, *unknown, method="random", match=report)
    reshaped = model_of(first=normal(4, 3, 3, 3), second=normal(4, 4, 5, 5))
    resized = "match", "'second'", "(4, 4, 5, 5)", "(4, 4, 3, 5)"
    assert_refused(reshaped, WavpruneError, *resized, method="random", match=report)
