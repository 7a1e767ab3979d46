"""What stays in the model: the layer, its kernels, its cache, and its way into transformers models.

Needs torch and transformers alone; an exported model carries copies of these files.
"""
