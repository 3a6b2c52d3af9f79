"""`genai_config.json`: an export with a float cache as onnxruntime-genai loads it."""

from __future__ import annotations

from typing import Any

from kurtail_onnx.describe import MODEL, eos_of
from kurtail_onnx.graph.model import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from kurtail_onnx.profiles import PROFILES
from kurtail_pl.artefact.source import Source
from kurtail_pl.surgery.positions import steady_positions

GENAI = "genai_config.json"


def genai_config(source: Source) -> dict[str, Any]:
    """Configuration for onnxruntime-genai; it feeds no scales, so a packed cache has none."""
    # Beyond them a cache has to be made anew, which genai does not do.
    config, positions = source.config, steady_positions(source.config)
    eos = eos_of(source)
    pad = config.pad_token_id
    return {
        "model": {
            "type": "llama",
            "bos_token_id": 0 if config.bos_token_id is None else config.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": (eos or [0])[0] if pad is None else pad,
            "vocab_size": config.vocab_size,
            "context_length": positions,
            "decoder": {
                "filename": MODEL,
                # Its parser knows session entries only as plain options.
                "session_options": {"log_id": "kurtail", "provider_options": [], **PROFILES["exact"]},
                "num_hidden_layers": len(source.layers),
                "num_attention_heads": source.heads,
                "num_key_value_heads": source.kv_heads,
                "hidden_size": config.hidden_size,
                "head_size": source.head_dim,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "position_ids": POSITION_IDS,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The cache grows with every token; a shared buffer would have the length of the longest text from the start.
        "search": {"do_sample": False, "max_length": positions, "past_present_share_buffer": False},
    }
