import pytest
import torch
from naive_thoughts import dense_mask

from trl_selfplay.trainers.quiet_star import attention
from trl_selfplay.trainers.quiet_star.attention import attend
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout

NUM_TEXT, ANCHORS, BLOCK = 9, [0, 0, 3, 8], 3


def tensors(num_heads=4, num_kv_heads=4, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    length = NUM_TEXT + len(ANCHORS) * BLOCK
    return [
        torch.randn(batch, h, length, 8, generator=generator, requires_grad=True)
        for h in (num_heads, num_kv_heads, num_kv_heads)
    ]


def layout_of(text_mask=None, anchors=None):
    if text_mask is None:
        text_mask = torch.ones((2, NUM_TEXT), dtype=torch.bool)
    anchors = torch.tensor([ANCHORS, ANCHORS]) if anchors is None else anchors
    return ThoughtLayout(text_mask, anchors, NUM_TEXT, BLOCK)


def dense_attention(query, key, value, mask, scaling, softcap=None, bias=0.0, sinks=None):
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def compare(ours, theirs, inputs, where=None) -> None:
    """Outputs to 1e-5, gradients of a random projection to 1e-6 times their size."""
    where = torch.ones(ours.shape[:2], dtype=torch.bool) if where is None else where
    torch.testing.assert_close(ours[where], theirs[where], atol=1e-5, rtol=0)
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    probe = probe * where[:, :, None, None]
    mine = torch.autograd.grad((ours * probe).sum(), inputs)
    other = torch.autograd.grad((theirs * probe).sum(), inputs)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 4, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [None, 1])
def test_split_attention_equals_attention_under_the_dense_mask(
    monkeypatch, num_kv_heads, window, softcap, chunk
) -> None:
    """QS-4, with grouped queries, windows, soft caps and one block at a time (QS-19)."""
    if chunk is not None:
        monkeypatch.setattr(attention, "CPU_CHUNK_SCORES", chunk)
    inputs = tensors(num_kv_heads=num_kv_heads)
    ours = attend(*inputs, layout_of(), layer=0, scaling=0.3, window=window, softcap=softcap)
    mask, _ = dense_mask(NUM_TEXT, ANCHORS, BLOCK, window)
    compare(ours, dense_attention(*inputs, mask, 0.3, softcap), inputs)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", ["sinks", "capped sinks", "slopes", "both"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_sinks_and_slopes_are_those_of_dense_attention(
    monkeypatch, num_kv_heads, window, kind, chunk
) -> None:
    """QS-4: a sink takes part in each softmax once; ALiBi adds slope times position."""
    if chunk is not None:
        monkeypatch.setattr(attention, "CPU_CHUNK_SCORES", chunk)
    inputs, more, bias = tensors(num_kv_heads=num_kv_heads), {}, 0.0
    mask, positions = dense_mask(NUM_TEXT, ANCHORS, BLOCK, window)
    if kind != "slopes":
        more["sinks"] = torch.tensor([0.5, -1.0, 2.0, 4.0], requires_grad=True)
        inputs.append(more["sinks"])
    softcap = 1.5 if kind == "capped sinks" else None
    if kind in ("slopes", "both"):
        more["slopes"] = torch.tensor([0.5, 0.25, 0.125, -0.3])
        bias = more["slopes"][:, None, None] * positions
    ours = attend(
        *inputs[:3], layout_of(), layer=0, scaling=0.3, window=window, softcap=softcap, **more
    )
    sinks = more.get("sinks")
    compare(ours, dense_attention(*inputs[:3], mask, 0.3, softcap, bias, sinks), inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 4])
def test_padding_is_never_seen(side, window) -> None:
    """QS-4 and QS-16: the second row has 3 columns of padding."""
    text_mask = torch.ones((2, NUM_TEXT), dtype=torch.bool)
    columns = slice(0, 3) if side == "left" else slice(NUM_TEXT - 3, NUM_TEXT)
    text_mask[1, columns] = False
    shift = 3 if side == "left" else 0
    anchors = torch.tensor([ANCHORS, [a + shift for a in (0, 1, 3, 5)]])
    inputs = tensors()
    ours = attend(*inputs, layout_of(text_mask, anchors), layer=0, scaling=0.3, window=window)
    masks = [dense_mask(NUM_TEXT, row, BLOCK, None)[0] for row in anchors.tolist()]
    mask = torch.cat(masks)
    if window is not None:
        position = layout_of(text_mask, anchors).position_ids()
        mask &= position[:, None, None, :] > position[:, None, :, None] - window
    mask[1, :, :, :NUM_TEXT] &= text_mask[1]
    mask |= torch.eye(mask.shape[-1], dtype=torch.bool)
    real = torch.ones(mask.shape[0], mask.shape[-1], dtype=torch.bool)
    real[:, :NUM_TEXT] = text_mask
    compare(ours, dense_attention(*inputs, mask, 0.3), inputs, real)


def test_steps_through_memory_equal_one_forward() -> None:
    """QS-2: text at once, then the blocks' tokens one by one, from memory."""
    query, key, value = (x.detach() for x in tensors(num_kv_heads=2))
    whole = attend(query, key, value, layout_of(), layer=0, scaling=0.3)
    memory = ThoughtMemory(capacity=BLOCK)
    text_mask = torch.ones((2, NUM_TEXT), dtype=torch.bool)
    text = [x[:, :, :NUM_TEXT] for x in (query, key, value)]
    out = attend(*text, new_text_layout(text_mask, NUM_TEXT, memory), layer=0, scaling=0.3)
    torch.testing.assert_close(out, whole[:, :NUM_TEXT], atol=1e-6, rtol=0)
    blocks = [x[:, :, NUM_TEXT:].unflatten(2, (-1, BLOCK)) for x in (query, key, value)]
    expected = whole[:, NUM_TEXT:].unflatten(1, (-1, BLOCK))
    for step in range(BLOCK):
        layout = ThoughtLayout(text_mask, torch.tensor([ANCHORS] * 2), 0, 1, step, memory)
        out = attend(*(x[:, :, :, step] for x in blocks), layout, layer=0, scaling=0.3)
        torch.testing.assert_close(out, expected[:, :, step], atol=1e-6, rtol=0)


def test_a_text_can_be_computed_in_pieces() -> None:
    """QS-20: later columns attend to the memory of earlier ones."""
    query, key, value = (x.detach()[:, :, :NUM_TEXT] for x in tensors())
    text_mask = torch.ones((2, NUM_TEXT), dtype=torch.bool)
    text_mask[1, :2] = False
    whole = attend(query, key, value, new_text_layout(text_mask, NUM_TEXT), layer=0, scaling=0.3)
    memory, parts = ThoughtMemory(), []
    for first, last in ((0, 5), (5, 6), (6, 9)):
        piece = [x[:, :, first:last] for x in (query, key, value)]
        layout = new_text_layout(text_mask[:, :last], last - first, memory)
        parts.append(attend(*piece, layout, layer=0, scaling=0.3))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-6, rtol=0)
    assert memory.num_text_tokens == NUM_TEXT


def test_positions_go_on_from_the_anchor() -> None:
    """QS-6: start at j + 1, the i-th token after it at j + 1 + i; padding is not counted."""
    text_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    layout = ThoughtLayout(text_mask, torch.tensor([[0, 2], [1, 3]]), 4, 3)
    assert layout.position_ids().tolist() == [
        [0, 1, 2, 3, 1, 2, 3, 3, 4, 5],
        [0, 0, 1, 2, 1, 2, 3, 3, 4, 5],
    ]
    step = ThoughtLayout(text_mask, torch.tensor([[0, 2], [1, 3]]), 0, 1, block_start=2)
    assert step.position_ids().tolist() == [[3, 5], [3, 5]]


def test_text_alone_without_padding_needs_no_mask() -> None:
    layout = layout_of()
    assert layout.text_visible(None) is None
    assert layout.text_visible(NUM_TEXT) is None
    assert layout.text_visible(3) is not None
    assert layout.thought_visible(None).shape == (2, len(ANCHORS), 1, NUM_TEXT)


def test_the_columns_that_a_block_sees_are_the_furthest_of_all_rows() -> None:
    anchors = torch.tensor([[0, 1, 2, 3], [2, 2, 4, 8]])
    assert layout_of(anchors=anchors).reach == [3, 3, 5, 9]
