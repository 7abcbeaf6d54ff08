"""Operators in C++, against float64: products of a few rows with matrices, and attention of new tokens."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from sky_core import native
from sky_core.native.build import library
from sky_core.quantization.int4 import Int4Linear


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
        w_double = w.double() * (1 if scales is None else scales.double()[:, None])
        exact = x.double() @ w_double.T
        # Sums of k products in fp32: an error of k^(1/2) roundings of the largest is far above what any order gives.
        error = 1e-6 * (x.double().abs() @ w_double.abs().T).max()
        if weight == torch.int8 and native.has("avx512_vnni"):
            error += rounding(x, w_double)
        torch.testing.assert_close(few_rows(x, w, scales).double(), exact, rtol=0, atol=float(error))


def rounding(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What x w^T can be off by when rows of x are rounded to whole 32767ths of their largest number."""
    return x.double().abs().amax() / 32767 / 2 * w.double().abs().sum(1).max()


def test_a_long_row_of_the_largest_codes_does_not_overflow() -> None:
    x, w = torch.ones(3, 40_000), torch.full((2, 40_000), -128, dtype=torch.int8)
    torch.testing.assert_close(few_rows(x, w), torch.full((3, 2), -128.0 * 40_000), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_results_of_several_matrices_lie_side_by_side(rows: int, weight: torch.dtype) -> None:
    x = torch.randn(1, rows, 192)
    w = [(torch.randn(n, 192) * 30).to(weight) for n in (40, 1, 700, 33)]
    scales = [torch.rand(len(one)).bfloat16() for one in w] if weight == torch.int8 else []
    apart = [few_rows(x, one, scales[i] if scales else None) for i, one in enumerate(w)]
    assert torch.equal(torch.ops.sky.few_rows(x, w, scales), torch.cat(apart, dim=-1))
    assert apart[0].shape == (1, rows, 40)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["fp32", "int8", "int4"])
def test_damage_stays_in_its_row_and_shows(form: str, bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = bad
    if form == "int4":
        y = few_rows_int4(x, [Int4Linear(nn.Linear(64, 64))])
    else:
        w = torch.randint(-127, 127, (64, 64), dtype=torch.int8)
        y = few_rows(x, w if form == "int8" else w.float(), torch.ones(64) if form == "int8" else None)
    assert y.isfinite().all(1).tolist() == [True, False, True]
    assert not y[1].isfinite().any()


def test_rows_of_nothing_give_nothing() -> None:
    x = torch.zeros(2, 64)
    w = torch.ones(3, 64, dtype=torch.int8)
    assert not few_rows(x, w, torch.ones(3)).any()
    assert few_rows(x + 1e-38, w, torch.ones(3)).abs().max() < 1e-36  # 64 of them; their reciprocal is no number


def few_rows_int4(x: torch.Tensor, layers: list[Int4Linear]) -> torch.Tensor:
    if not native.has_int4:
        pytest.skip("4 bits need AVX512_VNNI and AVX512_VBMI")
    codes, scales = [layer.codes for layer in layers], [layer.scales for layer in layers]
    y: torch.Tensor = torch.ops.sky.few_rows_int4(x, codes, scales, layers[0].group)
    return y


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", range(1, native.MOST_ROWS + 1))
def test_the_product_with_4_bits_is_that_of_float64(rows: int, group: int) -> None:
    torch.manual_seed(rows)
    for k in (128, 512, 1408):
        layers = [Int4Linear(nn.Linear(k, n, bias=False), group) for n in (64, 200, 1)]  # whole panels, and parts
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(rows, k) + 0.5).to(dtype)
            y = few_rows_int4(x, layers)
            assert y.dtype == dtype
            for layer, part in zip(layers, y.split([len(layer.codes) for layer in layers], dim=-1), strict=True):
                exact = x.double() @ layer.weight.double().T
                error = float(rounding(x, layer.weight)) + 1e-6 * float(
                    (x.double().abs() @ layer.weight.double().abs().T).max()
                )
                found = part[:, : layer.out_features].double()
                torch.testing.assert_close(found, exact, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=error)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.ones(9, 64)}, "x has 9 rows, not 1 to 8"),
        ({"x": torch.ones(1, 32)}, "codes are not bytes of whole panels of 64 with 32 features"),
        ({"codes": [torch.zeros(40, 32, dtype=torch.uint8)]}, "codes are not bytes of whole panels of 64"),
        ({"scales": []}, "0 scales for 1 matrices"),
        ({"scales": [torch.ones(2, 64, 2)]}, "scales are not bf16 of 2 groups of 64 features"),
        ({"group": 24}, "groups of 24 in 64 features"),
        ({"x": torch.ones(1, 64).double()}, "numbers of Double"),
    ],
)
def test_what_it_cannot_multiply_by_4_bits_is_refused(change: dict[str, object], reason: str) -> None:
    layer = Int4Linear(nn.Linear(64, 64))
    few_rows_int4(torch.ones(1, 64), [layer])
    given = {"x": torch.ones(1, 64), "codes": [layer.codes], "scales": [layer.scales], "group": 32} | change
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.sky.few_rows_int4(*given.values())


@pytest.mark.parametrize("rows", range(1, native.MOST_ROWS + 1))
def test_rows_of_bf16_are_summed_in_fp32_and_rounded_once(rows: int) -> None:
    x, w = torch.randn(rows, 700).bfloat16(), torch.randn(9, 700).bfloat16()
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
    torch.library.opcheck(torch.ops.sky.few_rows.default, (x, [w, w], [torch.rand(4), torch.rand(4)]))


@pytest.mark.parametrize(
    ("x", "w", "reason"),
    [
        (torch.ones(9, 4), torch.ones(2, 4), "x has 9 rows, not 1 to 8"),
        (torch.ones(0, 4), torch.ones(2, 4), "x has 0 rows"),
        (torch.ones(1, 4), torch.ones(2, 5), "not of 4 input features"),
        (torch.ones(1, 4), torch.ones(4, 2).T, "not contiguous"),
        (torch.ones(1, 4), torch.ones(2, 4).half(), "w is Half"),
        (torch.ones(1, 4).double(), torch.ones(2, 4), "numbers of Double"),
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
    assert {command[0] for command in calls} == {"a-compiler"}
    assert sum("-shared" in command for command in calls) == 1
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
