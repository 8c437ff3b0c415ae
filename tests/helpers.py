"""Tiny models and small tools that several test files share."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

import vlmlib
from vlmlib.sampling import Sampler

GOLDEN = Path(__file__).parent / "golden"
VECTORS = json.loads((GOLDEN / "vectors.json").read_text(encoding="utf-8"))
TOKENIZERS = ("tokenizer_bos", "tokenizer_no_bos")
CONTEXT = 96
PICTURE = 28  # pixels a side: 2 x 2 patches

NATIVE = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
LAYOUTS = {
    "tiny-llava": NATIVE | {"special_tokens_map.json"},
    "tiny-internvl": NATIVE,
    "tiny-nvila": {
        "config.json",
        "llm/config.json",
        "llm/generation_config.json",
        "llm/model.safetensors",
        "llm/tokenizer.json",
        "llm/tokenizer_config.json",
        "mm_projector/config.json",
        "mm_projector/model.safetensors",
        "vision_tower/config.json",
        "vision_tower/model.safetensors",
        "vision_tower/preprocessor_config.json",
    },
}
"""The files of each small model's folder, as those of the large ones are called."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role | upper }}: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@cache
def golden_tokenizer(name: str = "tokenizer_bos") -> PreTrainedTokenizerFast:
    """Shared, so not to be changed; `fresh_tokenizer` gives one of your own."""
    return fresh_tokenizer(name)


def fresh_tokenizer(name: str = "tokenizer_bos") -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN / name)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_net(
    tokenizer, seed: int = 0, tower: str = "clip", text_class=LlamaConfig, **text_changes
) -> LlavaForConditionalGeneration:
    """A random LLaVA, wild enough that its greedy answers differ from prompt to prompt."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    vision_class = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    text = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(tokenizer) + 1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=vision_class(
            **size, num_attention_heads=2, image_size=PICTURE, patch_size=PICTURE // 2
        ),
        text_config=text_class(**text | text_changes),
        image_token_id=len(tokenizer),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    net = wild_net(LlavaForConditionalGeneration, config, seed)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.generation_config.pad_token_id = tokenizer.eos_token_id
    return net


def wild_net(net_class, config, seed: int):
    """Random weights, wild enough that greedy answers differ from prompt to prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = net_class(config).eval()
        for weight in net.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    return net


def tiny_processor() -> vlmlib.ImageProcessor:
    return vlmlib.ImageProcessor(PICTURE, PICTURE, PICTURE, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def tiny_llava(name: str = "tokenizer_bos", seed: int = 0, **changes) -> vlmlib.Llava:
    tokenizer = fresh_tokenizer(name)
    return vlmlib.Llava(tiny_net(tokenizer, seed, **changes), tokenizer, tiny_processor())


NEXT_TILE = 28
PINPOINTS = [[28, 56], [56, 56], [84, 28], [28, 84]]  # (height, width); not the same the other way


def tiny_llava_next(seed: int = 0, **vision_changes) -> vlmlib.LlavaNext:
    """A random LLaVA-1.6 with tiles of 4 x 4 patches."""
    tokenizer = fresh_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    vision = {"image_size": NEXT_TILE, "patch_size": 7, "num_hidden_layers": 3}
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
            | vision
            | vision_changes
        ),
        text_config=LlamaConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            vocab_size=len(tokenizer),
            bos_token_id=1,
            eos_token_id=tokenizer.eos_token_id,
        ),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    net = wild_net(LlavaNextForConditionalGeneration, config, seed)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.generation_config.pad_token_id = tokenizer.eos_token_id
    return vlmlib.LlavaNext(net, tokenizer, tiny_processor())


def pixels(n: int = 1, seed: int = 0) -> torch.Tensor:
    """(n, 3, h, w) pictures as a vision tower takes them."""
    return torch.randn(n, 3, PICTURE, PICTURE, generator=torch.Generator().manual_seed(seed))


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture in which no two pixels are likely to be alike."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ids_of(chunks: Iterable[dict]) -> list[int]:
    """All sampled ids, the stop id included, of a stream that was opened with trace=0."""
    return [token.id for chunk in chunks for token in chunk.get("tokens", ())]


def expanded_ids(net, tokenizer, prompt: str) -> torch.Tensor:
    """(1, n) ids for transformers' own forward and generate: four positions a picture."""
    runs = (
        [net.config.image_token_id] * 4 if i == vlmlib.IMAGE_TOKEN_INDEX else [i]
        for i in vlmlib.tokenizer_image_token(prompt, tokenizer)
    )
    return torch.tensor([sum(runs, [])])


def transcript(model, messages) -> tuple[str, list[vlmlib.Medium]]:
    """Prompt and media of (role, parts) of all turns."""
    sources = [p for _, said in messages for p in said if not isinstance(p, str)]
    return model.conversation_prompt(messages), model.prepare(sources)


def spelled_out(model, prompt: str, media) -> list:
    """What stands at every position: an id, or the bytes of a medium and a number."""
    ids, media = model.read(prompt, media)
    queue, out = iter(media), []
    for i in ids:
        if i == vlmlib.IMAGE_TOKEN_INDEX:
            medium = next(queue)
            out += [(medium.pixels.numpy().tobytes(), k) for k in range(medium.length)]
        else:
            out.append(i)
    return out


@torch.inference_mode()
def assert_read_again(chat: vlmlib.Chat, messages: Sequence, question: str = "And now?") -> None:
    """When its turns become `messages`, a conversation goes on as a new one with them would, and
    keeps what stands before the first change only.
    """
    model, params = chat.model, vlmlib.GenParams.greedy(n_predict=8)
    first, before, after = (
        transcript(model, said)
        for said in (
            chat.messages[:1],
            [*chat.messages, ("user", (question,))],
            [*messages, ("user", (question,))],
        )
    )
    pairs = zip(spelled_out(model, *before), spelled_out(model, *after), strict=False)
    change = next(i for i, (old, new) in enumerate(pairs) if old != new)
    expected = model.turn(*after).prefill()
    assert (model.turn(*before).prefill() - expected).abs().max() > 1e-3, "the change matters"
    copied = copy.deepcopy(chat.cache)
    turn = model.turn(*after, start_pos=len(copied), cache=copied)
    assert min(change, len(spelled_out(model, *first))) <= turn.reused_tokens <= change
    assert (turn.prefill() - expected).abs().max() < 1e-4
    chat.messages = list(messages)
    again = ids_of(chat.ask(question, params, trace=0))
    assert again == ids_of(model.stream_prompt(*after, params, trace=0))


def penalised_ids(turn, text_ids: Sequence[int], penalty: float, n: int) -> list[int]:
    """The n best ids by hand, with those of `text_ids` and of the answer so far pushed down."""
    out = []
    with torch.inference_mode():
        logits = turn.prefill()
        for _ in range(n):
            scores = logits[0].clone()
            for i in {*text_ids, *out}:
                scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
            out.append(int(scores.argmax()))
            logits = turn.step(torch.tensor([out[-1:]]))
    return out


def watch_seen_ids(monkeypatch) -> list[list[int]]:
    """From now on collects the ids that the repetition penalty sees at every step."""
    seen, original = [], Sampler.scores

    def scores(self, logits, ids):
        seen.append(ids[0].tolist())
        return original(self, logits, ids)

    monkeypatch.setattr(Sampler, "scores", scores)
    return seen


def living_caches() -> int:
    """How many key/value caches are in memory."""
    gc.collect()
    return sum(type(o) is DynamicCache for o in gc.get_objects())


def without_times(chunks) -> list[dict]:
    """Chunks without what differs from run to run."""
    out = []
    for chunk in chunks:
        timing = chunk["timing"] and {
            k: v for k, v in chunk["timing"].items() if k.endswith("tokens")
        }
        out.append(chunk | {"timing": timing})
    return out
