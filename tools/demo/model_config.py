"""The bundled base's shape: a Llama of 3.2 million parameters.

    embedding     4096 x 192, also the output head (tied)                            786,432
    a layer       q 192x192, k and v 192x96 (6 heads of 32 share 3 pairs), o 192x192
                  gate, up and down 192x512, two norms of 192                        405,888
    6 layers                                                                       2,435,328
    last norm                                                                            192
                                                                                   ---------
                                                                                   3,221,952

The folder written here has no weights; `graft train --method full --init random` starts from it.
"""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, LlamaConfig

from tools.demo.tokenizer import END_OF_TEXT, MAX_POSITIONS, SPECIALS, TURN_END, VOCABULARY

HIDDEN = 192
LAYERS = 6
HEADS = 6
KEY_VALUE_HEADS = 3
INTERMEDIATE = 512


def shape() -> LlamaConfig:
    """Return the configuration of the bundled base."""
    end_of_text = SPECIALS.index(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    config.architectures = ["LlamaForCausalLM"]
    return config


def parameters(config: LlamaConfig) -> int:
    """Return the number of parameters of a Llama of this shape with tied embeddings."""
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    heads, pairs = int(config.num_attention_heads), int(config.num_key_value_heads or config.num_attention_heads)
    head = hidden // heads
    attention = 2 * hidden * heads * head + 2 * hidden * pairs * head  # q and o, k and v
    layer = attention + 3 * hidden * inner + 2 * hidden
    return int(config.vocab_size) * hidden + int(config.num_hidden_layers) * layer + hidden


def write_shape(out: Path) -> int:
    """Write config.json and generation_config.json into `out` and return the number of parameters."""
    config = shape()
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    ends = [SPECIALS.index(END_OF_TEXT), SPECIALS.index(TURN_END)]  # of a document, and of a turn in a chat
    GenerationConfig(eos_token_id=ends, pad_token_id=ends[0], bos_token_id=None).save_pretrained(out)
    return parameters(config)
