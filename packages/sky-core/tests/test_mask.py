"""The declarative mask: its dense form is the definition, so it is held to the words of its docstring."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sky_core.model.mask import Mask


@st.composite
def masks(draw: st.DrawFn, batch: int = 2) -> tuple[Mask, int, int]:
    """(mask, queries, keys) in every combination that a forward pass can make."""
    queries, front = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    ragged = draw(st.booleans())
    documents = not ragged and draw(st.booleans())
    earlier = 0 if documents else draw(st.integers(0, 5))
    total = queries + earlier
    slots = documents_BS = None
    if ragged:
        starts = torch.tensor(draw(st.lists(st.integers(0, earlier), min_size=batch, max_size=batch)))
        slots = starts[:, None] + torch.arange(queries)
    if documents:
        steps = draw(
            st.lists(st.lists(st.integers(0, 1), min_size=total, max_size=total), min_size=batch, max_size=batch)
        )
        documents_BS = torch.tensor(steps).cumsum(1)
    keys_BS = None
    if not ragged and not documents and draw(st.booleans()):
        held = torch.tensor(draw(st.lists(st.integers(0, earlier), min_size=batch, max_size=batch)))
        keys_BS = torch.arange(total) - earlier + held[:, None]
    prefix = draw(st.none() | st.lists(st.integers(0, total), min_size=batch, max_size=batch))
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 8)),
        prefix_B=None if prefix is None else torch.tensor(prefix),
        documents_BS=documents_BS,
        slots_BT=slots,
        keys_BS=keys_BS,
        front=front,
        slopes_H=draw(st.none() | st.just(torch.tensor([0.5, 0.0, 0.1]))),
    )
    return mask, queries, total + front


def places_by_the_words(mask: Mask, b: int, t: int, s: int, queries: int, keys: int) -> tuple[int, int]:
    """Index in the row of query t and of key s, which is not in front."""
    s, total = s - mask.front, keys - mask.front
    place = total - queries + t
    slot = place if mask.slots_BT is None else int(mask.slots_BT[b, t])
    if mask.keys_BS is not None:
        s, slot = int(mask.keys_BS[b, s]), int(mask.keys_BS[b, place])
    return slot, s


def allowed_by_the_words(mask: Mask, b: int, t: int, s: int, queries: int, keys: int) -> bool:
    if s < mask.front:
        return True
    place, column = keys - mask.front - queries + t, s - mask.front
    slot, s = places_by_the_words(mask, b, t, s, queries, keys)
    if mask.keys_BS is not None and s < 0:
        return False
    sees = s <= slot or not mask.causal
    if mask.prefix_B is not None and s < int(mask.prefix_B[b]):
        sees = True
    if mask.window is not None and abs(slot - s) >= mask.window:
        sees = False
    if mask.documents_BS is not None:
        mine = int(mask.documents_BS[b, place])
        sees = sees and mine == int(mask.documents_BS[b, column])
    return sees


@settings(deadline=None)  # the first call pays for torch
@given(masks())
def test_dense_says_what_the_docstring_says(case: tuple[Mask, int, int]) -> None:
    mask, queries, keys = case
    dense = mask.dense(queries, keys).expand(2, 1, queries, keys)
    for b in range(2):
        for t in range(queries):
            for s in range(keys):
                assert bool(dense[b, 0, t, s]) == allowed_by_the_words(mask, b, t, s, queries, keys)


@settings(deadline=None)
@given(masks())
def test_the_bias_says_what_the_docstring_says(case: tuple[Mask, int, int]) -> None:
    mask, queries, keys = case
    bias = mask.bias(queries, keys)
    if mask.slopes_H is None:
        assert bias is None
        return
    assert bias.dtype == torch.float32
    bias = bias.expand(2, 3, queries, keys)
    for b in range(2):
        for t in range(queries):
            for s in range(keys):
                slot, key = places_by_the_words(mask, b, t, s, queries, keys) if s >= mask.front else (0, 0)
                assert_close(bias[b, :, t, s], -mask.slopes_H * abs(slot - key))


def test_layers_that_derive_the_same_mask_share_one() -> None:
    mask = Mask()
    assert mask.with_window(4) is mask.with_window(4)
    assert mask.with_front(2) is mask.with_front(2)
    slopes_H = torch.tensor([0.5])
    assert mask.with_slopes(slopes_H) is mask.with_slopes(slopes_H)
    assert mask.with_slopes(slopes_H).slopes_H is slopes_H
    assert mask.with_slopes(torch.tensor([0.1])) is not mask.with_slopes(slopes_H)
    assert mask.with_window(4).with_slopes(slopes_H).with_front(2).slopes_H is slopes_H
    assert mask.with_window(4).window == 4
    assert mask.with_front(2).with_front(1).front == 3
    assert mask.window is None
    assert mask.front == 0


def test_a_window_can_only_narrow() -> None:
    assert Mask(window=3).with_window(8).window == 3
    assert Mask(window=8).with_window(3).window == 3


def test_plain_causal_is_causal_and_nothing_else() -> None:
    assert Mask().is_plain_causal
    assert not Mask(causal=False).is_plain_causal
    assert not Mask().with_window(4).is_plain_causal
    assert not Mask().with_front(1).is_plain_causal
    assert not Mask().with_slopes(torch.tensor([0.5])).is_plain_causal
