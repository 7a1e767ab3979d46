"""Tiny random encoder-decoders of many families, built from their configurations alone; tests import this file."""

from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from .encoders import with_weights

VOCAB = 99
SIZES = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 512, "dropout_rate": 0.0,
    # Further on than the window, and not as far as texts are long.
    "relative_attention_max_distance": 20, "relative_attention_num_buckets": 16,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
# Those that this version of transformers has.
FAMILIES = [
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "pegasus", "plbart", "t5", "umt5",
]  # fmt: skip
FAMILIES = [name for name in FAMILIES if name in CONFIG_MAPPING]
# Family -> why it cannot be.
REFUSED = {
    "led": "LEDEncoderSelfAttention at .* does not go through",
    "longt5": "LongT5LocalAttention at .* does not go through",
    "mvp": "MvpAttention at .* does not go through",
    "nllb-moe": "nothing in its decoder says that it is causal",
    "pegasus_x": "PegasusXGlobalLocalAttention at .* does not go through",
    "prophetnet": "ProphetNetAttention at .* does not go through",
}


def tiny_seq2seq(family: str, auto=AutoModelForSeq2SeqLM, **changes) -> PreTrainedModel:
    config = AutoConfig.for_model(family)
    for name, value in (SIZES | TOKENS | changes).items():
        if hasattr(config, name) or name in TOKENS | changes:
            setattr(config, name, value)
    return with_weights(auto.from_config(config).eval())
