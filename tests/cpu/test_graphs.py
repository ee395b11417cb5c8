"""Which captured step does a decode, in which order steps are captured, and how their kernels are named."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable

import pytest

from sailfish.engine import graphs
from sailfish.engine.graphs import StepGraphs
from sailfish.kernels.cuda.graph import plain_name


class FakeGraph:
    """Remembers the calls that a real one would have captured."""

    calls: list[str] = []

    def __init__(self, function: Callable[[], None], *rest: object) -> None:
        assert rest == ("pool",) and not gc.isenabled()
        self._n_before = len(self.calls)
        function()
        self.captured = self.calls[self._n_before]

    def replay(self) -> None:
        self.calls.append(f"replay {self.captured}")

    def kernels(self) -> Counter[str]:
        n_runs = int(self.captured.removeprefix("decode "))
        return Counter({"norm": 2, "narrow" if n_runs <= 8 else "wide": 4})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(graphs, "Graph", FakeGraph)
    monkeypatch.setattr(graphs, "new_pool", lambda: "pool")
    monkeypatch.setattr(FakeGraph, "calls", [])
    return FakeGraph.calls


def test_the_largest_step_is_captured_first_each_after_one_run_as_it_is(calls: list[str]) -> None:
    steps = StepGraphs((1, 4, 9), (16, 32))
    assert [steps.fitting(n) for n in (1, 4, 9)] == [None, None, None], "nothing is captured yet"
    assert (steps.fitting_chunk(3), steps.most_tokens) == (None, 32)
    steps.capture(
        lambda n_runs: calls.append(f"decode {n_runs}"), lambda n_tokens: calls.append(f"forward {n_tokens}")
    )
    assert calls[:6] == [f"decode {n}" for n in (9, 9, 4, 4, 1, 1)]
    assert calls[6:] == [f"forward {n}" for n in (32, 32, 16, 16)]
    assert gc.isenabled()
    assert [steps.fitting(n) for n in (1, 2, 4, 5, 9, 10)] == [1, 4, 4, 9, 9, None]
    steps.replay(4)
    assert calls[-1] == "replay decode 4"
    assert [steps.fitting_chunk(n) for n in (1, 16, 17, 33)] == [16, 16, 32, None]
    steps.replay_chunk(16)
    assert calls[-1] == "replay forward 16"


def test_a_capture_that_fails_leaves_every_step_to_be_launched(calls: list[str]) -> None:
    def decode(n_runs: int) -> None:
        calls.append(f"decode {n_runs}")
        if n_runs == 1:
            raise RuntimeError("planted")

    steps = StepGraphs((1, 4))
    with pytest.raises(RuntimeError, match="planted"):
        steps.capture(decode, decode)
    assert gc.isenabled() and steps.fitting(4) is None


def test_sizes_that_launch_the_same_kernels_are_told_once(calls: list[str]) -> None:
    steps = StepGraphs((1, 8, 16, 24))
    steps.capture(lambda n_runs: calls.append(f"decode {n_runs}"), lambda n_tokens: None)
    assert steps.launches() == {8: {"norm": 2, "narrow": 4}, 24: {"norm": 2, "wide": 4}}


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("rope_write", "rope_write"),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT"),
        ("_ZN2at6native23triu_tril_cuda_templateEv", "triu_tril_cuda_template"),
        (
            "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EEEEviT0_T1_",
            "vectorized_elementwise_kernel",
        ),
        ("_ZN2at6native12_GLOBAL__N_16gatherIfEEvPT_", "gather"),
    ],
)
def test_a_kernels_name_is_told_without_types(symbol: str, name: str) -> None:
    assert plain_name(symbol) == name
