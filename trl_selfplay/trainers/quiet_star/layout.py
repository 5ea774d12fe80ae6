"""The order of the tokens in one forward: the text, then its thoughts, block after block.

In: the padding, the text columns that think, and the number of tokens that each block already has.
Out: position ids and visibility masks, which attention.py uses.
"""

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class ThoughtMemory:
    """Keys and values that later forwards over the same text attend to.

    The text's are concatenated. Those of thoughts are written into buffers of `capacity` tokens, so
    that no step copies earlier ones. Only for forwards without gradients.

    Attributes:
        capacity: Maximum number of tokens per thought.
        text: Maps an attention call's number in the forward to keys and values of the text, (B, Hkv, S, d).
        own: Maps the same to keys and values of the thoughts, (B, Hkv, G, capacity, d).
    """

    capacity: int = 0
    text: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add_text(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the text's new keys and values, and return all of the text's, (B, Hkv, S, d)."""
        if layer in self.text and keys.shape[2]:
            held_keys, held_values = self.text[layer]
            keys, values = torch.cat([held_keys, keys], 2), torch.cat([held_values, values], 2)
        elif layer in self.text:
            return self.text[layer]
        self.text[layer] = (keys, values)
        return keys, values

    def add_own(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of new tokens (B, Hkv, G, L, d) at `start`; return those of all tokens."""
        stop = start + keys.shape[3]
        if layer not in self.own:
            shape = (*keys.shape[:3], self.capacity)
            self.own[layer] = (
                keys.new_empty((*shape, keys.shape[4])),
                values.new_empty((*shape, values.shape[4])),  # may be narrower than keys
            )
        own_keys, own_values = self.own[layer]
        own_keys[:, :, :, start:stop] = keys
        own_values[:, :, :, start:stop] = values
        return own_keys[:, :, :, :stop], own_values[:, :, :, :stop]

    def forget_thoughts(self, capacity: int) -> None:
        """Drop all thoughts but keep the text; new thoughts have at most `capacity` tokens."""
        self.own.clear()
        self.capacity = capacity

    @property
    def num_text_tokens(self) -> int:
        """Number of text columns held, including padding."""
        return next(iter(self.text.values()))[0].shape[2] if self.text else 0


@dataclass(slots=True)
class ThoughtLayout:
    """The tokens of one forward: T text columns, then G blocks of L tokens each, block by block.

    A token of a block sees the text up to the block's anchor, and its own block causally. Text sees
    only text, and blocks don't see each other.

    Attributes:
        text_mask: True for text and False for padding, bool (B, S), including columns in `memory`.
        anchors: The last text column that each block sees, int64 (B, G), non-decreasing in G.
        num_new_text: T. This forward computes the last T columns of the text.
        block_length: L, the tokens of each block that this forward computes.
        block_start: Number of tokens of each block that are already in `memory`.
        memory: Keys and values of earlier forwards, or None.
        windows: Filled by attention with the sliding window (or None) of each layer.
    """

    text_mask: torch.Tensor
    anchors: torch.Tensor
    num_new_text: int
    block_length: int = 0
    block_start: int = 0
    memory: ThoughtMemory | None = None
    windows: list[int | None] = field(default_factory=list)
    _masks: dict[tuple[str, int | None], torch.Tensor | None] = field(default_factory=dict)
    _reach: list[int] | None = None

    @property
    def num_blocks(self) -> int:
        """G, the number of blocks."""
        return self.anchors.shape[1]

    @property
    def reach(self) -> list[int]:
        """For each block, how many text columns it or an earlier block sees in any row."""
        if self._reach is None:
            # Rows differ in their anchors, so the maximum over rows (G,) may decrease; attention
            # cuts the text after a chunk's last block and needs it not to.
            furthest = self.anchors.amax(0).cummax(0).values if self.num_blocks else self.anchors
            self._reach = (furthest.flatten() + 1).tolist()
        return self._reach

    def text_positions(self) -> torch.Tensor:
        """Return the position of each text column, not counting padding, int64 (B, S)."""
        return (self.text_mask.long().cumsum(1) - 1).clamp(min=0)

    def position_ids(self) -> torch.Tensor:
        """Return the position ids, int64 (B, T + G·L).

        Token i of a block (counting from 0) whose anchor has position p is at p + 1 + i, as if the
        thought were written into the text there.
        """
        text = self.text_positions()
        blocks = self.own_positions()[:, :, self.block_start :].flatten(1)  # (B, G·L)
        return torch.cat([text[:, text.shape[1] - self.num_new_text :], blocks], dim=1)

    def own_positions(self) -> torch.Tensor:
        """Return the position of each block's tokens so far, int64 (B, G, block_start + L)."""
        steps = torch.arange(self.block_start + self.block_length, device=self.anchors.device)
        return self.text_positions().gather(1, self.anchors)[:, :, None] + 1 + steps

    def text_visible(self, window: int | None) -> torch.Tensor | None:
        """Return which text columns each new text column sees, bool (B, 1, T, S).

        None means plain causal attention, which is faster: nothing is in memory, and neither left
        padding nor a window hides a column. Every column sees itself, even if it is padding, so
        that no row of the softmax is empty.
        """
        if ("text", window) not in self._masks:
            self._masks["text", window] = self._build_text_mask(window)
        return self._masks["text", window]

    def _build_text_mask(self, window: int | None) -> torch.Tensor | None:
        num_columns = self.text_mask.shape[1]
        # Padding on the right is hidden by causality already.
        starts_padded = not bool(self.text_mask[:, 0].all())
        if (
            self.num_new_text == num_columns
            and not starts_padded
            and (window is None or window >= num_columns)
        ):
            return None
        columns = torch.arange(num_columns, device=self.text_mask.device)
        queries = columns[num_columns - self.num_new_text :]
        visible = (columns <= queries[:, None]) & self.text_mask[:, None, :]  # (B, T, S)
        if window is not None:
            # Within a row, distances of columns equal distances of positions.
            visible &= columns > queries[:, None] - window
        return (visible | (columns == queries[:, None]))[:, None]

    def thought_visible(self, window: int | None) -> torch.Tensor:
        """Return which text columns each block sees, bool (B, G, 1, S), or (B, G, L, S) with a window."""
        if ("thought", window) not in self._masks:
            columns = torch.arange(self.text_mask.shape[1], device=self.text_mask.device)
            visible = (columns <= self.anchors[:, :, None]) & self.text_mask[:, None, :]
            visible = visible[:, :, None]  # (B, G, 1, S)
            if window is not None:
                # With a window, later tokens of a block see less of the text. Positions count, not
                # columns: a block's tokens have none.
                positions = self.text_positions()[:, None, None]  # (B, 1, 1, S)
                queries = self.position_ids()[:, self.num_new_text :]
                queries = queries.unflatten(1, (self.num_blocks, self.block_length))  # (B, G, L)
                visible = visible & (positions > queries[..., None] - window)
            self._masks["thought", window] = visible
        mask = self._masks["thought", window]
        assert mask is not None
        return mask

    def own_visible(self, window: int | None) -> torch.Tensor:
        """Return which tokens of its block each new token sees, bool (L, block_start + L)."""
        keys = torch.arange(self.block_start + self.block_length, device=self.anchors.device)
        queries = keys[self.block_start :, None]
        visible = keys <= queries
        return visible if window is None else visible & (keys > queries - window)


def new_text_layout(
    text_mask: torch.Tensor, num_new_text: int, memory: ThoughtMemory | None = None
) -> ThoughtLayout:
    """Return the layout of a text without thoughts."""
    anchors = torch.zeros((len(text_mask), 0), dtype=torch.long, device=text_mask.device)
    return ThoughtLayout(text_mask, anchors, num_new_text, memory=memory)
