"""One turn of a conversation with an exported model."""

import torch
from transformers import TextStreamer

from linearize.convert.data import encode


def reply(
    model, tokenizer, messages: list[dict], max_new_tokens: int, stream: bool, speculative: bool
) -> tuple[str, int]:
    """The model's greedy answer to a conversation, and the bytes of its cache at the end.

    Args:
        messages: `role` and `content`, the last one the user's.
        stream: print the answer while it is generated.
        speculative: with the model's draft heads, which changes the time that it takes.

    Raises:
        ValueError: when it has none.
    """
    ids = encode(tokenizer, messages)[None].to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    how = {"streamer": streamer}
    if speculative:
        how = {"custom_generate": model.speculate, "token_streamer": streamer}
    output = type(model).generate(
        model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
        return_dict_in_generate=True, **how,
    )  # fmt: skip
    answer = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return answer, output.past_key_values.nbytes
