"""A small Llama whose sizes are the same in all layers, so that every network is a plain model of transformers."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.space import Depth, Heads, Width

SIZE = 32  # channels of a head


def network(vocabulary: int = 4096, length: int = 128) -> LlamaForCausalLM:
    """The space's network."""
    heads = Heads(2, 4)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            max_position_embeddings=length,
            hidden_size=Width(64, 96, 128, name="width"),
            intermediate_size=Width(128, 256, 384, name="hidden"),
            num_hidden_layers=sum(1 for _ in Depth(2, 3, 4, name="layers")),
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=SIZE,
            tie_word_embeddings=True,
        )
    )
