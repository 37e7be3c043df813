"""Small tokenizers of the kinds that checkpoints come with, and chat templates in the shapes of published ones."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.helpers import tiny_data

# LLaVA-1.5: nothing ends an answer, and the generation prompt lacks the space that an answer begins with.
LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Vicuna: texts, and an end token after each answer.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
# LLaVA-OneVision: a space before the line break of answers that the generation prompt lacks.
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}{% else %}{{ '\n' + part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2 and Mistral: no role names, no generation prompt; the answer follows the bracket.
BRACKETS = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Llama 2 as published: a space before the end token.
SPACED = BRACKETS.replace("message['content'] + eos_token", "message['content'].strip() + ' ' + eos_token")
# Phi-3: another special token after the last turn, if no answer is asked for.
CLOSED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}<|im_start|>{% endif %}"
)
# Llama 3 as first published: the generation prompt is always there.
ALWAYS_ASKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_start|>' + message['content'] }}"
    "{{ '<|im_end|>' }}{% endfor %}<|im_start|>assistant<|im_start|>"
)
# Mistral 0.3: the system text goes into the last question, if that is the last turn.
SYSTEM_LAST = (
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}[INST] "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Llama 3.2 and Pixtral: typed parts from users, and texts from the others.
PARTS_OF_USERS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'user' %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% else %}{{ message['content'] | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "llava_1_5": LLAVA_1_5,
    "vicuna": VICUNA,
    "onevision": ONEVISION,
    "chatml": tiny_data.TYPED_CHATML,
    "brackets": BRACKETS,
    "spaced": SPACED,
    "closed": CLOSED,
    "always_asked": ALWAYS_ASKED,
}
KINDS = ("byte_level", "metaspace_first", "metaspace_always", "legacy_llama")


def tokenizer(kind: str, template: str) -> PreTrainedTokenizerBase:
    """A tokenizer of one of `KINDS` with the special tokens of `tiny_data.tokenizer`.

    All but the byte-level one write a space as U+2581, and the two last put one before every text.
    """
    if kind == "byte_level":
        return tiny_data.tokenizer(template)
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "legacy_llama":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        bpe.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    else:
        scheme = kind.removeprefix("metaspace_")
        spaces = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=True)
        lines = [pre_tokenizers.Split("\n", "isolated")] if scheme == "first" else []
        bpe.pre_tokenizer = pre_tokenizers.Sequence([*lines, spaces])
    bpe.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=[chr(code) for code in range(32, 127)] + ["\n"],
        show_progress=False,
    )
    texts = ["USER: what colour is it? ASSISTANT: red", "ASSISTANT: green a cat\n", " USER: and why? yes no the"]
    bpe.train_from_iterator(texts * 40, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<image>"],
        chat_template=template,
    )
