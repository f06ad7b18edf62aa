"""Reads models of karpathy/llama2.c: the checkpoint of version 0 ("legacy"), and its two kinds of vocabulary files.

The results are the files of a Transformers folder, byte for byte those that our records were made with.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

HEADER = struct.Struct("<7i")  # width, inner width, layers, heads, key-value heads, vocabulary, context
SPACE = "▁"
SPECIAL = ("<unk>", "<s>", "</s>")


def weights(checkpoint: bytes) -> bytes:
    """The safetensors file of a checkpoint.

    Args:
        checkpoint: The header, then all weights as float32. An input vocabulary that is also the head has a positive
            size in the header.

    Returns:
        The content of `model.safetensors`.

    Raises:
        ValueError: The checkpoint has another length than its header says, or a head of its own.
    """
    import torch
    from safetensors.torch import save

    width, inner, layers, heads, kv_heads, vocabulary, context = HEADER.unpack_from(checkpoint)
    keys = width // heads * kv_heads
    shapes = {
        "embed_tokens": (vocabulary, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, keys, width),
        "self_attn.v_proj": (layers, keys, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, inner, width),
        "mlp.down_proj": (layers, width, inner),
        "mlp.up_proj": (layers, inner, width),
        "norm": (width,),
        "rotation": (2, context, width // heads // 2),  # of the positions; Transformers computes it
    }
    expected = HEADER.size + 4 * sum(math.prod(shape) for shape in shapes.values())
    if vocabulary <= 0 or len(checkpoint) != expected:
        raise ValueError(f"a llama2.c checkpoint of this header has {expected} bytes; this file has {len(checkpoint)}.")
    values = torch.frombuffer(bytearray(checkpoint), dtype=torch.float32, offset=HEADER.size)
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    read = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    del read["rotation"]
    tensors = {f"model.{name}.weight": read.pop(name).clone() for name in ("embed_tokens", "norm")}
    for name, stacked in read.items():
        for layer, weight in enumerate(stacked):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            tensors[f"model.layers.{layer}.{name}.weight"] = halves(weight, turned) if turned else weight.clone()
    return save(tensors, {"format": "pt"})


def halves(weight: Any, heads: int) -> Any:
    """Reorders the outputs of each head: llama2.c rotates neighbours, Transformers the two halves of a head."""
    outputs, inputs = weight.shape
    return weight.view(heads, outputs // heads // 2, 2, inputs).transpose(1, 2).reshape(outputs, inputs).contiguous()


def pieces(vocabulary: bytes) -> list[str]:
    """The pieces of a `tokenizer.bin`, in the order of their numbers."""

    def read() -> Iterator[str]:
        position = 4
        while position < len(vocabulary):
            _, length = struct.unpack_from("<fi", vocabulary, position)
            position += 8
            yield vocabulary[position : position + length].decode()
            position += length

    found = list(read())
    return [*SPECIAL, *(piece.replace(" ", SPACE) for piece in found[len(SPECIAL) :])]


def tokenizer(vocabulary: list[str]) -> bytes:
    """The content of `tokenizer.json`.

    Args:
        vocabulary: The pieces in the order of their numbers, which is that of their merges.

    Returns:
        A byte-pair encoding that splits a text as llama2.c does.
    """
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    written = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": piece} | special for number, piece in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replaced]},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}},
        "decoder": {"type": "Sequence", "decoders": [written, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in numbers,
            "ignore_merges": False,
            "vocab": numbers,
            "merges": merges,
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def configuration(width: int, inner: int, vocabulary: int, context: int) -> dict[str, bytes]:
    """The small files of a model with 5 layers, 8 heads and 4 key-value heads: name → content."""
    numbers = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": width // 8,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "transformers_version": "5.23.0",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    words = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }
    files = {"config.json": numbers, "tokenizer_config.json": words}
    return {name: (json.dumps(content, indent=2) + "\n").encode() for name, content in files.items()}
