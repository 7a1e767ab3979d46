"""linearize: pretrained softmax transformers with augmented linear attention."""

__version__ = "0.1.0"
