"""Operators in C++, against float64: the product of a few rows with a matrix, and attention of new tokens."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest
import torch

from sky_core import native
from sky_core.native.build import library


@pytest.fixture(autouse=True, scope="module")
def operators() -> None:
    assert native.load(), "the operators do not compile on this machine"


def few_rows(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.sky.few_rows(x, [w], [] if scales is None else [scales])
    return y


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", range(1, native.MOST_ROWS + 1))
def test_the_product_is_that_of_float64(rows: int, weight: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(rows)
    for k in (1, 31, 32, 64, 130, 512):  # shorter than a vector, whole steps, and a rest
        x = torch.randn(rows, k, generator=generator)
        w = (torch.randn(77, k, generator=generator) * 30).to(weight)
        scales = torch.rand(77, generator=generator) if weight == torch.int8 else None
        exact = x.double() @ w.double().T * (1 if scales is None else scales.double())
        # Sums of k products in fp32: an error of k^(1/2) roundings of the largest is far above what any order gives.
        size = (x.double().abs() @ w.double().abs().T).max()
        torch.testing.assert_close(few_rows(x, w, scales).double(), exact, rtol=0, atol=1e-6 * float(size))


def test_rows_of_bf16_are_summed_in_fp32_and_rounded_once() -> None:
    x, w = torch.randn(3, 700).bfloat16(), torch.randn(9, 700).bfloat16()
    exact = (x.double() @ w.double().T).bfloat16()
    torch.testing.assert_close(few_rows(x, w), exact, rtol=2**-7, atol=1e-3)
    assert few_rows(x, w).dtype == torch.bfloat16


def test_a_matrix_wide_enough_for_every_thread_is_whole() -> None:
    x, w = torch.randn(2, 64), torch.randn(20_000, 64)
    torch.testing.assert_close(few_rows(x, w), x @ w.T, rtol=1e-5, atol=1e-4)


def test_rows_need_not_be_contiguous() -> None:
    x, w = torch.randn(40, 3).T, torch.randn(5, 40)
    torch.testing.assert_close(few_rows(x, w), x @ w.T, rtol=1e-5, atol=1e-5)


def test_the_compiler_knows_the_operator() -> None:
    x, w = torch.randn(2, 16), torch.randint(-127, 128, (4, 16), dtype=torch.int8)
    torch.library.opcheck(torch.ops.sky.few_rows.default, (x, w, torch.rand(4)))


@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        (torch.ones(9, 4), torch.ones(2, 4), "x has 9 rows, not 1 to 8"),
        (torch.ones(0, 4), torch.ones(2, 4), "x has 0 rows"),
        (torch.ones(1, 4), torch.ones(2, 5), "not of 4 input features"),
        (torch.ones(1, 4), torch.ones(4, 2).T, "not contiguous"),
        (torch.ones(1, 4), torch.ones(2, 4).half(), "w is Half"),
        (torch.ones(1, 4).double(), torch.ones(2, 4), "x is Double"),
    ],
)
def test_what_it_cannot_multiply_is_refused(x: torch.Tensor, w: torch.Tensor, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        few_rows(x, w)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, scale: float) -> torch.Tensor:
    """The equation in float64."""
    scores = scale * q.double() @ k.double().transpose(-1, -2) + bias.double()
    return scores.softmax(-1).nan_to_num() @ v.double()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_attention_of_new_tokens_is_the_equation(queries: int, dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(queries)
    for keys in (1, 7, 50, 300):
        q = torch.randn(2, 3, queries, 64).mul(2).to(dtype)
        k, v = torch.randn(2, 3, 400, 64).to(dtype)[:, :, :keys], torch.randn(2, 3, 400, 32).to(dtype)[:, :, :keys]
        bias = torch.randn(2, 1, 1, keys).masked_fill(torch.rand(2, 1, 1, keys) < 0.3, -torch.inf)
        y = torch.ops.sky.few_queries(q, k, v, bias, 0.3)
        assert y.dtype == dtype
        # Values are around 1; fp32 sums a few hundred of them, bf16 rounds the result.
        torch.testing.assert_close(y.double(), attended(q, k, v, bias, 0.3), rtol=error, atol=error)


def test_attention_takes_a_bias_of_each_head_in_bf16() -> None:
    q, k, v = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 32)
    bias = torch.randn(1, 2, 4, 9).bfloat16()
    y = torch.ops.sky.few_queries(q, k, v, bias, 1.0)
    torch.testing.assert_close(y.double(), attended(q, k, v, bias, 1.0), rtol=0, atol=1e-5)


def test_slots_behind_the_end_of_a_row_are_never_read() -> None:
    q, k, v = torch.randn(1, 1, 2, 32), torch.randn(1, 1, 9, 32), torch.randn(1, 1, 9, 32)
    k[:, :, 5:] = torch.nan
    v[:, :, 5:] = torch.nan
    bias = torch.zeros(1, 1, 1, 9).masked_fill(torch.arange(9) >= 5, -torch.inf)
    assert torch.ops.sky.few_queries(q, k, v, bias, 1.0).isfinite().all()


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    q, k, v = torch.randn(1, 1, 2, 32), torch.randn(1, 1, 9, 32), torch.randn(1, 1, 9, 32)
    assert not torch.ops.sky.few_queries(q, k, v, torch.full((1, 1, 1, 9), -torch.inf), 1.0).any()


def test_the_compiler_knows_attention() -> None:
    q, k, v = torch.randn(1, 2, 4, 32), torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 64)
    torch.library.opcheck(torch.ops.sky.few_queries.default, (q, k, v, torch.zeros(1, 1, 1, 9), 1.0))


@pytest.mark.parametrize(
    ("q", "k", "v", "reason"),
    [
        (torch.ones(1, 2, 4, 32), torch.ones(1, 1, 9, 32), torch.ones(1, 2, 9, 32), "do not fit"),
        (torch.ones(1, 2, 4, 40), torch.ones(1, 2, 9, 40), torch.ones(1, 2, 9, 40), "widths of 40 and 40"),
        (torch.ones(1, 2, 4, 32), torch.ones(1, 2, 9, 32).bfloat16(), torch.ones(1, 2, 9, 32), "differ in dtype"),
    ],
)
def test_what_it_cannot_attend_to_is_refused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.sky.few_queries(q, k, v, torch.zeros(1, 1, 1, 9), 1.0)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "a-compiler")
    calls: list[list[str]] = []

    def pretend(command: list[str], **_: object) -> None:
        calls.append(command)
        Path(command[-1]).write_bytes(b"code")

    monkeypatch.setattr(subprocess, "run", pretend)
    with caplog.at_level(logging.INFO, logger="sky_core.native"):
        assert library() == library()
    assert [command[0] for command in calls] == ["a-compiler"]
    assert [record.message for record in caplog.records if "kept in" in record.message]


def test_without_a_compiler_torch_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not native.load.__wrapped__()
    assert [record.message for record in caplog.records] == [
        "native operators: none, torch's take their place: no C++ compiler (c++, g++ or clang++) is on the PATH"
    ]
