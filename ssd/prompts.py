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
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model or add "
            "chat_template.jinja to the model folder"
        )
    messages = [{"role": "user", "content": PROMPT.format(problem=problem)}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=True, tokenize=True, return_dict=False
    )
