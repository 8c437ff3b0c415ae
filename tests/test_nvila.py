"""NVILA: towers, tiles, media in their places, and streams; all on tiny random models."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    GOLDEN,
    VECTORS,
    assert_read_again,
    ids_of,
    noise,
    penalised_ids,
    transcript,
    watch_seen_ids,
    without_times,
)
from nvila_helpers import (
    CONTEXT,
    MODES,
    PROJECTORS,
    TILE,
    TSP,
    config,
    nvila,
    shared,
    tokenizer,
)
from transformers import GenerationConfig, SiglipVisionModel

import vlmlib
from vlmlib import (
    IGNORE_INDEX,
    CacheError,
    Chat,
    ContextLengthError,
    DeviceError,
    GenParams,
    LlavaMetaModel,
    NVILAStreamGenerator,
    PlaceholderError,
    PromptError,
    ShapeError,
    Video,
    VideoError,
    quantize_llm,
)
from vlmlib.nvila_causal import expand_tiles
from vlmlib.nvila_encoders import SiglipTower, pool_features
from vlmlib.tiling import dynamic_s2_tokens

GREEDY = GenParams.greedy(n_predict=10)
CLIP = GOLDEN.parent / "data" / "clip.mp4"
QUESTION = "What is this?"
in_all_modes = pytest.mark.parametrize("mode", MODES)
IMAGE, VIDEO = 371, 372  # of the tiny tokenizer; another one has others


def frames(n: int = 4, seed: int = 10) -> Video:
    return Video([noise(40, 30, seed + i) for i in range(n)])


def pixels(n: int = 1, seed: int = 0, side: int = TILE) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def words(model, text: str) -> torch.Tensor:
    """(n, d)"""
    return model.embed(torch.tensor(model.tokenizer(text).input_ids, dtype=torch.long))


def ask(model, parts, params=GREEDY, **options):
    """A stream about `parts`, through TinyChat's signature."""
    media, config = model.prepare_media([{"from": "human", "value": parts}])
    prompt = model.chat_prompt(parts)
    return NVILAStreamGenerator(model, params, prompt, media, config, **options)


# ---- golden vectors ----


class Stub(LlavaMetaModel):
    """No init_vlm, no weights: a tower and a projector only."""

    def __init__(self, tower, projector, config=None):
        self.tower, self.projector, self.config = tower, projector, config

    def get_vision_tower(self):
        return self.tower

    def get_mm_projector(self):
        return self.projector


def stub_of(case, tensors, by_tower: bool = True) -> Stub:
    features = tensors[case["tower_output"]][: case["tower_rows"]]
    weight = tensors[case["projector_weight"]]
    scales, at = case["scales"], case["resize_output_to_scale_idx"]

    def tower(images):
        return features

    config = None
    if by_tower:
        tower.scales, tower.resize_output_to_scale_idx = scales, at
    else:
        text = ",".join(map(str, reversed(scales)))  # a string, in any order
        config = SimpleNamespace(dynamic_s2=True, s2_scales=text, s2_resize_output_to_scale_idx=at)
    return Stub(tower, lambda z: z @ weight, config)


@pytest.mark.parametrize("by_tower", [True, False], ids=["tower", "config"])
@pytest.mark.parametrize("case", VECTORS["encode_images_dynamic_s2"])
def test_golden_encode_images(case, by_tower, golden_tensors):
    blocks = case["block_sizes"]
    images = torch.zeros(case["tower_rows"], 3, 4, 4)
    found = stub_of(case, golden_tensors, by_tower).encode_images(images, blocks)
    assert isinstance(found, list)
    expected = golden_tensors[case["out"]]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=0)
    if blocks == [None]:
        found = stub_of(case, golden_tensors, by_tower).encode_images(images)
        torch.testing.assert_close(torch.stack(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", VECTORS["merge_features_for_dynamic_s2"])
def test_golden_merge_features(case, golden_tensors):
    def tower(images):
        raise AssertionError("not asked")

    tower.scales = case["scales"]
    tower.resize_output_to_scale_idx = case["resize_output_to_scale_idx"]
    blocks = case["block_sizes"]
    maps, new = Stub(tower, None).merge_features_for_dynamic_s2(golden_tensors[case["x"]], blocks)
    assert [tuple(b) for b in new] == [tuple(b) for b in case["new_block_sizes"]]
    for found, name in zip(maps, case["out"], strict=True):
        torch.testing.assert_close(found, golden_tensors[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["split_chessboard", "merge_chessboard"])
def test_golden_chessboard(name, golden_tensors):
    for case in VECTORS[name]:
        board = case["num_split_h"], case["num_split_w"]
        out = getattr(LlavaMetaModel, name)(golden_tensors[case["x"]], *board)
        assert torch.equal(out, golden_tensors[case["out"]])


def test_pictures_of_different_sizes_in_one_batch():
    """The original stacks the results and fails where two pictures differ."""
    model = shared("dynamic_s2")
    media = [model.prepare([noise(*size)])[0] for size in [(90, 30), (30, 90), (60, 60)]]
    blocks = [m.block for m in media]
    assert blocks == [(2, 6), (6, 2), (3, 3)]
    with torch.inference_mode():
        tiles = torch.cat([m.pixels for m in media] + [pixels()])
        found = model.encode_images(tiles, [*blocks, None])
        assert [len(x) for x in found] == [48, 48, 36, 4]
        for medium, features in zip(media, found[:3], strict=True):
            torch.testing.assert_close(features, model.encode(medium)[:-1], atol=1e-5, rtol=0)


# ---- the parts equal transformers' ----


def test_the_tower_is_siglip_before_its_last_layer():
    tower = shared().get_vision_tower()
    x = pixels(3)
    with torch.inference_mode():
        states = SiglipVisionModel.forward(tower.net, x, output_hidden_states=True).hidden_states
        assert torch.equal(tower(x), states[-2])
        assert tower(x).shape == (3, 16, 24), "no class token is dropped"
        assert torch.equal(SiglipTower(tower.net, -1)(x), states[-1])
        assert tower(x.double()).dtype == torch.float32, "in the tower's own dtype"


def test_position_embeddings_are_interpolated_in_two_dimensions():
    """The original interpolates along the flattened grid, and its first and last are zero."""
    tower = shared().get_vision_tower()
    weight = tower.net.get_parameter("embeddings.position_embedding.weight")
    added = []
    hook = tower.net.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: added.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            x = pixels(1, side=42)
            out = tower(x)
            patches = tower.net.embeddings.patch_embedding(x).flatten(2)[0].T
            grid = weight.reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False)
            expected = grid[0].flatten(1).T
    finally:
        hook.remove()
    assert out.shape == (1, 36, 24)
    torch.testing.assert_close(added[0] - patches, expected, atol=1e-5, rtol=0)
    assert expected[0].abs().max() > 0.01 and expected[-1].abs().max() > 0.01


@torch.inference_mode()
def test_text_alone_is_qwen2():
    model = shared()
    for parts in ["Hello", "How many triangles are there? please describe"]:
        prompt = model.chat_prompt([parts])
        ids = torch.tensor([model.tokenizer(prompt).input_ids])
        expected = model.get_llm()(input_ids=ids, logits_to_keep=1).logits[:, -1]
        assert torch.equal(model.turn(prompt).prefill(), expected)
        embeds, _, mask = model._embed(ids, None, None, None, None)
        assert torch.equal(embeds, model.embed(ids)) and mask.all()
        whole = model.get_llm().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=model.stop_token_ids,
            pad_token_id=0,
        )
        assert ids_of(ask(model, [parts], trace=0)) == whole[0, ids.shape[1] :].tolist()
    assert model.get_lm_head() is model.get_llm().lm_head


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("temp", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 0.8), (1.8, 50, 0.95)]
)
def test_sampled_ids_are_those_of_generate(seed, temp, top_k, top_p):
    model = shared()
    parts = ["How many triangles are there?"]
    ids = torch.tensor([model.tokenizer(model.chat_prompt(parts)).input_ids])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        whole = model.get_llm().generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temp,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=1.0,
            max_new_tokens=10,
            eos_token_id=model.stop_token_ids,
            pad_token_id=0,
        )
    params = GREEDY.but(temp=temp, top_k=top_k, top_p=top_p, seed=seed, order="hf")
    assert ids_of(ask(model, parts, params, trace=0)) == whole[0, ids.shape[1] :].tolist()


# ---- how many positions ----


@in_all_modes
@pytest.mark.parametrize("projector", PROJECTORS)
@torch.inference_mode()
def test_lengths_are_known_before_encoding(projector, mode):
    model = shared(mode, projector)
    per_tile = {"mlp_downsample": 4, "mlp_downsample_2x2_fix": 4, "mlp_downsample_3x3_fix": 4}
    per_tile = per_tile.get(projector, 16)
    for size in [(28, 28), (90, 50), (20, 140), (1, 300), (300, 1)]:
        for sources in ([noise(*size)], [noise(*size), noise(30, 20)], [frames()], [frames(9)]):
            for medium in model.prepare(sources):
                features = model.encode(medium)
                assert features.shape == (medium.length, model.get_llm().config.hidden_size)
                if medium.kind == "video":
                    assert medium.length == 4 * (per_tile + 1)
                elif medium.block is None:
                    assert medium.length == per_tile + 1
                else:
                    expected = dynamic_s2_tokens(
                        *size, model.config.scales, 12, TILE, tokens_per_tile=per_tile
                    )
                    assert medium.length == expected + 1


@pytest.mark.parametrize("at", [-1, 0, 1, 2])
@torch.inference_mode()
def test_lengths_at_every_scale(at):
    model = shared("dynamic_s2", s2_resize_output_to_scale_idx=at)
    (medium,) = model.prepare([noise(90, 50)])
    assert medium.length == {-1: 12, 0: 1, 1: 4, 2: 12}[at] * 4 + 1 == len(model.encode(medium))


def test_published_numbers():
    """448 pixels, patches of 14: 256 positions a tile, 121 with the 3 x 3 projector."""
    for projector, tokens in [("mlp_downsample", 256), ("mlp_downsample_3x3_fix", 121)]:
        model = nvila("dynamic_s2", projector, s2_scales="448,896,1344")
        model.vision_tower.config.patch_size = 14
        assert model.tile_side(448) ** 2 == tokens
        model.image_processor = vlmlib.ImageProcessor(448, 448, 448, (0.5,) * 3, (0.5,) * 3)
        (medium,) = model.prepare([noise(640, 480)])
        assert len(medium.pixels) == 1 + 4 + 12 and medium.block == (3, 4)
        assert medium.length == 12 * tokens + 1


@in_all_modes
def test_prompt_tokens_count_what_is_fed(mode):
    """The original counts ids, not positions."""
    model = shared(mode)
    parts = [noise(90, 50), frames(), QUESTION]
    fed = []
    hook = model.get_llm().model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        *_, last = ask(model, parts)
    finally:
        hook.remove()
    n = len(ids_of(ask(model, parts, trace=0)))
    assert fed == [last["usage"]["prompt_tokens"]] + [1] * (n - 1)
    assert last["timing"]["context_tokens"] == fed[0]
    assert last["usage"]["completion_tokens"] == n


# ---- preprocessing ----


def test_modes_of_one_picture():
    picture = noise(90, 50)
    (resized,) = shared("resize").prepare([picture])
    array = torch.from_numpy(np.array(picture.resize((TILE, TILE), 3))).permute(2, 0, 1)
    expected = array / 255 * 2 - 1  # stretched, nothing is cut off
    torch.testing.assert_close(resized.pixels[0], expected, atol=1e-5, rtol=0)

    (padded,) = shared("pad").prepare([picture])
    square = vlmlib.pad_to_square(picture, (127, 127, 127))
    (expected,) = shared("resize").prepare([square])
    assert torch.equal(padded.pixels, expected.pixels)

    tiles = shared("dynamic").prepare([picture])
    pictures = vlmlib.dynamic_preprocess(picture, 1, 12, TILE, use_thumbnail=True)
    assert len(tiles) == len(pictures) == 9
    for tile, expected in zip(tiles, pictures, strict=True):
        assert torch.equal(tile.pixels, shared("resize").prepare([expected])[0].pixels)
    assert torch.equal(tiles[-1].pixels, resized.pixels), "the whole picture comes last"

    (scaled,) = shared("dynamic_s2").prepare([picture])
    pictures, block = vlmlib.dynamic_s2_preprocess(picture, [28, 56, 84], 12, TILE)
    assert scaled.block == block and len(scaled.pixels) == len(pictures)
    assert torch.equal(scaled.pixels[0], resized.pixels[0]), "the first scale is one tile"
    for tile, expected in zip(scaled.pixels, pictures, strict=True):
        assert torch.equal(tile, shared("resize").prepare([expected])[0].pixels[0])


@in_all_modes
def test_several_pictures_are_one_tile_each(mode):
    model = shared(mode)
    media = model.prepare([noise(90, 50), noise(50, 90)])
    assert [len(m.pixels) for m in media] == [1, 1] and media[0].block is None
    expected = shared("pad" if mode == "pad" else "resize").prepare([noise(90, 50)])
    assert torch.equal(media[0].pixels, expected[0].pixels)
    beside_a_clip = model.prepare([frames(), noise(90, 50)])
    assert beside_a_clip[0].kind == "video"
    alone = model.prepare([noise(90, 50)])
    assert [m.key for m in beside_a_clip[1:]] == [m.key for m in alone], "a clip is no picture"


def test_frames_of_a_clip():
    model = shared()
    (medium,) = model.prepare([Video(CLIP, num_frames=5)])
    n = 0

    def remember(count, fps):
        nonlocal n
        n = count
        return [0]

    vlmlib.load_video(CLIP, remember)
    indices = [round(i) for i in np.linspace(0, n - 1, 5)]
    expected = [model.prepare([f])[0].pixels[0] for f in vlmlib.load_video(CLIP, indices)]
    assert torch.equal(medium.pixels, torch.stack(expected))
    assert medium.kind == "video"
    assert len(model.prepare([Video(CLIP)])[0].pixels) == model.config.num_video_frames
    listed = [noise(30, 30, i) for i in range(7)]
    (medium,) = model.prepare([Video(listed, num_frames=3)])
    expected = [model.prepare([listed[i]])[0].pixels[0] for i in (0, 3, 6)]
    assert torch.equal(medium.pixels, torch.stack(expected))
    assert len(model.prepare([Video(listed[:1])])[0].pixels) == 4, "a short clip repeats frames"
    (part,) = model.prepare([Video(CLIP, num_frames=2, bound=(0.0, 1e9))])
    (whole,) = model.prepare([Video(CLIP, num_frames=2)])
    assert part.key == whole.key
    with pytest.raises(VideoError):
        model.prepare([Video(CLIP, bound=(1e6, 2e6))])
    with pytest.raises(VideoError, match="from 1 to 65536, got 0"):
        model.prepare([Video(CLIP, num_frames=0)])
    with pytest.raises(VideoError, match="must not be empty"):
        model.prepare([Video([])])


# ---- what stands around features ----


@torch.inference_mode()
def test_a_line_break_follows_every_picture_and_frame():
    model = shared()
    newline = words(model, "\n")
    assert newline.shape == (1, 48)
    (picture,) = model.prepare([noise(30, 30)])
    (features,) = model.get_mm_projector()(model.get_vision_tower()(picture.pixels))
    assert torch.equal(model.encode(picture), torch.cat([features, newline]))
    (clip,) = model.prepare([frames()])
    each = model.get_mm_projector()(model.get_vision_tower()(clip.pixels))
    expected = torch.cat([torch.cat([f, newline]) for f in each])
    torch.testing.assert_close(model.encode(clip), expected, atol=1e-6, rtol=0)


@torch.inference_mode()
def test_start_tokens():
    spec = '{"_target_": "llava.model.encoders.%s", "start_tokens": "is re", "end_tokens": null}'
    model = shared(
        image_encoder=spec % "BasicImageEncoder", video_encoder=spec % "BasicVideoEncoder"
    )
    start = words(model, "is re")
    assert len(start) > 1
    for medium in model.prepare([noise(30, 30), frames()]):
        encoded = model.encode(medium)
        assert len(encoded) == medium.length == len(medium.pixels) * (4 + len(start))
        for frame in encoded.split(4 + len(start)):
            assert torch.equal(frame[: len(start)], start)


@torch.inference_mode()
def test_tsp_pools_frames_rows_and_columns():
    model = shared(video_encoder=TSP)
    (clip,) = model.prepare([frames()])
    x = model.get_mm_projector()(model.get_vision_tower()(clip.pixels)).reshape(4, 2, 2, -1)
    expected = []
    for pool in [(2, 1, 1), (4, 2, 1)]:
        for t in range(0, 4, pool[0]):
            expected.append(words(model, "<"))
            for h, w in itertools.product(range(0, 2, pool[1]), range(0, 2, pool[2])):
                block = x[t : t + pool[0], h : h + pool[1], w : w + pool[2]]
                expected.append(block.mean((0, 1, 2))[None])
            expected.append(words(model, "at"))
        expected.append(words(model, "is re"))
    expected = torch.cat(expected)
    assert clip.length == len(expected)
    torch.testing.assert_close(model.encode(clip), expected, atol=1e-5, rtol=0)


def test_pools_must_divide():
    with pytest.raises(ShapeError, match=r"3 frames of 2 x 2 .* pools \(2, 1, 1\)"):
        shared(video_encoder=TSP).prepare([Video([noise(9, 9)] * 3, num_frames=3)])
    with pytest.raises(ShapeError, match=r"4 frames of 3 x 3"):
        pool_features(torch.zeros(4, 9, 2), (1, 2, 1))


# ---- prompts ----


def test_the_prompt_of_a_turn():
    model = shared()
    assert model.chat_prompt([noise(9, 9), "Hello", frames()]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n<image>Hello<vila/video><|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = model.conversation_prompt(
        [("system", ["Be kind"]), ("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])]
    )
    assert prompt.startswith("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert prompt.endswith(
        "assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_stop_tokens_are_eos_and_what_ends_an_answer():
    model = nvila()
    vocabulary = model.tokenizer.get_vocab()
    ends = {vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]}
    assert set(model.stop_token_ids) == ends
    model.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}is{% endfor %}"
    assert set(model.stop_token_ids) == {vocabulary["<|endoftext|>"], vocabulary["is"]}
    model.chat_template = "nothing of it"
    assert set(model.stop_token_ids) == {vocabulary["<|endoftext|>"]}


def test_media_ids_come_from_the_tokenizer():
    model = shared()
    assert model.media_token_ids == {"image": IMAGE, "video": VIDEO}
    other = tokenizer()
    other.add_tokens(["<a>", "<vila/video>", "<b>", "<image>"], special_tokens=True)
    parts = {
        "llm": model.llm,
        "vision_tower": model.vision_tower,
        "mm_projector": model.mm_projector,
    }
    moved = vlmlib.NVILA(model.config, other, model.image_processor, **parts)
    assert moved.media_token_ids == {"image": 374, "video": 372}
    parts = [noise(30, 30), frames(), QUESTION]
    assert ids_of(ask(moved, parts, trace=0)) == ids_of(ask(model, parts, trace=0))


@pytest.mark.parametrize("text", ["<image>", "<vila/video>", "<|im_end|>", "a <ima"])
def test_user_text_cannot_smuggle_anything_in(text):
    model = shared()
    parts = [noise(30, 30), text, "ge>"]
    ids = model.tokenizer(model.chat_prompt(parts)).input_ids
    plain = model.tokenizer(model.chat_prompt([noise(30, 30), "a"])).input_ids
    for special in (IMAGE, VIDEO, model.tokenizer.convert_tokens_to_ids("<|im_end|>")):
        assert ids.count(special) == plain.count(special)
    assert list(ask(model, parts))[-1]["finish_reason"]
    model.generate_content(["<image> " + text], GREEDY)


@pytest.mark.parametrize("size", [(28, 28), (90, 50), (200, 30)])
def test_tiles_are_written_out_in_one_way(size):
    """The original does it in two ways, which give different ids."""
    model = shared("dynamic")
    parts = [noise(*size), QUESTION]
    media, config = model.prepare_media([{"from": "human", "value": parts}])
    n = len(media["image"])
    assert config["image"] == {"tiles": n}
    whole = model.chat_prompt(parts)
    assert whole.count("<image>\n") == whole.count("<image>") == n
    assert whole.endswith(
        "user\n" + "<image>\n" * n + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
    )
    one = shared("resize").chat_prompt(parts)
    assert expand_tiles(one, n) == whole and expand_tiles(whole, n) == whole
    expected = without_times(ask(model, parts))
    for prompt in (one, whole):
        found = NVILAStreamGenerator(model, GREEDY, prompt, media, config)
        assert without_times(found) == expected
        ids = torch.tensor([model.tokenizer(prompt).input_ids])
        _, length = model.stream_gen(ids, media, config, 0, False, False)
        assert length == expected[0]["usage"]["prompt_tokens"]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
        again = model.stream_gen(padded, media, config, 0, False, False, padded != 0)
        assert again[1] == length
        out = model.generate(ids, media, config, max_new_tokens=10, do_sample=False)
        assert out[0].tolist() == ids_of(ask(model, parts, trace=0))


def test_prepare_media():
    model = shared("dynamic_s2")
    picture, clip = noise(90, 50), frames()
    conversation = [
        {"from": "human", "value": [picture, clip, QUESTION]},
        {"from": "gpt", "value": "nothing"},
        {"from": "human", "value": "Really?"},
    ]
    before = copy.copy(conversation), list(conversation[0]["value"])
    settings = copy.deepcopy(model.config)
    media, config = model.prepare_media(conversation)
    assert (conversation, conversation[0]["value"]) == before, "the caller's conversation stays"
    assert model.config == settings, "and so does the configuration"
    first, second = model.prepare([picture, clip])
    assert len(media["image"]) == 17 and len(media["video"]) == 1
    assert config == {"image": {"block_sizes": [(3, 4)]}, "video": {}}
    assert torch.equal(torch.stack(media["image"]), first.pixels)
    assert torch.equal(media["video"][0], second.pixels)
    for read in (config, json.loads(json.dumps(config))):
        assert [m.key for m in model.as_media(media, read)] == [first.key, second.key]
    several = shared("dynamic_s2").prepare_media(
        [{"from": "human", "value": [picture]}, {"from": "human", "value": [picture]}]
    )
    assert len(several[0]["image"]) == 2 and several[1]["image"] == {}
    assert shared().prepare_media([{"from": "human", "value": "Hi"}])[0] == {}


# ---- media take their places ----


def interleaved(model):
    """Two clips and three pictures between texts: parts, ids, and what stands where."""
    parts = [
        frames(4, 1),
        "Describe ",
        noise(30, 20),
        noise(20, 50),
        " the red",
        frames(4, 5),
        "circle",
        noise(9, 9),
    ]
    prompt = model.chat_prompt(parts)
    ids = model.tokenizer(prompt).input_ids
    media = iter(model.prepare([p for p in parts if not isinstance(p, str)]))
    with torch.inference_mode():
        pieces = [
            model.encode(next(media)) if i in (IMAGE, VIDEO) else model.embed(torch.tensor([i]))
            for i in ids
        ]
    return parts, ids, torch.cat(pieces)


@pytest.mark.parametrize("mode", ["resize", "dynamic", "dynamic_s2"])
@torch.inference_mode()
def test_interleaved_media_land_at_their_positions(mode):
    model = shared(mode, video_encoder=TSP)  # 29 positions a clip, 5 a picture
    parts, ids, expected = interleaved(model)
    assert ids.count(IMAGE) == 3 and ids.count(VIDEO) == 2
    by_kind = model.prepare_media([{"from": "human", "value": parts}])
    embeds, labels, mask = model._embed(torch.tensor([ids]), *by_kind, None, None)
    torch.testing.assert_close(embeds[0], expected, atol=1e-6, rtol=0)
    assert mask.all() and mask.shape == labels.shape == embeds.shape[:2]
    assert (labels == IGNORE_INDEX).all()
    logits = model.get_llm()(inputs_embeds=expected[None]).logits[:, -1]
    turn = model.turn(model.chat_prompt(parts), dict(by_kind[0]))
    assert (turn.prefill() - logits).abs().max() < 1e-5
    assert turn.prompt_tokens == len(expected)


@pytest.mark.parametrize("picture_first", [True, False])
@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
@torch.inference_mode()
def test_one_cut_picture_beside_a_clip(mode, picture_first):
    """The sequence is put together by hand, from tiles that are cut and encoded by hand."""
    model = shared(mode, video_encoder=TSP)
    picture, clip = noise(90, 50), frames()
    parts = [picture, "left ", clip, "right?"] if picture_first else [clip, "a ", picture, "red"]
    if mode == "dynamic":
        tiles = vlmlib.dynamic_preprocess(picture, 1, 12, TILE, use_thumbnail=True)
        blocks, written = None, "<image>\n" * 9
    else:
        tiles, block = vlmlib.dynamic_s2_preprocess(picture, [28, 56, 84], 12, TILE)
        blocks, written = [block], "<image>"
    images = torch.stack([shared().prepare([tile])[0].pixels[0] for tile in tiles])
    features = model.encode_images(images, blocks)
    assert [len(f) for f in features] == ([4] * 9 if mode == "dynamic" else [48])
    (film,) = shared(video_encoder=TSP).prepare([clip])

    prompt = model.chat_prompt(parts)
    placeholders = {id(picture): written, id(clip): "<vila/video>"}
    said = "".join(placeholders.get(id(part), part) for part in parts)
    assert f"<|im_start|>user\n{said}<|im_end|>" in prompt
    queue, expected = iter(features), []
    for piece in re.split("(<image>|<vila/video>)", prompt):
        if piece == "<image>":
            expected += [next(queue), words(model, "\n")]
        else:
            is_clip = piece == "<vila/video>"
            expected.append(model.encode(film) if is_clip else words(model, piece))
    expected = torch.cat(expected)

    media, config = model.prepare_media([{"from": "human", "value": parts}])
    ids = torch.tensor([model.tokenizer(prompt).input_ids])
    embeds, _, _ = model._embed(ids, media, config, None, None)
    torch.testing.assert_close(embeds[0], expected, atol=1e-5, rtol=0)
    logits = model.get_llm()(inputs_embeds=expected[None]).logits[:, -1]
    for given in (model.prepare([p for p in parts if not isinstance(p, str)]), media):
        turn = model.turn(prompt, model.as_media(given, config))
        assert turn.prompt_tokens == len(expected)
        assert (turn.prefill() - logits).abs().max() < 1e-5


@torch.inference_mode()
def test_pictures_of_different_lengths_in_one_prompt():
    model = shared("dynamic_s2")
    sizes = [(90, 30), (30, 30), (60, 60)]
    media = [model.prepare([noise(*size, seed=i)])[0] for i, size in enumerate(sizes)]
    assert len({m.length for m in media}) == 2
    ids = [5, IMAGE, 6, IMAGE, IMAGE, 7]
    embeds, labels, _ = model._embed(
        torch.tensor([ids]),
        {"image": [t for m in media for t in m.pixels]},
        {"image": {"block_sizes": [m.block for m in media]}},
        torch.tensor([ids]),
        None,
    )
    queue = iter(media)
    pieces = [
        model.encode(next(queue)) if i == IMAGE else model.embed(torch.tensor([i])) for i in ids
    ]
    torch.testing.assert_close(embeds[0], torch.cat(pieces), atol=1e-5, rtol=0)
    text = labels[0][labels[0] != IGNORE_INDEX]
    assert text.tolist() == [5, 6, 7]
    assert (labels[0] == IGNORE_INDEX).sum() == sum(m.length for m in media)


def as_published(pictures, clips=()):
    """Media and media_config of pictures and clips, as `prepare_media` makes them."""
    media = {"image": [tile for m in pictures for tile in m.pixels], "video": list(clips)}
    return media, {"image": {"block_sizes": [m.block for m in pictures]}}


def batch(model, side: str):
    """Three prompts with 0, 1 and 2 pictures, padded -> ids, mask, media, their configuration, and
    (ids, media, configuration) of the single prompts.
    """
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, IMAGE, 21], [30, IMAGE, 31, VIDEO, IMAGE]]
    sizes = [(90, 30), (30, 30), (50, 90)]
    pictures = [model.prepare([noise(*size, seed=i)])[0] for i, size in enumerate(sizes)]
    clip = pixels(4, seed=5)
    n = max(map(len, rows))
    ids, mask = (
        torch.full((3, n), IMAGE),
        torch.zeros(3, n, dtype=torch.long),
    )  # padded with <image>!
    for k, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(n - len(row), n)
        ids[k, where], mask[k, where] = torch.tensor(row), 1
    singles = [
        (rows[0], {}, {}),
        (rows[1], *as_published(pictures[:1])),
        (rows[2], *as_published(pictures[1:], [clip])),
    ]
    return ids, mask, *as_published(pictures, [clip]), singles


@pytest.mark.parametrize("mode", ["resize", "dynamic_s2"])
@pytest.mark.parametrize("out", ["left", "right", None])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.inference_mode()
def test_a_padded_batch_equals_its_prompts(side, out, mode):
    """The original drops padding from the embeddings and not from the ids they are found by."""
    model = shared(mode)
    ids, mask, media, config, singles = batch(model, side)
    n_tiles = len(media["image"])
    assert n_tiles == {"resize": 3, "dynamic_s2": 17 + 14 + 15}[mode]
    labels = torch.where(mask.bool(), ids, 99)
    kept = ids.clone(), mask.clone(), labels.clone()
    embeds, new_labels, new_mask = model._embed(ids, media, config, labels, mask, padding_side=out)
    assert all(torch.equal(a, b) for a, b in zip(kept, (ids, mask, labels), strict=True))
    assert len(media["image"]) == n_tiles and len(media["video"]) == 1, "what was given stays"
    for k, (row, *its) in enumerate(singles):
        row = torch.tensor([row])
        alone, lone_labels, _ = model._embed(row, *its, row, None)
        n = alone.shape[1]
        where = slice(-n, None) if out == "left" else slice(0, n)
        assert new_mask[k].sum() == n and new_mask[k, where].all()
        torch.testing.assert_close(embeds[k, where], alone[0], atol=1e-6, rtol=0)
        assert torch.equal(new_labels[k, where], lone_labels[0])
    assert (new_labels[~new_mask] == IGNORE_INDEX).all()


@pytest.mark.parametrize("mode", ["resize", "dynamic_s2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_from_a_padded_batch(side, mode):
    model = shared(mode)
    ids, mask, media, config, singles = batch(model, side)
    options = {"max_new_tokens": 8, "do_sample": False}
    together = model.generate(ids, media, config, mask, **options)
    for k, (row, *its) in enumerate(singles):
        alone = model.generate(torch.tensor([row]), *its, **options)
        assert together[k, : alone.shape[1]].tolist() == alone[0].tolist()
        prompt = model.tokenizer.decode(row)
        if model.tokenizer(prompt).input_ids == row:
            params = GREEDY.but(n_predict=8)
            assert (
                ids_of(NVILAStreamGenerator(model, params, prompt, *its, trace=0))
                == alone[0].tolist()
            )
    assert len({tuple(row.tolist()) for row in together}) == 3


@pytest.mark.parametrize(
    ("ids", "pictures", "clips", "words"),
    [
        ([5, IMAGE, IMAGE], 1, 0, "2 <image>.*1 image"),
        ([5, IMAGE], 2, 0, "1 <image>.*2 image"),
        ([5], 1, 0, "0 <image>.*1 image"),
        ([5, VIDEO], 0, 0, "1 <vila/video>.*0 vila/video"),
        ([5, IMAGE], 0, 1, "1 <image>.*0 image"),
        ([5, IMAGE, VIDEO], 1, 2, "1 <vila/video>.*2 vila/video"),
    ],
)
def test_placeholders_and_media_must_agree(ids, pictures, clips, words):
    model = shared()
    media = {"image": list(pixels(max(pictures, 1)))[:pictures], "video": [pixels(4)] * clips}
    row = torch.tensor([ids])
    prompt = model.tokenizer.decode(ids)
    for call in (
        lambda: model._embed(row, media, {}, None, None),
        lambda: model.generate(row, media),
        lambda: model.stream_gen(row, media, {}, 0, False, True),
        lambda: NVILAStreamGenerator(model, GREEDY, prompt, media),
    ):
        with pytest.raises(PlaceholderError, match=words) as caught:
            call()
        assert isinstance(caught.value, ValueError)


def test_embed_limits():
    model = shared()
    ids = torch.full((1, CONTEXT + 3), 5)
    with pytest.raises(ContextLengthError, match=f"{CONTEXT + 3}.*{CONTEXT}"):
        model._embed(ids, None, None, None, None)
    embeds, labels, mask = model._embed(ids, None, None, None, None, truncate=True)
    assert embeds.shape[1] == labels.shape[1] == mask.shape[1] == CONTEXT
    with pytest.raises(ShapeError, match=r"ids are \(1, 2\), the mask is \(1, 3\)"):
        model._embed(torch.tensor([[5, 6]]), None, None, None, torch.ones(1, 3))
    one, labels, mask = model._embed(torch.tensor([[5], [6]]), None, None, None, None)
    assert torch.equal(one, model.embed(torch.tensor([[5], [6]])))
    assert mask.all() and (labels == IGNORE_INDEX).all()


def test_media_that_are_none():
    model, s2 = shared(), shared("dynamic_s2")
    for media, words in [
        ({"sound": []}, r"under 'image' and 'video', got \['sound'\]"),
        ({"image": [torch.zeros(28, 28)]}, r"expected \(3, h, w\)"),
        ({"image": [torch.zeros(2, 3, 28, 28)]}, "2 tiles, but a picture with block None has 1"),
        ({"image": [torch.zeros(3, 28, 21)]}, "of squares"),
        ({"video": [torch.zeros(3, 28, 28)]}, r"expected \(t, 3, h, w\) pixels"),
    ]:
        with pytest.raises(ShapeError, match=words):
            model.as_media(media)
    with pytest.raises(ShapeError, match=r"3 tiles, but block_sizes \[\(3, 4\)\] need \[17\]"):
        s2.as_media({"image": list(pixels(3))}, {"image": {"block_sizes": [(3, 4)]}})
    with pytest.raises(ValueError, match="two names for one thing"):
        NVILAStreamGenerator(model, GREEDY, "<image>", pixels(), image_tensor=pixels())


def test_features_are_as_many_as_the_medium_says():
    medium = vlmlib.Medium(pixels(), 3)
    with pytest.raises(ShapeError, match="a medium of 3 positions has 5 features"):
        next(shared().stream_prompt("<image>", [medium], GREEDY))


def test_two_models_of_one_configuration():
    """Each has a copy, which tells what its own parts are."""
    settings = config()
    one = vlmlib.NVILA(settings, tokenizer(), shared().image_processor)
    linear = shared("resize", "linear").mm_projector
    other = vlmlib.NVILA(settings, tokenizer(), shared().image_processor, mm_projector=linear)
    kinds = [model.config.mm_projector_cfg["mm_projector_type"] for model in (one, other)]
    assert kinds == ["mlp_downsample", "linear"] and settings == config()


# ---- streams ----


PARTS = [
    [QUESTION],
    [noise(90, 50), QUESTION],
    ["Left ", noise(20, 40), " or right ", noise(50, 20, 3), "?"],
    [frames(), "Describe ", noise(90, 50)],
]


@in_all_modes
@pytest.mark.parametrize(
    ("projector", "changes"),
    [
        ("mlp_downsample", {}),
        ("mlp_downsample_3x3_fix", {}),
        ("mlp2x_gelu", {}),
        ("mlp_downsample", {"video_encoder": TSP}),
    ],
    ids=["mlp_downsample", "mlp_downsample_3x3_fix", "mlp2x_gelu", "pooled clips"],
)
@torch.inference_mode()
def test_cached_steps_equal_the_whole_sequence_without_a_cache(projector, changes, mode):
    model = shared(mode, projector, **changes)
    for parts in PARTS:
        media = model.prepare([p for p in parts if not isinstance(p, str)])
        turn = model.turn(model.chat_prompt(parts), media)
        by_kind = model.prepare_media([{"from": "human", "value": parts}])
        ids = torch.tensor([model.tokenizer(model.chat_prompt(parts)).input_ids])
        whole, _, _ = model._embed(ids, *by_kind, None, None)
        logits, expected = turn.prefill(), []
        for _ in range(GREEDY.n_predict):
            full = model.get_llm()(inputs_embeds=whole, use_cache=False).logits[:, -1]
            assert (logits - full).abs().max() < 1e-5
            token = full.argmax(dim=-1, keepdim=True)
            expected.append(int(token))
            whole = torch.cat([whole, model.embed(token)], dim=1)
            logits = turn.step(token)
        found = ids_of(ask(model, parts, trace=0))
        assert found == expected[: len(found)]
        assert len(found) == len(expected) or found[-1] in model.stop_token_ids
        streamed = ids_of(vlmlib.stream(model, parts, n_predict=GREEDY.n_predict, trace=0))
        assert streamed == found


def test_answers_differ():
    """What is equal above is not equal because nothing matters."""
    answers = {
        tuple(ids_of(ask(shared(mode), parts, trace=0))) for mode in MODES for parts in PARTS
    }
    assert len(answers) > 10


@pytest.mark.parametrize("projector", ["mlp_downsample", "mlp_downsample_3x3_fix"])
@in_all_modes
@torch.inference_mode()
def test_later_turns_equal_the_whole_transcript(mode, projector, monkeypatch):
    """Several turns, pictures and a clip in some of them; a second picture changes the first."""
    model = shared(mode, projector)
    chat = Chat(model)
    turns = [
        [noise(90, 50), QUESTION],
        ["And now?"],
        [frames(), "Describe"],
        ["left?"],
        [noise(50, 60, 3), "red circle"],
        ["How many?"],
    ]
    fed = 0
    for k, parts in enumerate(turns):
        prompt, media = transcript(model, [*chat.messages, ("user", tuple(parts))])
        expected = model.turn(prompt, media).prefill()
        copied = copy.deepcopy(chat.cache)
        turn = model.turn(prompt, media, start_pos=len(copied), cache=copied)
        assert (turn.prefill() - expected).abs().max() < 1e-4
        alone = list(model.stream_prompt(prompt, media, GREEDY, lstrip=True, trace=0))
        quick = list(chat.ask(parts, GREEDY, trace=0))
        assert ids_of(quick) == ids_of(alone)
        last = quick[-1]
        assert last["text"] == alone[-1]["text"] and last["usage"] == alone[-1]["usage"]
        timing = last["timing"]
        fed += timing["context_tokens"]
        if k in (1, 3, 5) or (k == 4 and mode in ("resize", "pad")):
            assert timing["context_tokens"] < 60, "the history is not read again"
        if k == 4 and mode.startswith("dynamic"):
            assert timing["reused_tokens"] < 40, "both pictures are one tile now"
    assert fed < sum(len(chat.cache) for _ in turns)


def test_a_changed_picture_is_noticed():
    model = shared("dynamic_s2")
    cache = model.new_cache()
    prompt = model.chat_prompt([noise(90, 50), QUESTION])
    (medium,) = model.prepare([noise(90, 50)])
    list(model.stream_prompt(prompt, [medium], GREEDY, cache=cache))
    (other,) = model.prepare([noise(90, 50, seed=1)])
    again = model.turn(prompt, [medium], start_pos=len(cache), cache=copy.deepcopy(cache))
    assert again.reused_tokens == again.prompt_tokens - 1
    turned = model.medium(medium.pixels, block=(4, 3))
    changed = model.turn(prompt, [turned], start_pos=len(cache), cache=copy.deepcopy(cache))
    assert changed.reused_tokens < 30, "the same tiles in another order of rows"
    changed = model.turn(prompt, [other], start_pos=len(cache), cache=cache)
    assert changed.reused_tokens == model.prompt_ids(prompt).index(vlmlib.IMAGE_TOKEN_INDEX)


@pytest.mark.parametrize(
    ("at", "changed"),
    [
        (0, ("user", (noise(90, 50, 1), QUESTION))),
        (0, ("user", (noise(90, 50), "What is that?"))),
        (1, ("assistant", ("nothing",))),
        (2, ("user", (frames(seed=50), "Describe"))),
        (2, ("user", (frames(), "Describe it"))),
        (3, ("assistant", ("nothing",))),
    ],
    ids=["picture", "question", "answer", "clip", "later question", "later answer"],
)
@pytest.mark.parametrize("mode", ["resize", "dynamic", "dynamic_s2"])
def test_a_changed_history_is_read_again(mode, at, changed):
    chat = Chat(shared(mode, video_encoder=TSP))
    for parts in ([noise(90, 50), QUESTION], [frames(), "Describe"]):
        list(chat.ask(parts, GREEDY))
    messages = list(chat.messages)
    messages[at] = changed
    assert_read_again(chat, messages)


def test_repetition_penalty_by_hand(monkeypatch):
    """Ids of prompt and answer are pushed down; those that stand for a picture or clip are not."""
    model = shared(video_encoder=TSP, seed=1)
    parts = [noise(30, 20), "Left ", frames(), "What is this?"]
    prompt, media = transcript(model, [("user", parts)])
    text_ids = [i for i in model.tokenizer(prompt).input_ids if i not in (IMAGE, VIDEO)]
    expected = penalised_ids(model.turn(prompt, media), text_ids, 1.7, 10)
    seen = watch_seen_ids(monkeypatch)
    ids = ids_of(ask(model, parts, GREEDY.but(repeat_penalty=1.7), trace=0))
    assert ids == expected
    assert seen == [text_ids + expected[:k] for k in range(10)]
    assert ids != ids_of(ask(model, parts, trace=0))


@pytest.mark.parametrize("parts", PARTS)
def test_generate_content_is_the_streams_text(parts):
    model = shared("dynamic")
    text = list(ask(model, parts))[-1]["text"].strip()
    assert model.generate_content(parts, GREEDY) == text
    assert model.generate_content(parts, GREEDY, quant_llm=False) == text
    greedy = {"temp": 0.0, "repeat_penalty": 1.0, "top_p": 1.0, "top_k": 0, "n_predict": 10}
    assert model.generate_content(parts, greedy) == text
    assert model.generate_content(parts, {"n_predict": 10}) == text
    config = GenerationConfig(max_new_tokens=10, do_sample=False)
    before = config.to_dict()
    assert model.generate_content(parts, config) == text
    assert config.to_dict() == before, "the original switches sampling off in it"
    assert model.generate_content(parts).startswith(text[:3])


def test_generate_content_takes_one_text():
    model = shared()
    assert model.generate_content("Hello", GREEDY) == model.generate_content(["Hello"], GREEDY)
    sampled = GenParams(temp=1.5, seed=3, n_predict=10)
    assert model.generate_content("Hello", sampled) == model.generate_content("Hello", sampled)
    with pytest.raises(ContextLengthError):  # the original tries again, and again fails
        model.generate_content("x" * CONTEXT * 2, GenerationConfig(do_sample=True))


def test_benchmark(monkeypatch):
    calls, forward = [], SiglipTower.forward
    monkeypatch.setattr(
        SiglipTower, "forward", lambda tower, x: calls.append(1) or forward(tower, x)
    )
    found = shared("dynamic").benchmark(PARTS[1], repeats=2, n_predict=4)
    assert len(calls) == 2 * (9 + 9), "each time for itself, and for each stream's first token"
    assert set(found) == {"prompt_tokens", "encode_time", "context_time", "step_time"}
    assert (
        found["prompt_tokens"]
        == list(ask(shared("dynamic"), PARTS[1]))[0]["usage"]["prompt_tokens"]
    )
    assert all(v > 0 for v in found.values())
    assert shared().benchmark("Hi", quant_llm=False, repeats=1, n_predict=1)["step_time"] == 0


def by_hand(model, parts, n, quant_llm=True, **options):
    """stream_gen, step by step, as TinyChat's generator calls it."""
    media, config = model.prepare_media([{"from": "human", "value": parts}])
    ids, start, out = torch.tensor([model.tokenizer(model.chat_prompt(parts)).input_ids]), 0, []
    for _ in range(n):
        logits, length = model.stream_gen(ids, media, config, start, False, quant_llm, **options)
        assert logits.shape == (1, 1, 380)
        start += length
        ids, media, config = logits.argmax(dim=-1), None, None
        out.append(int(ids))
        yield out


@pytest.mark.parametrize("quant_llm", [True, False])
@pytest.mark.parametrize("parts", PARTS)
def test_stream_gen_step_by_step(parts, quant_llm):
    """quant_llm=False calls a function that is not there in the original."""
    model = shared("dynamic_s2")
    *_, found = by_hand(model, parts, 10, quant_llm)
    expected = ids_of(ask(model, parts, trace=0, quant_llm=quant_llm))
    assert found[: len(expected)] == expected


def test_stream_gen_with_caches_of_ones_own():
    model = shared()
    alone = [list(by_hand(model, parts, 6))[-1] for parts in PARTS]
    together = [by_hand(model, parts, 6, cache=model.new_cache()) for parts in PARTS]
    *_, last = zip(*together, strict=True)
    assert list(last) == alone
    first = by_hand(model, PARTS[0], 6)
    next(first), next(first)
    assert list(ask(model, PARTS[1])), "a stream has a cache of its own"
    assert list(first)[-1] == alone[0]


def test_stream_gen_checks():
    model = nvila()
    one = torch.tensor([[5]])
    with pytest.raises(CacheError, match="outside of the cache, which holds 0"):
        model.stream_gen(one, None, None, 3, True, True)
    with pytest.raises(ShapeError, match="one sequence, got 2"):
        model.stream_gen(one.repeat(2, 1), None, None, 0, True, True)
    padded = torch.tensor([[7, 7, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1]])
    masked, length = model.stream_gen(padded, None, None, 0, False, True, mask)
    plain, _ = model.stream_gen(padded[:, 2:], None, None, 0, False, True)
    assert length == 2 and torch.equal(masked, plain)
    chunk, n = model.stream_gen(torch.tensor([[8, 9, 10]]), None, None, 2, True, True)
    whole, _ = model.stream_gen(torch.tensor([[5, 6, 8, 9, 10]]), None, None, 0, False, True)
    assert n == 3 and (chunk - whole).abs().max() < 1e-5


def test_contract_of_the_chunks():
    model = shared("dynamic_s2")
    parts = PARTS[1]
    for n in (0, 1, 5):
        for interval in (1, 2, 3):
            params = GREEDY.but(n_predict=n, top_k=-1)
            chunks = list(ask(model, parts, params, stream_interval=interval, echo=True))
            last = chunks[-1]
            assert last["finish_reason"] == "length" and last["usage"]["completion_tokens"] == n
            assert all(c["text"].startswith(model.chat_prompt(parts)) for c in chunks)
            assert "".join(c["delta"] for c in chunks) == last["text"]
            assert len(last["timing"]["generation_time_list"]) == max(n - 1, 0)
    ids = ids_of(ask(model, parts, trace=0))
    stops = [ids[4]]
    n = ids.index(ids[4]) + 1
    last = list(ask(model, parts, GREEDY.but(n_predict=n), stop_token_ids=stops))[-1]
    assert (last["finish_reason"], last["usage"]["completion_tokens"]) == ("stop", n)
    assert stops == [ids[4]], "the original appends to it"
    signature = inspect.signature(NVILAStreamGenerator).parameters
    names = (
        "model, gen_params, input, media, media_cfg, start_pos, device, stream_interval, echo, "
        "stop_token_ids, image_tensor, chunk_prefilling, quant_llm, cache, lstrip, trace"
    )
    assert ", ".join(signature) == names
    assert not signature["stop_token_ids"].default and signature["stream_interval"].default == 2


def test_the_end_of_a_turn_ends_the_answer():
    """Whatever path an answer takes, and though the EOS is another token."""
    model = nvila()
    ids = ids_of(ask(model, PARTS[1], trace=0))
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = model.get_lm_head().weight  # from now on the fourth token is the end of a turn
    n = ids.index(ids[3]) + 1
    with torch.no_grad():
        head[[end, ids[3]]] = head[[ids[3], end]]
    chunks = list(ask(model, PARTS[1], trace=0))
    assert ids_of(chunks) == [*ids[: n - 1], end] and chunks[-1]["finish_reason"] == "stop"
    assert "<|im_end|>" not in chunks[-1]["text"]
    streamed = list(vlmlib.stream(model, PARTS[1], n_predict=10, trace=0))
    assert ids_of(streamed) == ids_of(chunks)
    config = GenerationConfig(max_new_tokens=10, do_sample=False)
    assert model.generate_content(PARTS[1], config) == chunks[-1]["text"].strip()


def test_interleaved_streams_equal_lone_ones():
    model = shared("dynamic")
    sampled = GenParams(temp=1.2, n_predict=10, seed=3)
    requests = [(parts, params) for parts in PARTS for params in (GREEDY, sampled)]
    alone = [without_times(ask(model, *r)) for r in requests]
    together = [[] for _ in requests]
    for chunks in itertools.zip_longest(*(ask(model, *r) for r in requests)):
        for out, chunk in zip(together, chunks, strict=True):
            out += [chunk] if chunk else []
    assert [without_times(c) for c in together] == alone


def test_media_are_encoded_once_and_kept():
    model = shared()
    calls = []
    hook = model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    try:
        parts = PARTS[2]
        media, config = model.prepare_media([{"from": "human", "value": parts}])
        stream = NVILAStreamGenerator(model, GREEDY, model.chat_prompt(parts), media, config)
        assert not calls, "nothing is computed before the first chunk is asked for"
        list(stream)
        assert len(calls) == 2 and len(media["image"]) == 2
    finally:
        hook.remove()


def test_forms_of_media():
    model = shared()
    prompt = model.chat_prompt(PARTS[2])
    media = model.prepare([p for p in PARTS[2] if not isinstance(p, str)])
    stacked = torch.cat([m.pixels for m in media])
    expected = without_times(NVILAStreamGenerator(model, GREEDY, prompt, media))
    for form in (
        stacked,
        list(stacked),
        {"image": stacked},
        {"image": list(stacked)},
        {"image": media},
    ):
        assert without_times(NVILAStreamGenerator(model, GREEDY, prompt, form)) == expected
    found = NVILAStreamGenerator(model, GREEDY, prompt, image_tensor=stacked)
    assert without_times(found) == expected


def test_tiles_of_one_picture_under_either_name():
    model, parts = shared("dynamic_s2"), PARTS[1]
    media, media_cfg = model.prepare_media([{"from": "human", "value": parts}])
    prompt = model.chat_prompt(parts)
    assert media_cfg["image"]["block_sizes"] and len(media["image"]) > 1
    expected = without_times(NVILAStreamGenerator(model, GREEDY, prompt, media, media_cfg))
    for tiles in (media["image"], torch.stack(media["image"])):
        found = NVILAStreamGenerator(model, GREEDY, prompt, image_tensor=tiles, media_cfg=media_cfg)
        assert without_times(found) == expected
    (medium,) = model.prepare([p for p in parts if not isinstance(p, str)])
    found = NVILAStreamGenerator(model, GREEDY, prompt, medium, media_cfg)
    assert without_times(found) == expected


def test_generator_options():
    model = shared()
    with pytest.raises(DeviceError):
        ask(model, PARTS[1], device="cuda:0")
    assert list(ask(model, PARTS[1], device="cpu"))
    with pytest.raises(CacheError, match="start_pos is 4, but no cache"):
        ask(model, PARTS[1], start_pos=4, chunk_prefilling=True)
    cache = model.new_cache()
    list(ask(model, PARTS[1], cache=cache))
    *_, last = ask(model, PARTS[1], start_pos=len(cache), cache=cache, chunk_prefilling=True)
    assert last["timing"]["context_tokens"] == 1


def test_stream_gen_after_the_weights_changed():
    model, ids = nvila(), torch.tensor([[5, 6, 7]])
    before, n = model.stream_gen(ids, None, None, 0, False, False)
    for part in (model.llm, model.vision_tower, model.mm_projector):
        part.to(torch.bfloat16)
    with pytest.raises(CacheError, match="other weights or settings"):
        model.stream_gen(ids, None, None, n, False, False)
    after, _ = model.stream_gen(ids, None, None, 0, False, False)
    assert after.dtype == torch.bfloat16, "the room of the other dtype was let go"
    assert not torch.equal(before, after.float())
    assert list(ask(model, PARTS[0])), "a stream in between may move the weights"
    model.stream_gen(ids, None, None, n, False, False)


def test_stream_gen_in_a_stream_s_cache_ends_the_stream():
    model = nvila()
    cache = model.new_cache()
    stream = ask(model, PARTS[1], cache=cache)
    next(stream)
    model.stream_gen(torch.tensor([[5]]), None, None, 0, False, False, cache=cache)
    with pytest.raises(CacheError, match="another stream has written into the cache"):
        next(stream)


def test_media_tokens_need_no_embedding():
    """Behind the table of embeddings, as where a checkpoint's tokenizer lacked them."""
    model = nvila(llm_cfg=config().llm_cfg | {"vocab_size": IMAGE})
    assert len(model.net.get_input_embeddings().weight) == IMAGE
    for parts in PARTS:
        media = model.prepare([p for p in parts if not isinstance(p, str)])
        prompt = model.chat_prompt(parts)
        ids = torch.tensor([model.tokenizer(prompt).input_ids])
        whole = model.turn(prompt, media).prefill()
        found, _ = model.stream_gen(ids, media, None, 0, False, False)
        torch.testing.assert_close(found[:, 0], whole, atol=1e-4, rtol=1e-4)
        assert model.generate(ids, media, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_repr_counts_all_parts():
    model = shared()
    parts = (model.get_llm(), model.get_vision_tower(), model.get_mm_projector())
    n = sum(p.numel() for part in parts for p in part.parameters())
    assert f"NVILA({n / 1e6:.1f} M parameters" in repr(model)
    assert sum(p.numel() for p in model.parameters()) == n
    json.dumps(model.config.to_dict())


def test_stream_gen_stays_in_the_context_and_in_its_own_cache():
    model = nvila()
    model.quantized = quantize_llm(model)
    ids = torch.full((1, 40), 5)
    start = 0
    while start + 40 <= model.context_len:
        start += model.stream_gen(ids, None, None, start, True, True)[1]
    with pytest.raises(ContextLengthError):
        model.stream_gen(ids, None, None, start, True, True)
    with pytest.raises(CacheError, match="outside of the cache, which holds 0"):
        model.stream_gen(ids[:, :1], None, None, 40, True, False)  # other weights, other cache
    with pytest.raises(CacheError, match="another model's"):
        model.stream_gen(ids, None, None, 0, True, True, cache=nvila().new_cache())
    for wrong in (ids[:, :0], ids[0]):
        with pytest.raises(ShapeError):
            model.stream_gen(wrong, None, None, 0, True, True)
    with pytest.raises(PromptError, match="the id 999999"):
        model.stream_gen(torch.tensor([[999999]]), None, None, 0, True, True)
