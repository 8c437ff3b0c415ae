"""A byte-level BPE tokenizer for the scene texts, with the special tokens of LLaVA-1.5 or of Qwen2.

Byte level means that every text can be written down, also one the training never saw: what has no
token of its own falls apart into bytes, and decoding gives the same text back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from .scenes import questions, train_scene

VOCABULARY = 512
UNKNOWN, BOS, EOS, IMAGE, PAD = SPECIAL = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
TURN_START, TURN_END, END_OF_TEXT = QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def scene_texts(scenes: int) -> Iterator[str]:
    """Questions and answers of the first training scenes, in the form the model reads them."""
    for index in range(scenes):
        for qa in questions(train_scene(index), random.Random(index)):
            yield f"USER: \n{qa.question} ASSISTANT: {qa.answer}"


@cache
def _trained(vocabulary: int, scenes: int) -> str:
    """The JSON of a tokenizer without anything around its texts; always the same one."""
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        scene_texts(scenes),
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return core.to_str()


def build_tokenizer(vocabulary: int = VOCABULARY, scenes: int = 1_000) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocabulary` tokens that puts `<s>` first, as Llama's does."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL)
    if vocabulary < smallest:
        raise ValueError(f"a byte-level vocabulary needs {smallest} tokens or more: {vocabulary}")
    core = Tokenizer.from_str(_trained(vocabulary, scenes))
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_qwen_tokenizer(media: Mapping[str, str], scenes: int = 1_000) -> PreTrainedTokenizerFast:
    """The vocabulary of `build_tokenizer` with the same ids, and behind it the tokens of Qwen2's
    chat format and those of a family for its `media`, by name. Nothing stands before a text.
    """
    core = Tokenizer.from_str(_trained(VOCABULARY, scenes))
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    tokens = (*QWEN, *media.values())
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=dict(media),
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
