"""A decoder layer, and what stands before the first and behind the last one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv2quant.model.attention import Attention, Cache
from dsv2quant.model.layers import FFN, MoE, RMSNorm, Stages, finish

Hidden = tuple[torch.Tensor, torch.Tensor | None]  # states behind a layer, and the experts it chose, if it has any


@dataclass
class DecoderLayer:
    """Pre-norm attention and FFN, each added to the residual stream."""

    input_layernorm: RMSNorm
    attention: Attention
    post_attention_layernorm: RMSNorm
    ffn: FFN | MoE

    def __call__(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Hidden:
        """x [batch, new, hidden] → (the same shape, chosen experts [tokens, k] or None in a dense layer)."""
        return finish(self.stages(x, rope, cache, absorbed))

    def stages(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[Hidden]:
        """The stages of `__call__`."""
        attended = yield from self.attention.stages(self.input_layernorm(x), rope, cache, absorbed)
        return (yield from self.feed_forward(x + attended))

    def feed_forward(self, x: torch.Tensor) -> Stages[Hidden]:
        """The stages behind attention, for hidden states x [..., hidden]."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.ffn, FFN):
            return x + (yield from self.ffn.stages(normed)), None
        out, chosen = yield from self.ffn.stages(normed)
        return x + out, chosen

    def decoded(self, x: torch.Tensor, rope: torch.Tensor, cache: Cache) -> Hidden:
        """One token after the other into the empty `cache`, as decoding does: x [batch, new, hidden] → (the same shape,
        chosen experts [batch, new, k] or None)."""
        steps = [self(x[:, t : t + 1], rope[t : t + 1], cache, absorbed=True) for t in range(x.shape[1])]
        chosen = [experts for _, experts in steps if experts is not None]  # [batch, k] of each token
        return torch.cat([out for out, _ in steps], 1), torch.stack(chosen, 1) if chosen else None


@dataclass
class Ends:
    """Embedding [vocab, hidden], final norm, and head: a linear layer with a row for each token, or each label of a
    classifier."""

    embedding: torch.Tensor
    norm: RMSNorm
    head: Callable[[torch.Tensor], torch.Tensor]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.embedding)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the last layer, [..., hidden] → [..., vocab], in x's dtype."""
        return self.head(self.norm(x))
