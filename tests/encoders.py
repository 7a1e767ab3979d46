"""Tiny random encoders of many families, built from their configurations alone; tests import this file."""

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedModel

VOCAB = 99
# Names that families have for their sizes; the softmax model of texts this short sees everything.
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "dim": 32, "embedding_size": 32, "intermediate_size": 48, "hidden_dim": 48,
    "num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 4, "n_heads": 4, "num_key_value_heads": 4,
    "head_dim": 8, "max_position_embeddings": 512, "local_attention": 512, "pad_token_id": 0,
    "true_hidden_size": 32, "intra_bottleneck_size": 32, "use_bottleneck": False,
    "languages": ["en"], "default_language": "en", "layer_types": ["full_attention"] * 2,
    # MobileBERT's embeddings would mix each token with its neighbours, padding or not.
    "trigram_input": False,
}  # fmt: skip
# Those that this version of transformers has.
FAMILIES = [
    "albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "esm",
    "eurobert", "gte", "jina_embeddings_v3", "mobilebert", "modernbert", "nomic_bert", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
]  # fmt: skip
FAMILIES = [name for name in FAMILIES if name in CONFIG_MAPPING]


def tiny_encoder(family: str, auto=AutoModel, **changes) -> PreTrainedModel:
    config = AutoConfig.for_model(family)
    for name, value in (SIZES | changes).items():
        if hasattr(config, name) or name in changes:
            setattr(config, name, value)
    return with_weights(auto.from_config(config).eval())


def with_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Larger random ones than families begin with, so that every part of them matters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model
