"""InternVL: tiles, features, prompts and answers are transformers' own; media keep their order."""

from __future__ import annotations

import copy
import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    GOLDEN,
    assert_read_again,
    ids_of,
    noise,
    transcript,
    wild_net,
    without_times,
)
from tokenizers import AddedToken
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN as MEAN
from transformers.image_utils import IMAGENET_DEFAULT_STD as STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import vlmlib
from vlmlib import (
    IMAGE_TOKEN_INDEX,
    IMG_CONTEXT_TOKEN,
    IMG_END_TOKEN,
    IMG_START_TOKEN,
    CacheError,
    Chat,
    CheckpointError,
    ContextLengthError,
    GenParams,
    ImageProcessor,
    InternVL,
    InternVLStreamGenerator,
    Medium,
    PlaceholderError,
    ShapeError,
    Video,
    VideoError,
    get_index,
)
from vlmlib.internvl import CHAT_TEMPLATES, place_media

TILE, PATCH = 28, 7  # 4 x 4 patches, folded into 4 positions
TOKENS = 4
CONTEXT = 512
CLIP = Path(__file__).parent / "data" / "clip.mp4"  # 12 frames, 10 a second; i is grey 10 + 20 * i
SPECIAL = ("<|im_start|>", "<|im_end|>", IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN)

HF_TEMPLATE = (  # the layout of the -hf checkpoints
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for c in message.content %}{% if c.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif c.type == 'video' %}{{ '<video>\n' }}{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER, ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
TEXT = f"{USER}What is this?{ASSISTANT}"
ONE = f"{USER}<image>\nWhat is this?{ASSISTANT}"
TWO = f"{USER}Image-1: <image>\nImage-2: <image>\nLeft or right?{ASSISTANT}"
GREEDY = GenParams.greedy(n_predict=10)


# ---- a tiny model, saved as transformers saves it ----


def internvl_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN / "tokenizer_no_bos")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *more)])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def internvl_net(tokenizer, seed: int = 0, **changes) -> InternVLForConditionalGeneration:
    """Random, and wild enough that its greedy answers differ from prompt to prompt."""
    vision, text = changes.pop("vision", {}), changes.pop("text", {})
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=[TILE, TILE],
            patch_size=[PATCH, PATCH],
            **vision,
        ),
        text_config=Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            vocab_size=len(tokenizer) + 3,
            eos_token_id=tokenizer.eos_token_id,
            **text,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
        **changes,
    )
    net = wild_net(InternVLForConditionalGeneration, config, seed)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    net.generation_config.pad_token_id = tokenizer.eos_token_id
    return net


def tiny_internvl(seed: int = 0, **changes) -> InternVL:
    tokenizer = internvl_tokenizer()
    return InternVL(internvl_net(tokenizer, seed, **changes), tokenizer)


def their_processor() -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_mean=MEAN, image_std=STD
    )


def their_pixels(image, **changes) -> torch.Tensor:
    """(t, 3, h, w): transformers' tiles of one picture."""
    out = their_processor()(image, crop_to_patches=True, return_tensors="pt", **changes)
    return out["pixel_values"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints 0, 1, 2 as transformers writes them."""
    root = tmp_path_factory.mktemp("internvl")
    tokenizer = internvl_tokenizer("<video>")
    tokenizer.chat_template = HF_TEMPLATE
    for seed in range(3):
        internvl_net(tokenizer, seed).save_pretrained(root / str(seed))
        tokenizer.save_pretrained(root / str(seed))
        their_processor().save_pretrained(root / str(seed))
    return root


@pytest.fixture(scope="module")
def models(saved) -> list[InternVL]:
    return [vlmlib.load(saved / str(seed), device="cpu") for seed in range(3)]


@pytest.fixture(scope="module")
def model(models) -> InternVL:
    """Not to be changed."""
    return models[0]


def tiles(t: int = 1, seed: int = 0) -> torch.Tensor:
    """(t, 3, h, w) pixel values."""
    return torch.randn(t, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


def their_inputs(model, prompt: str, media) -> dict:
    """For transformers' own forward and generate; media in the order of the `<image>`s."""
    pieces = prompt.split("<image>")
    assert len(pieces) == len(media) + 1
    text = pieces[0]
    for m, piece in zip(media, pieces[1:], strict=True):
        text += f"<img>{'<IMG_CONTEXT>' * TOKENS * len(m)}</img>{piece}"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    pixels = {"pixel_values": torch.cat(list(media))} if media else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def their_ids(model, inputs: dict, **options) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": GREEDY.n_predict} | options
    whole = model.net.generate(**inputs, **options)
    return whole[0, inputs["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def assert_same_logits(model, prompt, media, inputs, tolerance=1e-5):
    turn = model.turn(prompt, media)
    ours, theirs = turn.prefill(), model.net(**inputs).logits[:, -1]
    assert turn.prompt_tokens == inputs["input_ids"].shape[1]
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < tolerance


def ask(model, prompt=ONE, params=GREEDY, *, media="one", start=0, **options):
    if isinstance(media, str):
        media = [tiles(3)]
    return InternVLStreamGenerator(model, params, prompt, media, start_pos=start, **options)


# ---- loading, and what the checkpoint says ----


def test_load(model, saved):
    assert isinstance(model, InternVL) and model.family == "internvl"
    assert (model.image_size, model.tokens_per_tile) == (TILE, TOKENS)
    p = model.image_processor
    assert [p.image_mean, p.image_std] == [tuple(MEAN), tuple(STD)]
    assert (p.min_patches, p.max_patches) == (1, 12)
    assert "InternVL(" in repr(model) and f"context {CONTEXT}" in repr(model)
    half = vlmlib.load(saved / "0", device="cpu", dtype=torch.bfloat16)
    assert list(vlmlib.stream(half, [noise(40, 30), "Hi"], n_predict=2))[-1]["finish_reason"]


PUBLISHED = {  # the fields of the -hf checkpoints; cutting into tiles is the processor's default
    "crop_size": None,
    "crop_to_patches": False,
    "do_center_crop": None,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "image_std": STD,
    "max_patches": 4,
    "min_patches": 2,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": TILE, "width": TILE},
}


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessor_files(saved, tmp_path, name):
    folder = shutil.copytree(saved / "0", tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    nested = name.startswith("processor")
    (folder / name).write_text(json.dumps({"image_processor": PUBLISHED} if nested else PUBLISHED))
    model = vlmlib.load(folder, device="cpu")
    for size in ((200, 40), (20, 20)):  # at most 4 tiles, at least 2, and the thumbnail
        (medium,) = model.prepare([noise(*size)])
        theirs = their_pixels(noise(*size), min_patches=2, max_patches=4)
        assert len(theirs) == len(medium.pixels) == 5
        assert (medium.pixels - theirs).abs().max() < 1e-6


def test_processor_without_crop_size(tmp_path):
    config = {"size": 28, "crop_size": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    processor = ImageProcessor.from_folder(tmp_path)
    assert processor.crop_size == {"height": 28, "width": 28}
    assert np.array_equal(processor.crop(noise(28, 28)), noise(28, 28))


def test_no_preprocessor_file(saved, tmp_path):
    folder = shutil.copytree(saved / "0", tmp_path / "copy")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="no preprocessor_config.json"):
        vlmlib.load(folder, device="cpu")


def test_imagenet_is_the_default(model):
    by_hand = InternVL(model.net, model.tokenizer)
    image = noise(50, 90)
    (ours,), (theirs,) = by_hand.prepare([image]), model.prepare([image])
    assert torch.equal(ours.pixels, theirs.pixels)


def test_published_sizes():
    assert vlmlib.NUM_IMAGE_TOKEN == 256
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(num_hidden_layers=1),
        text_config=Qwen2Config(num_hidden_layers=1, hidden_size=64, vocab_size=8),
    )
    with torch.device("meta"):
        net = InternVLForConditionalGeneration(config)
    model = InternVL(net, internvl_tokenizer())
    assert (model.image_size, model.tokens_per_tile) == (448, vlmlib.NUM_IMAGE_TOKEN)
    (medium,) = model.prepare([noise(900, 450)])
    assert medium.pixels.shape == (3, 3, 448, 448) and medium.length == 3 * 256


def test_tiles_that_are_no_squares(model):
    broken = copy.copy(model)
    broken.net = copy.copy(model.net)
    broken.net.config = copy.deepcopy(model.config)
    broken.net.config.vision_config.image_size = (28, 56)
    with pytest.raises(ShapeError, match="squares, got 28 x 56"):
        _ = broken.image_size


# ---- pictures ----

RANDOM = random.Random(0)
SIZES = [(n, n) for n in range(20, 90)]  # squares tie at 1, 4 and 9 tiles
SIZES += [(RANDOM.randint(4, 300), RANDOM.randint(4, 300)) for _ in range(80)]
SIZES += [(400, 6), (6, 400), (56, 28), (84, 28), (28, 112), (336, 28), (70, 42), (100, 40)]


def test_pixels_are_those_of_transformers(model):
    counts = set()
    for size in SIZES:
        image = noise(*size)
        (medium,) = model.prepare([image])
        theirs = their_pixels(image)
        assert medium.pixels.shape == theirs.shape, size
        assert (medium.pixels - theirs).abs().max() < 1e-6, size
        assert medium.length == len(theirs) * TOKENS and medium.kind == "image"
        counts.add(len(theirs))
    assert {1, 3, 4, 5, 7, 9, 10, 13} <= counts


def test_pictures_of_every_mode(model):
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image = noise(60, 30).convert(mode)
        (ours,) = model.prepare([image])
        (rgb,) = model.prepare([vlmlib.load_image(image)])
        assert ours.pixels.shape == (3, 3, TILE, TILE) and torch.equal(ours.pixels, rgb.pixels)


# ---- features ----


@torch.inference_mode()
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision": {"use_mean_pooling": False}},
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 1},
        {"downsample_ratio": 0.25},
        {"downsample_ratio": 1.0},
    ],
    ids=str,
)
def test_features_are_those_of_transformers(changes):
    model = tiny_internvl(3, **changes)
    for t in (1, 2, 13):
        theirs = model.net.get_image_features(pixel_values=tiles(t, t)).pooler_output
        medium = model.medium(tiles(t, t))
        ours = model.encode(medium)
        assert ours.shape == (medium.length, 32) == (t * model.tokens_per_tile, 32)
        assert (ours - theirs.flatten(0, 1)).abs().max() < 1e-6


def test_tiles_of_a_picture_are_one_batch(model):
    sizes = []
    tower = model.net.model.vision_tower
    hook = tower.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    try:
        stream = ask(model, TWO, media=[tiles(7), tiles(3, 1)])
        assert sizes == [], "nothing is computed before the first chunk is asked for"
        list(stream)
    finally:
        hook.remove()
    assert sizes == [7, 3]


# ---- the same answers as transformers ----


@pytest.mark.parametrize("seed", range(3))
def test_greedy_ids_for_1_to_13_tiles(models, seed):
    model, answers = models[seed], set()
    for t in range(1, 14):
        media = [tiles(t, t)]
        inputs = their_inputs(model, ONE, media)
        assert_same_logits(model, ONE, media, inputs)
        ids = ids_of(ask(model, media=media, trace=0))
        assert ids == their_ids(model, inputs)
        answers.add(tuple(ids))
    assert len(answers) > 6, "the random model says different things"


PROMPTS = [
    (TEXT, []),
    (TWO, [1, 1]),
    (TWO, [3, 13]),
    (f"{USER}a <image> b <image>c<image>{ASSISTANT}", [2, 1, 5]),
    (f"{USER}<image>\nOne?<|im_end|>\n<|im_start|>assistant\nyes{TWO}", [1, 2, 3]),
    ("<image>", [4]),
    ("plain <image> words", [1]),
]


@pytest.mark.parametrize(("prompt", "counts"), PROMPTS)
@pytest.mark.parametrize("seed", range(2))
def test_greedy_ids_of_several_pictures(models, seed, prompt, counts):
    model = models[seed]
    media = [tiles(t, i) for i, t in enumerate(counts)]
    inputs = their_inputs(model, prompt, media)
    assert_same_logits(model, prompt, media, inputs)
    ids = ids_of(ask(model, prompt, media=media, trace=0))
    assert ids == their_ids(model, inputs) == their_ids(model, inputs, use_cache=False)


def test_from_picture_to_answer(model):
    """Every step at once: nothing of vlmlib in the expected ids."""
    images = [noise(90, 40, 1), noise(30, 30, 2), noise(50, 200, 3)]
    question = "Which one is red?"
    prompt = f"{USER}<image>\n<image>\nand <image>\n{question}{ASSISTANT}"
    inputs = their_inputs(model, prompt, [their_pixels(i) for i in images])
    parts = [*images[:2], "and ", images[2], question]
    stream = vlmlib.stream(model, parts, n_predict=10, trace=0)
    assert ids_of(stream) == their_ids(model, inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("temp", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 20, 0.8), (1.8, 50, 0.95)]
)
def test_sampled_ids_are_those_of_generate(model, seed, temp, top_k, top_p):
    media = [tiles(3, 8)]
    options = {"temperature": temp, "top_k": top_k, "top_p": top_p, "do_sample": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = their_ids(
            model, their_inputs(model, ONE, media), repetition_penalty=1.0, **options
        )
    params = GREEDY.but(temp=temp, top_k=top_k, top_p=top_p, seed=seed, order="hf")
    assert ids_of(ask(model, ONE, params, media=media, trace=0)) == expected


# ---- prompts: who gets which placeholder ----


def text_of(model, ids) -> str:
    """Ids as text, with `(*)` for a medium."""
    runs = itertools.groupby(ids, key=lambda i: i == IMAGE_TOKEN_INDEX)
    return "".join(
        "(*)" * len(list(run)) if is_medium else model.tokenizer.decode(list(run))
        for is_medium, run in runs
    )


def placed_text(model, prompt, media) -> str:
    return text_of(model, model.prompt_ids(place_media(prompt, model.as_media(media))[0]))


def test_a_placeholder_becomes_one_position_between_its_marks(model):
    ids = model.prompt_ids(TWO)
    assert ids.count(IMAGE_TOKEN_INDEX) == 2
    assert text_of(model, ids) == TWO.replace("<image>", "<img>(*)</img>")
    assert placed_text(model, TWO, [tiles(2), tiles(13)]) == text_of(model, ids)
    turn = model.turn(TWO, [tiles(2), tiles(13)])
    assert turn.prompt_tokens == len(ids) - 2 + 15 * TOKENS
    marks = set(model.tokenizer.convert_tokens_to_ids([IMG_CONTEXT_TOKEN])) | {IMAGE_TOKEN_INDEX}
    assert not marks & set(turn.text_ids), "the penalty sees text only"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (TEXT, f"{USER}<image>\nWhat is this?{ASSISTANT}"),
        ("What is this?", "<image>\nWhat is this?"),
        (f"{TEXT}yes{TEXT}", f"{ONE}yes{TEXT}"),
        (f"<|im_start|>system\nBe good.<|im_end|>\n{TEXT}", None),
    ],
)
def test_a_picture_without_placeholder_opens_the_question(model, prompt, expected):
    expected = expected or f"<|im_start|>system\nBe good.<|im_end|>\n{ONE}"
    media = [tiles(2)]
    assert placed_text(model, prompt, media) == expected.replace("<image>", "<img>(*)</img>")
    inputs = their_inputs(model, expected, media)
    assert ids_of(ask(model, prompt, media=media, trace=0)) == their_ids(model, inputs)


def test_media_without_placeholders_open_the_question_in_their_order(model):
    media = [tiles(2), Medium(tiles(2, 1), 2 * TOKENS, "video"), tiles(1, 2)]
    slot = "<img>(*)</img>\n"
    assert placed_text(model, "Hi", media) == f"{slot}Frame1: {slot}Frame2: {slot}{slot}Hi"


def test_placeholders_of_hf_prompts_and_written_out_ones(model):
    media = [tiles(2, 4), tiles(3, 5)]
    expected = ids_of(ask(model, TWO, media=media, trace=0))
    run = [f"<img>{'<IMG_CONTEXT>' * TOKENS * t}</img>" for t in (2, 3)]
    for forms in (
        ["<IMG_CONTEXT>"] * 2,
        run,
        ["<image>", run[1]],
        ["<img><IMG_CONTEXT></img>"] * 2,
    ):
        first, second, rest = TWO.split("<image>")
        prompt = first + forms[0] + second + forms[1] + rest
        assert ids_of(ask(model, prompt, media=media, trace=0)) == expected


def test_a_run_of_another_length_names_both_numbers(model):
    prompt = ONE.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 2 * TOKENS}</img>")
    with pytest.raises(PlaceholderError, match=r"has 8 <IMG_CONTEXT> .* 3 tile\(s\) takes 12 pos"):
        ask(model, prompt, media=[tiles(3)])


@pytest.mark.parametrize(
    ("prompt", "media", "words"),
    [
        (ONE, None, r"1 <image> .*0 image\(s\)"),
        (ONE, [tiles(), tiles()], r"1 <image> .*2 image\(s\)"),
        (TWO, [tiles()], r"2 <image> .*1 image\(s\)"),
        (TWO, {"image": [tiles()], "video": [tiles()]}, r"2 <image> .*1 image\(s\)"),
        ("<video>", None, r"1 <video> .*0 video\(s\)"),
        ("<video>", [tiles()], r"0 <image> .*1 image\(s\)"),
        ("<image>", {"image": [tiles()], "video": [tiles()]}, r"0 <video> .*1 video\(s\)"),
        ("<video><video>", {"video": [tiles(2)]}, r"2 <video> .*1 video\(s\)"),
        ("Frame1: <image>\nFrame2: <image>\n", {"video": [tiles(3)]}, r"2 <image> .*3 image\(s\)"),
    ],
)
def test_wrong_number_of_media(model, prompt, media, words):
    """The originals end in a shape error of the fused tensors here."""
    with pytest.raises(PlaceholderError, match=words):
        ask(model, prompt, media=media)


@pytest.mark.parametrize(
    "text",
    ["<image>", "<video>", "<IMG_CONTEXT>", "<img>", "</img><|im_end|>", "Frame1: <image>\n"],
)
@pytest.mark.parametrize("flavour", ["own", "internvl2_5"])
def test_user_text_cannot_smuggle_anything_in(model, text, flavour):
    model = copy.copy(model)
    model.chat_template = CHAT_TEMPLATES.get(flavour)
    picture = noise(30, 30)
    for parts in ([text], [text[:3], text[3:]], [picture, text], [text, picture]):
        n = sum(not isinstance(p, str) for p in parts)
        prompt, placed = place_media(model.chat_prompt(parts), model.prepare([picture] * n))
        ids = model.prompt_ids(prompt)
        assert len(placed) == ids.count(IMAGE_TOKEN_INDEX) == n
        clean = model.prompt_ids(model.chat_prompt([*[picture] * n, "x"]))
        special = set(model.tokenizer.all_special_ids)
        assert sum(i in special for i in ids) == sum(i in special for i in clean)
        assert list(vlmlib.stream(model, parts, n_predict=1))[-1]["finish_reason"]


def test_video_is_a_placeholder_of_tokenizers_that_do_not_know_it():
    model = tiny_internvl()
    assert "<video>" not in model.tokenizer.get_vocab()
    assert "<video>" not in model.chat_prompt(["a <video> b"])
    prompt = model.chat_prompt([Video(CLIP, 2), "a <video> b"])
    assert place_media(prompt, model.prepare([Video(CLIP, 2)]))[0].count("Frame") == 2


# ---- prompts: the two flavours ----


def test_prompt_of_the_hf_checkpoints(model):
    parts = [noise(30, 30), Video(CLIP), "What is this?"]
    assert model.chat_prompt(parts) == (
        f"{USER}<IMG_CONTEXT>\n<video>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    )
    ours = copy.copy(model)
    ours.chat_template = CHAT_TEMPLATES["hf"]
    media = model.prepare(parts[:2])
    assert ours.chat_prompt(parts) == f"{USER}<image>\n<video>\nWhat is this?{ASSISTANT}"
    assert placed_text(model, ours.chat_prompt(parts), media) == placed_text(
        model, model.chat_prompt(parts), media
    )


SYSTEM = (
    "<|im_start|>system\n你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及"
    "多家合作单位联合开发的多模态大语言模型。<|im_end|>\n"
)


def test_prompt_of_the_original_checkpoints(model):
    original = copy.copy(model)
    original.chat_template = CHAT_TEMPLATES["internvl2_5"]
    parts = [noise(30, 30), "What is this?"]
    assert original.chat_prompt(parts) == SYSTEM + ONE
    messages = [("user", parts), ("assistant", ["A cat."]), ("user", ["Sure?"])]
    expected = f"{SYSTEM}{ONE}A cat.<|im_end|>\n{USER}Sure?{ASSISTANT}"
    assert original.conversation_prompt(messages) == expected
    messages.insert(0, ("system", ["Be brief."]))
    expected = expected.replace(SYSTEM, "<|im_start|>system\nBe brief.<|im_end|>\n")
    assert original.conversation_prompt(messages) == expected
    inputs = their_inputs(model, SYSTEM + ONE, [their_pixels(parts[0])])
    stream = vlmlib.stream(original, parts, n_predict=10, trace=0)
    assert ids_of(stream) == their_ids(model, inputs)


def test_a_tokenizer_without_template_is_an_original_one():
    model = tiny_internvl()
    assert model.chat_prompt([noise(30, 30), "What is this?"]) == SYSTEM + ONE


def test_template_takes_plain_text_too(model):
    messages = [{"role": "user", "content": "What is this?"}]
    prompt = model.tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES["hf"], tokenize=False, add_generation_prompt=True
    )
    assert prompt == TEXT


# ---- clips ----


def greys(medium: Medium) -> list[int]:
    """Of every frame, which one of the clip it is."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    frames = (medium.pixels * std + mean) * 255
    return [round((f.mean().item() - 10) / 20) for f in frames]


@pytest.mark.parametrize(
    ("video", "first", "last"),
    [
        (Video(CLIP), 0, 11),
        (Video(str(CLIP), 4), 0, 11),
        (Video(CLIP.read_bytes(), num_frames=1), 0, 11),
        (Video(CLIP, 3, (0.2, 0.8)), 2, 8),
        (Video(CLIP, 2, bound=(0.5, 99.0)), 5, 11),
    ],
)
def test_frames_of_a_clip(model, video, first, last):
    (medium,) = model.prepare([video])
    n = video.num_frames or 8
    assert greys(medium) == get_index(None, 10.0, last, first, n)
    assert medium.kind == "video" and medium.length == n * TOKENS, "one tile a frame"
    assert medium.pixels.shape == (n, 3, TILE, TILE)


def test_frames_given_as_pictures(model):
    frames = vlmlib.load_video(CLIP, range(12))
    (medium,) = model.prepare([Video(frames)])
    assert greys(medium) == list(range(12))
    (medium,) = model.prepare([Video(frames, 4)])
    assert greys(medium) == get_index(None, 1.0, 11, 0, 4)
    assert torch.equal(medium.pixels, model.prepare([Video(CLIP, 4)])[0].pixels)
    (medium,) = model.prepare([Video(frames[::-1], 12)])
    assert greys(medium) == list(range(12))[::-1], "as many as there are: each of them once"
    for wrong in (Video([]), Video(frames, 2, (0, 1))):
        with pytest.raises(VideoError, match="list of frames"):
            model.prepare([wrong])


@pytest.mark.parametrize("bad", [0, -1])
def test_a_clip_of_no_frames(model, bad):
    with pytest.raises(VideoError, match=f"from 1 to 65536, got {bad}"):
        vlmlib.stream(model, [Video(CLIP, bad), "Hi"])
    with pytest.raises(VideoError, match="no such file"):
        vlmlib.stream(model, [Video("missing.mp4"), "Hi"])


def test_a_frame_is_a_stretched_tile(model):
    """Not cut into tiles, whatever its shape."""
    frame = noise(90, 30)
    (medium,) = model.prepare([Video([frame])])
    square = frame.resize((TILE, TILE), 3)
    assert (medium.pixels - their_pixels(square)).abs().max() < 1e-6


def test_every_frame_is_announced(model):
    """The first question about a clip, against transformers with the prompt written by hand."""
    parts = [Video(CLIP, 3), "What happens?"]
    lines = "".join(f"Frame{i}: <image>\n" for i in (1, 2, 3))
    prompt = f"{USER}{lines}What happens?{ASSISTANT}"
    frames = [their_pixels(f) for f in vlmlib.load_video(CLIP, get_index(None, 10.0, 11, 0, 3))]
    frames = [f[-1:] for f in frames]  # the thumbnail: the whole frame as one tile
    inputs = their_inputs(model, prompt, frames)
    assert_same_logits(model, model.chat_prompt(parts), model.prepare(parts[:1]), inputs)
    stream = vlmlib.stream(model, parts, n_predict=10, trace=0)
    chunks = list(stream)
    assert ids_of(chunks) == their_ids(model, inputs)
    assert chunks[-1]["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


def test_frames_written_out_in_the_prompt(model):
    """TinyChat's way: the lines are in the prompt, the clip comes as a whole or frame by frame."""
    clip = tiles(3, 6)
    lines = "".join(f"Frame{i}: <image>\n" for i in (1, 2, 3))
    by_hand, short = (f"{USER}{text}What?{ASSISTANT}" for text in (lines, "<video>\n"))
    expected = ids_of(ask(model, short, media={"video": [clip]}, trace=0))
    assert expected == their_ids(model, their_inputs(model, by_hand, list(clip.split(1))))
    for prompt in (by_hand, by_hand.replace("<image>", "<IMG_CONTEXT>")):
        for media in ({"video": [clip]}, {"video": list(clip)}, {"video": clip}, list(clip)):
            assert ids_of(ask(model, prompt, media=media, trace=0)) == expected
    assert ids_of(ask(model, f"{USER}What?{ASSISTANT}", media={"video": [clip]}, trace=0)) == (
        expected
    ), "a clip without placeholder opens the question"


def test_frames_without_their_numbers(model):
    clip, prompt = tiles(2, 7), f"{USER}<image>, then <image>{ASSISTANT}"
    expected = their_ids(model, their_inputs(model, prompt, list(clip.split(1))))
    assert ids_of(ask(model, prompt, media={"video": [clip]}, trace=0)) == expected


# ---- media of both kinds, in the prompt's order ----

A, B = tiles(3, 11), tiles(2, 12)
C, D = tiles(2, 13), tiles(3, 14)


def frames_of(clip) -> list[torch.Tensor]:
    return list(clip.split(1))


def lines(n: int) -> str:
    return "\n".join(f"Frame{i}: <image>" for i in range(1, n + 1))


MIXED = [
    ("<video> then <image>", f"{lines(2)} then <image>", [*frames_of(C), A]),
    ("<image> then <video>", f"<image> then {lines(2)}", [A, *frames_of(C)]),
    (
        "<video>\n<image>\n<video>\n<image>\nWhat?",
        f"{lines(2)}\n<image>\n{lines(3)}\n<image>\nWhat?",
        [*frames_of(C), A, *frames_of(D), B],
    ),
    (  # frames written out, pictures in between
        "<image> Frame1: <image>\nFrame2: <image>\n<image>",
        f"<image> {lines(2)}\n<image>",
        [A, *frames_of(C), B],
    ),
]


@pytest.mark.parametrize(("prompt", "by_hand", "placed"), MIXED)
def test_media_follow_the_prompt(model, prompt, by_hand, placed):
    """TinyChat puts all pictures before all frames, and drops the clips if there are pictures."""
    pictures = [m for m in placed if len(m) > 1]
    clips = [C, D] if len(placed) > 4 else [C]
    inputs = their_inputs(model, by_hand, placed)
    by_kind = {"image": pictures, "video": clips}
    assert_same_logits(model, prompt, by_kind, inputs)
    expected = their_ids(model, inputs)
    ordered = model.as_media(by_kind)
    for media in (by_kind, dict(reversed(by_kind.items())), ordered, ordered[::-1]):
        if media == ordered[::-1] and len(ordered) > 2:
            continue  # media of one kind keep their own order
        assert ids_of(ask(model, prompt, media=media, trace=0)) == expected


@torch.inference_mode()
def test_every_medium_counts(model):
    prompt = "<video> and <image>: which?"
    logits = model.turn(prompt, {"image": [A], "video": [C]}).prefill()
    for image, video in ((B.repeat(2, 1, 1, 1)[:3], C), (A, B), (A, C.flip(0))):
        other = model.turn(prompt, {"image": [image], "video": [video]}).prefill()
        assert (other - logits).abs().max() > 1e-3


def test_parts_of_both_kinds(model):
    """The same through `stream`: the order of the parts is the order of the media."""
    clip, picture = Video(CLIP, 2), noise(60, 30)
    media = {id(p): model.prepare([p])[0].pixels for p in (clip, picture)}
    for parts in ([clip, picture, "Hi"], [picture, "and ", clip, "Hi"], ["Hi ", picture, clip]):
        prompt, placed = "", []
        for part in parts:
            if isinstance(part, str):
                prompt += part
            else:
                pixels = media[id(part)]
                placed += frames_of(pixels) if part is clip else [pixels]
                prompt += (lines(2) if part is clip else "<image>") + "\n"
        inputs = their_inputs(model, f"{USER}{prompt}{ASSISTANT}", placed)
        stream = vlmlib.stream(model, parts, n_predict=10, trace=0)
        assert ids_of(stream) == their_ids(model, inputs)


# ---- forms of media ----


def test_forms_of_media(model):
    x, y = tiles(3, 1), tiles(1, 2)
    expected = without_times(ask(model, TWO, media=[x, y]))
    media = model.as_media([x, y])
    for form in (media, (x, y[0]), {"image": [x, y]}, {"image": media, "video": []}):
        assert without_times(ask(model, TWO, media=form)) == expected
    assert without_times(ask(model, TWO, media=None, image_tensor=[x, y])) == expected
    one = without_times(ask(model, media=[x]))
    for form in (x, {"image": x}, {"image": [x], "video": None}):
        assert without_times(ask(model, media=form)) == one, "t tiles are one picture"
    nothing = without_times(ask(model, TEXT, media=None))
    for form in ([], {}, {"image": []}):
        assert without_times(ask(model, TEXT, media=form)) == nothing
    assert without_times(ask(model, media=[x], media_cfg=[3], quant_llm=True)) == one


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(28, 28), r"got \(28, 28\)"),
        (torch.zeros(1, 3, 14, 14), r"expected \(t, 3, 28, 28\) pixels, got \(1, 3, 14, 14\)"),
        (torch.zeros(1, 1, 28, 28), "got"),
        (["a.png"], "got str"),
        ({"video": [torch.zeros(0, 3, 28, 28)]}, r"got \(0, 3, 28, 28\)"),
        ({"audio": [tiles()]}, "under 'image' and 'video', got .'audio'"),
        ({"video": [torch.zeros(3, 28, 27)]}, "got"),
    ],
)
def test_media_that_are_none(model, wrong, words):
    with pytest.raises(ShapeError, match=words):
        ask(model, media=wrong)


def test_media_under_both_names(model):
    with pytest.raises(ValueError, match="media and image_tensor are two names"):
        ask(model, media=[tiles()], image_tensor=[tiles()])


def test_a_medium_of_a_wrong_length(model):
    with pytest.raises(ShapeError, match="a medium of 5 positions has 8 features"):
        next(ask(model, media=[Medium(tiles(2), 5)]))


# ---- later turns ----


def questions():
    return [
        [noise(90, 30, 1), "What is this?"],
        ["And the colour?"],
        ["Now ", noise(30, 30, 2), Video(CLIP, 2), "and this?"],
        [noise(30, 90, 3), "And the last?"],
        ["Left ", noise(60, 60, 4), " or right?"],
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("flavour", ["own", "internvl2_5"])
@torch.inference_mode()
def test_turns_equal_the_whole_transcript(models, seed, flavour):
    model = copy.copy(models[seed])
    model.chat_template = CHAT_TEMPLATES.get(flavour)
    chats = [Chat(model, chunk_prefilling=chunked) for chunked in (True, False)]
    for turn, parts in enumerate(questions()):
        prompt, media = transcript(model, [*chats[0].messages, ("user", parts)])
        held = copy.deepcopy(chats[0].cache)
        logits = model.turn(prompt, media, start_pos=len(held), cache=held).prefill()
        assert (logits - model.turn(prompt, media).prefill()).abs().max() < 1e-4
        quick, whole = (list(c.ask(parts, n_predict=6, trace=0)) for c in chats)
        assert ids_of(quick) == ids_of(whole)
        assert quick[-1]["text"] == whole[-1]["text"] and quick[-1]["usage"] == whole[-1]["usage"]
        timing, all_fed = quick[-1]["timing"], whole[-1]["timing"]
        assert all_fed["reused_tokens"] == 0
        assert timing["reused_tokens"] + timing["context_tokens"] == all_fed["context_tokens"]
        assert (timing["reused_tokens"] > 0) == (turn > 0)


@pytest.mark.parametrize(
    "edit",
    [
        lambda said: said[:2] + [("user", ("And the shape?",))] + said[3:],
        lambda said: [("user", (said[0][1][0], "What is that?"))] + said[1:],
        lambda said: said[:1] + [("assistant", ("nothing",))] + said[2:],
        lambda said: said[:3] + [("assistant", ("blue",))] + said[4:],
        lambda said: said[2:],
        lambda said: said[:2] + said[4:],
    ],
    ids=["question", "first question", "first answer", "answer", "no first turn", "no turn"],
)
def test_an_edited_history_is_read_again(model, edit):
    chat = Chat(model)
    for parts in questions()[:3]:
        list(chat.ask(parts, n_predict=6))
    assert_read_again(chat, edit(chat.messages))


@torch.inference_mode()
def test_every_start_pos_gives_the_same_logits(model):
    prompt = f"{USER}<video>\n<image>\nWhat?{ASSISTANT}"
    media = {"image": [tiles(3, 1)], "video": [tiles(2, 2)]}
    held = model.new_cache()
    list(ask(model, prompt, media=media, cache=held, chunk_prefilling=True))
    more = {"image": [tiles(3, 1), tiles(2, 3)], "video": [tiles(2, 2)]}
    for text, all_media in ((prompt, media), (f"{prompt}ok{ONE}", more)):
        expected = model.turn(text, all_media).prefill()
        for start in range(len(held) + 1):
            copied = copy.deepcopy(held)
            turn = model.turn(text, all_media, start_pos=start, cache=copied)
            assert turn.reused_tokens <= min(start, turn.prompt_tokens - 1)
            assert (turn.prefill() - expected).abs().max() < 1e-4
            assert len(copied) == turn.prompt_tokens == int(copied.past.get_seq_length())


@torch.inference_mode()
@pytest.mark.parametrize("changed", ["image", "video"])
def test_a_changed_medium_invalidates_what_follows(model, changed):
    prompt = f"{USER}<video>\n<image>\nWhat?{ASSISTANT}"
    media = {"image": [tiles(3, 1)], "video": [tiles(2, 2)]}
    held = model.new_cache()
    list(ask(model, prompt, media=media, cache=held, chunk_prefilling=True))
    other = {k: [v[0].clone()] for k, v in media.items()}
    other[changed][0][-1, 0, 0, 0] += 0.01  # of a clip: only its second frame
    turn = model.turn(prompt, other, start_pos=len(held), cache=held)
    ids = model.prompt_ids(place_media(prompt, model.as_media(media))[0])
    at = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
    expected = {"video": at[1] + TOKENS - 1, "image": at[2] + 2 * (TOKENS - 1)}[changed]
    assert turn.reused_tokens == expected
    assert (turn.prefill() - model.turn(prompt, other).prefill()).abs().max() < 1e-4


def test_start_pos_without_chunk_prefilling_feeds_everything(model):
    held = model.new_cache()
    list(ask(model, cache=held, chunk_prefilling=True))
    last = list(ask(model, f"{ONE}ok{TEXT}", start=len(held), cache=held))[-1]
    assert last["timing"]["reused_tokens"] == 0
    assert last["timing"]["context_tokens"] == last["usage"]["prompt_tokens"]
    with pytest.raises(CacheError, match="start_pos is 4, but no cache was given"):
        ask(model, start=4, chunk_prefilling=True)


# ---- the contract of every chunk ----


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n_predict", [0, 1, 2, 9])
def test_contract_of_every_chunk(model, n_predict, echo, interval):
    media = [tiles(5)]
    params = GREEDY.but(n_predict=n_predict)
    chunks = list(ask(model, ONE, params, media=media, echo=echo, stream_interval=interval))
    prompt_tokens = their_inputs(model, ONE, media)["input_ids"].shape[1]
    before = ""
    for chunk in chunks:
        assert set(chunk) == {"text", "delta", "usage", "finish_reason", "timing"}
        assert chunk["text"] == before + chunk["delta"]
        before = chunk["text"]
        assert chunk["usage"]["prompt_tokens"] == prompt_tokens
        completed = chunk["usage"]["completion_tokens"]
        assert chunk["usage"]["total_tokens"] == prompt_tokens + completed
    *early, last = chunks
    assert all(c["finish_reason"] is None and c["timing"] is None for c in early)
    assert last["finish_reason"] == "length"
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == [*range(interval, n_predict + 1, interval), n_predict]
    assert last["text"].startswith(ONE if echo else "")
    steps = max(n_predict - 1, 0)
    timing = last["timing"]
    assert timing["context_tokens"] == prompt_tokens and timing["reused_tokens"] == 0
    assert timing["context_time"] > 0 and len(timing["generation_time_list"]) == steps
    assert timing["total_tokens"] == prompt_tokens + steps


def test_defaults_are_tinychats(model):
    counts = [c["usage"]["completion_tokens"] for c in ask(model, media=[tiles(1)])]
    assert counts == [2, 4, 6, 8, 10, 10], "every second token, and the end"
    sampled = {"temp": 1.0, "top_p": 0.9, "top_k": 5, "seed": 2, "n_predict": 6}
    holder = type("Namespace", (), sampled | {"repeat_penalty": 1.1, "n_vocab": 32000})
    assert without_times(ask(model, params=sampled)) == without_times(ask(model, params=holder))


@pytest.mark.parametrize("k", [0, 4])
def test_a_stop_id_ends_the_answer(model, k):
    ids = ids_of(ask(model, trace=0))
    stop = next(i for i in ids[k:] if i not in ids[:k])
    n = ids.index(stop) + 1
    mine = [stop]
    for n_predict in (50, n):  # "stop" beats "length" when it is the last id allowed
        params = GREEDY.but(n_predict=n_predict)
        *_, last = ask(model, ONE, params, stop_token_ids=mine, trace=0)
        assert last["finish_reason"] == "stop"
        assert last["usage"]["completion_tokens"] == n
        assert last["text"] == model.tokenizer.decode(ids[: n - 1], skip_special_tokens=True)
    assert mine == [stop], "the caller's list stays as it was"


def test_im_end_stops_even_where_it_is_not_the_eos():
    tokenizer = internvl_tokenizer()
    net = internvl_net(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|im_start|>"
    net.generation_config.eos_token_id = None
    model = InternVL(net, tokenizer)
    assert model.stop_token_ids == sorted([tokenizer.eos_token_id, end])
    always = torch.nn.functional.one_hot(torch.tensor([end]), len(tokenizer)).float()
    net.lm_head.register_forward_hook(lambda module, args, out: always)
    (last,) = ask(model, trace=0)
    assert ids_of([last]) == [end]
    assert (last["finish_reason"], last["text"]) == ("stop", "")


def test_lstrip(model):
    (space,) = model.tokenizer(" ").input_ids
    always = torch.nn.functional.one_hot(torch.tensor([space]), len(model.tokenizer)).float()
    hook = model.net.lm_head.register_forward_hook(lambda module, args, out: always)
    try:
        texts = [list(ask(model, lstrip=lstrip))[-1]["text"] for lstrip in (False, True)]
    finally:
        hook.remove()
    assert texts == [" " * GREEDY.n_predict, ""]


def test_interleaved_streams_equal_lone_ones(model):
    requests = [
        {},
        {"media": [tiles(13, 4)]},
        {"prompt": "<video>?", "media": {"video": [tiles(2)]}},
        {"params": GREEDY.but(temp=1.0, seed=1)},
    ]
    alone = [without_times(ask(model, **r)) for r in requests]
    streams = [ask(model, **r) for r in requests]
    together = [[] for _ in streams]
    for round_ in itertools.zip_longest(*streams):
        for chunks, chunk in zip(together, round_, strict=True):
            chunks += [chunk] if chunk else []
    assert [without_times(c) for c in together] == alone


def test_context_is_counted_with_the_tiles(model):
    with pytest.raises(ContextLengthError, match=f"context holds {CONTEXT}"):
        ask(model, "<image>" * 10, media=[tiles(13)] * 10)


@pytest.mark.parametrize(
    "wrong", [{"params": {"temp": -1}}, {"stream_interval": 0}, {"device": "cuda:0"}]
)
def test_errors_come_at_the_call(model, wrong):
    with pytest.raises(ValueError):
        ask(model, **wrong)


def test_the_microscope_reads_a_prompt_as_the_stream_does(model):
    """With placeholders that only the family knows: none at all, and a clip's."""
    from vlmlib.microscope import attention, picture_weights

    for prompt, source in [("what is this?", noise(40, 30)), ("<video>\nwhat?", Video(CLIP, 2))]:
        media = model.prepare([source])
        weights = attention(model, prompt, media)
        assert weights.shape[-1] == model.turn(prompt, media).prompt_tokens
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
        seen = picture_weights(model, prompt, media, weights)
        assert sum(w.shape[-1] for w in seen) == sum(m.length for m in media)
