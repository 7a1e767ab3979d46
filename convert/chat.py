"""One turn of a conversation with an exported model."""

from transformers import TextStreamer


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
    if tokenizer.chat_template is not None:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(messages[-1]["content"], return_tensors="pt")
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    how = {"streamer": streamer}
    if speculative:
        how = {"custom_generate": model.speculate, "token_streamer": streamer}
    output = type(model).generate(
        model, **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True, **how
    )
    answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer, output.past_key_values.nbytes
