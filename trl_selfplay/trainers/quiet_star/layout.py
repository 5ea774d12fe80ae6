"""Where the tokens of one forward stand: the text first, then its thoughts, block after block.

In: padding, the text columns that think, and how far the blocks have come. Out: position ids, and
masks that tell a thought's own tokens from the text before it. What attention does with them is in
attention.py.
"""

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class ThoughtMemory:
    """Keys and values that later forwards of one text attend to, layer by layer.

    Text is kept as it comes; a thought's tokens are written into buffers of `capacity` tokens, so
    that no step copies what earlier steps wrote. Only for forwards without gradients.

    Attributes:
        capacity: Most tokens that one thought adds.
        text: Layer index to keys and values (B, Hkv, S, d).
        own: Layer index to keys and values (B, Hkv, G, capacity, d).
    """

    capacity: int = 0
    text: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    own: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add_text(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the text's new keys and values, and return all of them, (B, Hkv, S, d)."""
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
        """Write new tokens (B, Hkv, G, L, d) at `start`, and return all of the thoughts' so far."""
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
        """Drop all thoughts, keep the text, and make room for thoughts of `capacity` tokens."""
        self.own.clear()
        self.capacity = capacity

    @property
    def num_text_tokens(self) -> int:
        """Text columns held, padding included."""
        return next(iter(self.text.values()))[0].shape[2] if self.text else 0


@dataclass(slots=True)
class ThoughtLayout:
    """The tokens of one forward: T of text, then G blocks of L tokens each, block-major.

    A block's tokens see the text up to their anchor and their own block, causally; text sees text.
    No token of a text or of another block sees a block.

    Attributes:
        text_mask: Which text columns are no padding, bool (B, S), those in `memory` included.
        anchors: The last text column that each block sees, int64 (B, G), not decreasing in G.
        num_new_text: T, the last columns of the text that this forward computes.
        block_length: L.
        block_start: Tokens of each block that `memory` holds already.
        memory: Keys and values of earlier forwards, or None.
        windows: The sliding window, or None, of each layer that has used this layout, added by
            attention.
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
        """G."""
        return self.anchors.shape[1]

    @property
    def reach(self) -> list[int]:
        """For each block the number of text columns that it or an earlier one sees in any row."""
        if self._reach is None:
            furthest = self.anchors.amax(0).cummax(0).values if self.num_blocks else self.anchors
            self._reach = (furthest.flatten() + 1).tolist()
        return self._reach

    def text_positions(self) -> torch.Tensor:
        """Return each text column's position, counted without padding, int64 (B, S)."""
        return (self.text_mask.long().cumsum(1) - 1).clamp(min=0)

    def position_ids(self) -> torch.Tensor:
        """Return int64 (B, T + G·L): a thought's tokens go on from their anchor's position.

        The token i of a block (counted from 0) after column j stands at j + 1 + i, as if the
        thought were written into the text there.
        """
        text = self.text_positions()
        first = text.gather(1, self.anchors) + 1 + self.block_start  # (B, G)
        steps = torch.arange(self.block_length, device=first.device)
        blocks = (first[:, :, None] + steps).flatten(1)  # (B, G·L)
        return torch.cat([text[:, text.shape[1] - self.num_new_text :], blocks], dim=1)

    def text_visible(self, window: int | None) -> torch.Tensor | None:
        """Return which text columns each new text column sees, bool (B, 1, T, S).

        None means plain causal attention: nothing is in memory, and neither padding on the left
        nor a window hides anything. Each column sees itself, padding too, so no row is empty.
        """
        if ("text", window) not in self._masks:
            self._masks["text", window] = self._build_text_mask(window)
        return self._masks["text", window]

    def _build_text_mask(self, window: int | None) -> torch.Tensor | None:
        num_columns = self.text_mask.shape[1]
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
            visible &= columns > queries[:, None] - window
        return (visible | (columns == queries[:, None]))[:, None]

    def thought_visible(self, window: int | None) -> torch.Tensor:
        """Return which text columns each block sees, bool (B, G, L or 1, S)."""
        if ("thought", window) not in self._masks:
            columns = torch.arange(self.text_mask.shape[1], device=self.text_mask.device)
            visible = (columns <= self.anchors[:, :, None]) & self.text_mask[:, None, :]
            visible = visible[:, :, None]  # (B, G, 1, S)
            if window is not None:
                positions = self.text_positions()[:, None, None]
                queries = self.position_ids()[:, self.num_new_text :]
                queries = queries.unflatten(1, (self.num_blocks, self.block_length))
                visible = visible & (positions > queries[..., None] - window)
            self._masks["thought", window] = visible
        mask = self._masks["thought", window]
        assert mask is not None
        return mask

    def own_visible(self, window: int | None) -> torch.Tensor:
        """Return which of its block's tokens each new one sees, bool (L, block_start + L)."""
        keys = torch.arange(self.block_start + self.block_length, device=self.anchors.device)
        queries = keys[self.block_start :, None]
        visible = keys <= queries
        return visible if window is None else visible & (keys > queries - window)


def new_text_layout(
    text_mask: torch.Tensor, num_new_text: int, memory: ThoughtMemory | None = None
) -> ThoughtLayout:
    """Return the layout of text alone."""
    anchors = torch.zeros((len(text_mask), 0), dtype=torch.long, device=text_mask.device)
    return ThoughtLayout(text_mask, anchors, num_new_text, memory=memory)
