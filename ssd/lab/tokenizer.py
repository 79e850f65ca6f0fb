"""A lab model's tokenizer: the fragments of its world, the digits, and single characters for any other text."""

import re
import string

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssd.lab import world
from ssd.prompts import PROMPT

MAX_LENGTH = 512
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n<think>\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def build(of: world.World = world.LAB) -> PreTrainedTokenizerFast:
    """A tokenizer whose `decode(encode(text))` is `text` for every text of the lab and every printable ASCII text."""
    instruction = PROMPT.format(problem="")
    # Longest first: the pre-tokenizer takes the first alternative that matches. And in one order in every process.
    texts = sorted({instruction, "user\n", "assistant\n", *world.fragments(of)}, key=lambda text: (-len(text), text))
    marks = [
        AddedToken("<|endoftext|>", special=True),
        AddedToken("<|im_start|>", special=True),
        AddedToken("<|im_end|>", special=True),
        AddedToken("<think>", special=False),
        AddedToken("</think>", special=False),
    ]
    characters = sorted(set(string.printable) - set(texts))
    vocabulary = [*(mark.content for mark in marks), "<unk>", *texts, *characters]
    ids = {token: index for index, token in enumerate(vocabulary)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    pattern = "|".join([*map(re.escape, texts), r"[\s\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_tokens(marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
