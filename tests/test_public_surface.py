"""What other code relies on: names, parameters and defaults, the fields of chunks, clean ends."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from operator import attrgetter

import nvila_helpers
import pytest
import torch
from helpers import living_caches, pixels, tiny_llava
from test_internvl import tiny_internvl

import vlmlib
from vlmlib import GenParams, InternVLStreamGenerator, LlavaStreamGenerator, NVILAStreamGenerator

NVILAS = (
    "model, gen_params, input, media=None, media_cfg=None, start_pos=0, device=None, "
    "stream_interval=2, echo=False, stop_token_ids=(), image_tensor=None, chunk_prefilling=False, "
    "quant_llm=False"
)
SIGNATURES = {  # as published, but that the device is the model's and no default can be changed
    "LlavaStreamGenerator": "model, tokenizer, input, start_pos, gen_params, device=None, "
    "stream_interval=1, echo=False, stop_token_ids=(), image_tensor=None, chunk_prefilling=False",
    "NVILAStreamGenerator": NVILAS,
    "InternVLStreamGenerator": NVILAS,
    "prepare_logits_processor": "temperature, repetition_penalty, top_p, top_k, "
    "min_tokens_to_keep=1",
    "tokenizer_image_token": "prompt, tokenizer, image_token_index=-200, return_tensors=None",
    "stream_output": "generator, time_stats=None",
    "load_pretrained_model": "model_path, model_base, model_name",
    "process_images": "images, image_processor, model_cfg=None",
    "prepare_inputs_labels_for_multimodal": "model, input_ids, position_ids, attention_mask, "
    "past_key_values, labels, images, image_sizes=None",
    "Llava.prepare_inputs_labels_for_multimodal": "model, input_ids, position_ids, attention_mask, "
    "past_key_values, labels, images, image_sizes=None",
    "split_chessboard": "x, num_split_h, num_split_w",
    "merge_chessboard": "x, num_split_h, num_split_w",
    "merge_features_for_dynamic_s2": "image_features, block_sizes, scales, "
    "resize_output_to_scale_idx",
    "dynamic_preprocess": "image, min_num=1, max_num=12, image_size=448, use_thumbnail=False",
    "dynamic_s2_preprocess": "image, s2_scales=(448, 896, 1344), max_num=12, image_size=448",
    "find_closest_aspect_ratio": "aspect_ratio, target_ratios, width, height, image_size",
    "get_index": "bound, fps, max_frame, first_idx=0, num_segments=32",
    "pixel_shuffle": "x, scale_factor=0.5",
    "space_to_depth": "x, factor",
    "LlavaMetaModel.split_chessboard": "x, num_split_h, num_split_w",
    "LlavaMetaModel.merge_chessboard": "x, num_split_h, num_split_w",
    "LlavaMetaModel.merge_features_for_dynamic_s2": "self, image_features, block_sizes",
    "LlavaMetaModel.get_llm": "self",
    "LlavaMetaModel.get_lm_head": "self",
    "LlavaMetaModel.get_vision_tower": "self",
    "LlavaMetaModel.get_mm_projector": "self",
    "LlavaMetaModel.post_config": "self",
    "LlavaMetaModel.encode_images": "self, images, block_sizes=None",
    "LlavaMetaForCausalLM._embed": "self, input_ids, media, media_config, labels, attention_mask",
    "LlavaMetaForCausalLM.generate_content": "self, prompt, generation_config=None, quant_llm=True",
    "LlavaMetaForCausalLM.prepare_media": "self, conversation",
    "LlavaMetaForCausalLM.stream_gen": "self, input_ids, media, media_cfg, start_pos, "
    "chunk_prefilling, quant_llm, attention_mask=None",
}
METHODS = (  # published names whose parameters are vlmlib's own
    "LlavaMetaModel.init_vlm",
    "LlavaMetaModel.load_pretrained",
    "LlavaMetaModel.save_pretrained",
    "LlavaMetaForCausalLM.generate",
    "LlavaMetaForCausalLM.benchmark",
)
CONSTANTS = {
    "IMG_START_TOKEN": "<img>",
    "IMG_END_TOKEN": "</img>",
    "IMG_CONTEXT_TOKEN": "<IMG_CONTEXT>",
    "NUM_IMAGE_TOKEN": 256,
    "IMAGE_TOKEN": "<image>",
    "IMAGE_TOKEN_INDEX": -200,
    "IGNORE_INDEX": -100,
}
TINYCHATS = {
    "temp": 0.2,
    "repeat_penalty": 1.1,
    "top_p": 0.95,
    "top_k": 50,
    "n_vocab": None,
    "n_predict": 512,
}


# ---- names and parameters ----


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_and_defaults(name):
    """Whatever else a function takes, it takes by keyword, and need not be given."""
    parameters = inspect.signature(attrgetter(name)(vlmlib)).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    found = ", ".join(str(p.replace(annotation=p.empty)) for p in positional)
    assert found == SIGNATURES[name]
    for p in parameters:
        assert p in positional or p.kind is p.VAR_KEYWORD or p.default is not p.empty


def test_everything_is_exported():
    names = {name.split(".")[0] for name in SIGNATURES} | set(CONSTANTS)
    names |= {"TimeStats", "GenParams", "conv_templates"}
    names |= {"select_best_resolution", "get_anyres_image_grid_shape", "unpad_image"}
    assert names <= set(vlmlib.__all__)
    assert all(hasattr(vlmlib, name) for name in vlmlib.__all__)
    assert {name: getattr(vlmlib, name) for name in CONSTANTS} == CONSTANTS
    assert {"vicuna_v1", "llava_v1", "mistral_instruct", "chatml_direct"} <= set(
        vlmlib.conv_templates
    )


def test_nvila_has_the_published_methods():
    assert issubclass(vlmlib.NVILA, vlmlib.LlavaMetaModel)
    assert issubclass(vlmlib.NVILA, vlmlib.LlavaMetaForCausalLM)
    assert all(callable(attrgetter(name)(vlmlib)) for name in METHODS)


def test_gen_params():
    defaults = {f.name: f.default for f in fields(GenParams)}
    assert {name: defaults[name] for name in TINYCHATS} == TINYCHATS
    assert GenParams() == GenParams(**TINYCHATS), "nothing else needs to be given"


def test_generate_takes_llavas_keywords(llava):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        out = llava.generate(
            torch.tensor([llava.prompt_ids("<image>\nHi")]),
            images=pixels(1),
            image_sizes=[(28, 28)],
            do_sample=True,
            temperature=0.2,
            top_p=0.9,
            num_beams=1,
            max_new_tokens=3,
            use_cache=True,
        )
    assert out.shape == (1, 3)


# ---- chunks ----

PROMPT = "<image>\nWhat is this?"
FAMILIES = ("llava", "nvila", "internvl")
in_all_families = pytest.mark.parametrize("family", FAMILIES)


@cache
def model_of(family: str):
    make = {"llava": tiny_llava, "nvila": nvila_helpers.nvila, "internvl": tiny_internvl}
    return make[family]()


def ask(family: str, picture, **options) -> Iterator[dict]:
    model, params = model_of(family), GenParams.greedy(n_predict=6)
    options = {"stream_interval": 2, "image_tensor": picture} | options
    if family == "llava":
        return LlavaStreamGenerator(model, model.tokenizer, PROMPT, 0, params, **options)
    generator = {"nvila": NVILAStreamGenerator, "internvl": InternVLStreamGenerator}[family]
    return generator(model, params, PROMPT, **options)


@in_all_families
def test_keys_of_every_chunk(family):
    *middle, last = ask(family, pixels(1))
    assert len(middle) == 3
    for chunk in (*middle, last):
        assert set(chunk) == {"text", "delta", "usage", "finish_reason", "timing"}
        assert set(chunk["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
        assert all(type(n) is int for n in chunk["usage"].values())
        assert type(chunk["text"]) is type(chunk["delta"]) is str
    assert all(chunk["finish_reason"] is None and chunk["timing"] is None for chunk in middle)
    assert last["finish_reason"] == "length"
    timing = last["timing"]
    assert set(timing) == {
        *("context_tokens", "reused_tokens", "context_time"),
        *("total_tokens", "generation_time_list"),
    }
    assert type(timing["context_time"]) is float
    assert [type(seconds) for seconds in timing["generation_time_list"]] == [float] * 5


@in_all_families
def test_a_stop_id_gives_the_same_keys(family):
    with_ids = list(ask(family, pixels(1), trace=0, stream_interval=1))
    stop = with_ids[3]["tokens"][0].id
    *_, expected = ask(family, pixels(1))
    *_, last = ask(family, pixels(1), stop_token_ids=[stop])
    assert last["finish_reason"] == "stop"
    assert {key: type(value) for key, value in last.items()} == {
        key: type(value) for key, value in expected.items()
    }
    assert list(last["timing"]) == list(expected["timing"])


# ---- what a stream leaves behind ----


@in_all_families
def test_a_closed_stream_frees_its_memory(family, fast_gc):
    model_of(family)
    before = living_caches()
    picture = pixels(1)
    alive = weakref.ref(picture)
    stream = ask(family, picture)
    next(stream)
    assert living_caches() == before + 1, "the stream has a cache"
    del picture
    stream.close()
    gc.collect()
    assert alive() is None and living_caches() == before


@in_all_families
def test_nothing_is_printed(family, capfd):
    list(ask(family, pixels(1), echo=True, trace=2))
    ask(family, pixels(1)).close()
    assert capfd.readouterr() == ("", "")


# ---- answers that have begun ----


@in_all_families
@pytest.mark.parametrize("begun", [1, 3])
def test_an_answer_goes_on_from_any_token(family, begun):
    """As if the model had drawn it; with a cache all but the changed token is kept."""
    model, media = model_of(family), pixels(1)
    params = GenParams.greedy(n_predict=6)

    def stream(answer=(), **options):
        options |= {"answer": answer, "trace": 4}
        chunks = list(model.stream_prompt(PROMPT, media, params, **options))
        return [token for chunk in chunks for token in chunk["tokens"]], chunks[-1]

    tokens, _ = stream()
    ids = [t.id for t in tokens]
    again, last = stream(ids[:begun], stream_interval=99)
    assert [t.id for t in again][: 6 - begun] == ids[begun:]
    said = model.tokenizer.decode([t.id for t in again])
    assert last["text"].rstrip("\ufffd") == said.rstrip("\ufffd")  # no half characters
    cache = model.new_cache()
    held = {"cache": cache, "chunk_prefilling": True}
    stream(ids[:begun], **held)
    other = [*ids[: begun - 1], tokens[begun - 1].alternatives[2][0]]
    branch, last = stream(other, start_pos=len(cache), **held)
    whole, _ = stream(other)
    assert [t.id for t in branch] == [t.id for t in whole]
    assert last["timing"]["context_tokens"] == 1
    assert last["usage"]["completion_tokens"] == 6
