"""The one prompt, and its chat rendering: sampling, evaluation and training all see the same token ids."""

PROMPT = (
    "Solve the following competitive math problem.\n"
    "Reason step by step and put your final answer in \\boxed{{}}.\n\n"
    "{problem}"
)


def render(tokenizer, problem: str) -> list[int]:
    """Token ids of the chat prompt of one problem statement, up to where the assistant begins to think.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        It must have a chat template.
    """
    messages = [{"role": "user", "content": PROMPT.format(problem=problem)}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=True, tokenize=True, return_dict=False
    )


def opens_thinking(tokenizer) -> bool:
    """Whether the rendered prompt ends inside an open `<think>`, so that the completion begins with the thinking."""
    text = tokenizer.decode(render(tokenizer, "?"))
    return text.rfind("<think>") > text.rfind("</think>")
