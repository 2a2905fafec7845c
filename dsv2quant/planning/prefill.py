# ruff: noqa: F841 (a name that nobody reads keeps its tensor in memory)
"""What a prefill keeps in memory, and for how long: the tensors of a forward pass, in the order in which they are made.

Here is what all models' passes are made of. A function stands for one of the code that it models: a tensor is in memory
until the name that holds it is bound anew or left. All is BF16 but what is said to be wide, float32. Tensors of a
number or two per token are left out, and so is what is of the order of a norm's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.planning.allocator import Memory, Tensor

CUBLAS_WORKSPACE = 8_519_680  # bytes: ":4096:2:16:8" (aten/src/ATen/cuda/CublasHandlePool.cpp)


@dataclass(frozen=True)
class Share:
    """What one GPU computes: some layers, maybe the embedding and the head, and of each matrix that tensor parallelism
    cuts one of `tp` parts. `weights` are bytes of its tensors."""

    config: ModelConfig
    layers: range
    has_embedding: bool
    has_head: bool
    tp: int
    weights: tuple[int, ...]

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads // self.tp

    @property
    def kv_heads(self) -> int:
        """Of plain attention; GPUs beyond their number have copies."""
        return max(1, self.config.num_key_value_heads // self.tp)

    @property
    def cached_widths(self) -> tuple[int, int]:
        """As the configuration's; every GPU has the whole latent."""
        c = self.config
        return c.cached_widths if c.is_mla else (self.kv_heads * c.qk_head_dim, self.kv_heads * c.v_head_dim)

    @property
    def outputs(self) -> int:
        """What the head gives for a token: logits of the vocabulary, or of a classifier's labels."""
        return self.config.num_labels if self.config.is_classifier else self.config.vocab_size

    def ffn(self, layer: int) -> int:
        """Width of the dense FFN, or of the shared experts' as one."""
        c = self.config
        width = c.n_shared_experts * c.moe_intermediate_size if c.is_moe(layer) else c.intermediate_size
        return width // self.tp


@dataclass
class Pass:
    """A forward pass of `batch` texts of `length` tokens on one GPU."""

    new: Memory
    share: Share
    batch: int
    length: int

    def __post_init__(self) -> None:
        self._workspace: Tensor | None = None

    @property
    def c(self) -> ModelConfig:
        return self.share.config

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def routed(self) -> int:
        """Tokens of a routed expert, where all have equally many."""
        return -(-self.tokens * self.c.num_experts_per_tok // self.c.n_routed_experts)

    def made(self, width: int, kind: str = "activations") -> Tensor:
        """A tensor of so many BF16 numbers per token."""
        return self.new(2 * self.tokens * width, kind)

    def wide(self, width: int) -> Tensor:
        """A tensor of so many float32 numbers per token."""
        return self.new(4 * self.tokens * width)

    def product(self, width: int, kind: str = "activations") -> Tensor:
        """What a linear layer gives. The first one also makes cuBLAS's workspace, which stays."""
        made = self.made(width, kind)
        if self._workspace is None:
            self._workspace = self.new(CUBLAS_WORKSPACE)
        return made

    def norm(self, width: int) -> Tensor:
        """RMSNorm (transformers `LlamaRMSNorm.forward`; model/layers.py): squares go before the product comes."""
        x = self.wide(width)
        square = self.wide(width)
        del square
        x = self.wide(width)
        rounded = self.made(width)
        return self.made(width)

    def ffn(self, width: int) -> Tensor:
        """down(silu(gate(x)) · up(x)) of all tokens (`LlamaMLP.forward`)."""
        return self.gated(self.tokens, width)

    def expert(self) -> Tensor:
        """The same of one routed expert's tokens."""
        return self.gated(self.routed, self.c.moe_intermediate_size // self.share.tp)

    def gated(self, tokens: int, width: int) -> Tensor:
        """What gate gives goes once its silu is there."""
        gate = self.new(2 * tokens * width)
        gate = self.new(2 * tokens * width)
        up = self.new(2 * tokens * width)
        product = self.new(2 * tokens * width)
        del gate, up
        return self.new(2 * tokens * self.c.hidden_size)
