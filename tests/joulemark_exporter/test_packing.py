"""Integers into files and back: the reader finds the integers that were put in."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from joulemark.errors import BadInput
from joulemark_exporter import packing
from joulemark_exporter.group_quantized import GroupQuantized
from joulemark_exporter.rounding import Rounding, round_to_grid


def matrix(
    seed: int, bits: int, size: int, symmetric: bool, rows: int = 32, columns: int = 96, order: bool = False
) -> GroupQuantized:
    random = np.random.default_rng(seed)
    groups = -(-columns // size)
    zeros = np.full((rows, groups), 1 << (bits - 1)) if symmetric else random.integers(0, 1 << bits, (rows, groups))
    column_groups = random.permutation(np.arange(columns) // size).astype(np.int32) if order else None
    return GroupQuantized(
        bits,
        size,
        symmetric,
        random.integers(0, 1 << bits, (rows, columns)).astype(np.uint8),
        random.uniform(1e-3, 0.1, (rows, groups)).astype(np.float16),
        zeros.astype(np.uint8),
        column_groups,
    )


def same(one: GroupQuantized, other: GroupQuantized) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("integers", "scales", "zeros", "column_groups")
    )


@given(
    st.integers(0, 2**32 - 1), st.sampled_from([(2, True), (3, True), (4, True), (8, True)]), st.sampled_from([32, 96])
)
@settings(max_examples=30, deadline=None)
def test_symmetric_integers_come_back_from_gguf_bit_for_bit(seed: int, kind: tuple[int, bool], size: int) -> None:
    given_matrix = matrix(seed, kind[0], size, True)
    name, data = packing.to_gguf(given_matrix)
    assert name == packing.gguf_type(kind[0], symmetric=True)
    assert np.array_equal(gguf.dequantize(data, gguf.GGMLQuantizationType[name]), given_matrix.dequantize())


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_asymmetric_integers_come_back_with_a_16_bit_offset(seed: int, bits: int) -> None:
    given_matrix = matrix(seed, bits, 32, False)
    name, data = packing.to_gguf(given_matrix)
    assert name == "Q4_1"
    blocks = data.reshape(32, 3, 20)
    assert np.array_equal(
        np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], 2).reshape(32, 96), given_matrix.integers
    )
    assert np.array_equal(blocks[:, :, :2].copy().view(np.float16)[:, :, 0], given_matrix.scales)
    offsets = given_matrix.scales.astype(np.float32) * given_matrix.zeros
    found = gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_1)
    assert np.abs(found - given_matrix.dequantize()).max() <= offsets.max() * 2**-11 * 1.01


@pytest.mark.parametrize(
    ("given_matrix", "words"),
    [
        (matrix(0, 4, 16, True), "groups have 16"),
        (matrix(0, 4, 48, True), "groups have 48"),
        (matrix(0, 4, 32, True, columns=80), "rows have 80"),
        (matrix(0, 4, 32, True, order=True), "not contiguous"),
        (matrix(0, 8, 32, False), "asymmetric 8-bit"),
    ],
)
def test_what_blocks_cannot_hold_is_refused(given_matrix: GroupQuantized, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        packing.to_gguf(given_matrix)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([32, 96]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["gptq", "gptq_v2"]),
)
@settings(max_examples=80, deadline=None)
def test_gptq_tensors_come_back(seed: int, bits: int, size: int, symmetric: bool, order: bool, version: str) -> None:
    given_matrix = matrix(seed, bits, size, symmetric, order=order and size < 96)
    tensors = packing.to_gptq(given_matrix, version)
    assert tensors["qweight"].shape == (96 * bits // 32, 32)
    assert tensors["qzeros"].shape == (96 // size, 32 * bits // 32)
    found = packing.from_gptq(tensors, bits=bits, group_size=size, symmetric=symmetric, checkpoint_format=version)
    assert same(found, given_matrix)


def test_the_layout_is_the_published_one() -> None:
    """By hand: 4 bits, eight to a word along the inputs, the first in the lowest bits; symmetric zero points are stored as 7s."""
    integers = np.tile(np.arange(8, dtype=np.uint8), (32, 4))
    given_matrix = GroupQuantized(4, 32, True, integers, np.ones((32, 1), np.float16), np.full((32, 1), 8, np.uint8))
    tensors = packing.to_gptq(given_matrix)
    assert (tensors["qweight"] == 0x76543210).all()
    assert (tensors["qzeros"] == 0x77777777).all()
    assert tensors["g_idx"].tolist() == [0] * 32


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qweight", lambda value: value[:-1]),
        ("qzeros", lambda value: value[:, :-1]),
        ("scales", lambda value: value.T),
        ("scales", lambda value: value * np.float16(np.nan)),
        ("g_idx", lambda value: value - 1),
        ("g_idx", lambda value: value + 3),
        ("g_idx", lambda value: value[:-1]),
        ("qweight", lambda value: value.astype(np.int64)),
        ("qzeros", lambda value: value ^ 1),
    ],
)
def test_damaged_tensors_are_refused(name: str, change: Any) -> None:
    tensors = packing.to_gptq(matrix(1, 4, 32, True))
    tensors[name] = change(tensors[name])
    with pytest.raises(BadInput):
        packing.from_gptq(tensors, bits=4, group_size=32, symmetric=True, checkpoint_format="gptq")


def test_re_quantizing_would_throw_the_work_away() -> None:
    """Why repacking exists: rounding the de-quantized matrix again moves most of its numbers."""
    weights = np.random.default_rng(2).standard_normal((64, 960)).astype(np.float32)
    wanted = round_to_grid(weights, Rounding(4, 96)).dequantize()
    again = gguf.dequantize(gguf.quantize(wanted, gguf.GGMLQuantizationType.Q4_0), gguf.GGMLQuantizationType.Q4_0)
    assert (again != wanted).mean() > 0.5
