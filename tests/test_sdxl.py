import json
import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from common.errors import UserError
from lora import add_lora
from model.check import describe_model
from model.checkpoint import checkpoint_of
from model.load import BASE, base_architecture, check_folder, load_sdxl, native_resolution, read_sdxl
from model.sdxl import SAMPLERS, time_ids
from model.text import TokenInputs, most_chunks, split_tokens, tokenize
from model.vae import decode_latents, encode_pixels, sample_latents
from options.training import LoRAConfig

CAPTIONS = ["a cat", "", "a long caption " * 30]


def test_text_encoding_equals_the_pipeline(pipe, denoiser):
    context, _, pooled, _ = pipe.encode_prompt(["a cat", "two dogs on a hill"], device="cpu", do_classifier_free_guidance=False)
    ours = denoiser.encode_text(tokenize(denoiser.tokenizers, ["a cat", "two dogs on a hill"]))
    assert torch.equal(ours[0], context)
    assert torch.equal(ours[1], pooled)


def test_an_empty_caption_is_what_guidance_uses(pipe, denoiser):
    """Zeros if the model was trained with them, else the encoding of the empty text."""
    for zeros in (True, False):
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        denoiser.zero_empty = zeros
        _, context, _, pooled = pipe.encode_prompt(["a cat"], device="cpu", do_classifier_free_guidance=True)
        ours = denoiser.encode_text(tokenize(denoiser.tokenizers, ["", "a cat"]))
        torch.testing.assert_close(ours[0][:1], context)
        torch.testing.assert_close(ours[1][:1], pooled)
        assert ours[0][1].any()
        assert ours[0][0].any() != zeros


def test_tokens_have_one_row_for_each_text_encoder(denoiser):
    tokens = tokenize(denoiser.tokenizers, CAPTIONS)
    assert tokens.shape == (3, 2, 77)
    assert tokens.dtype == torch.int64
    first, second = denoiser.tokenizers
    assert (tokens[1, 0, 2:] == first.eos_token_id).all()
    assert (tokens[1, 1, 2:] == second.convert_tokens_to_ids("!")).all()
    assert tokens[2, 0, -1] == first.eos_token_id  # truncated, but the end token is there


@pytest.fixture(scope="module")
def sdxl_tokenizers() -> list[CLIPTokenizer]:
    """The tokenizers of SDXL base, which are bundled."""
    return [CLIPTokenizer.from_pretrained(BASE / name) for name in ("tokenizer", "tokenizer_2")]


def by_transformers(tokenizers, captions) -> torch.Tensor:
    options = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    return torch.stack([t(captions, **options).input_ids for t in tokenizers], dim=1)


def test_tokens_in_one_chunk_are_those_of_transformers(denoiser, sdxl_tokenizers):
    captions = [*CAPTIONS, "tag, " * 60, "x " * 75, "Ünïcode 🙂 <|endoftext|> ! a"]
    for tokenizers in (denoiser.tokenizers, sdxl_tokenizers):
        assert torch.equal(tokenize(tokenizers, captions), by_transformers(tokenizers, captions))
        short = [c for c in captions if len(tokenizers[0](c).input_ids) <= 77]
        assert len(short) > 2
        for max_tokens in (225, None):
            assert torch.equal(tokenize(tokenizers, short, max_tokens)[:, :, :77], by_transformers(tokenizers, short))


def words(count: int, *commas: int) -> str:
    """A caption of `count` tokens, with commas at the indices `commas`."""
    return " ".join("," if i in commas else "a" for i in range(count))


@pytest.mark.parametrize(
    ("caption", "max_tokens", "chunks", "truncated"),
    [
        (words(75, 60), None, [75], 0),
        (words(100), None, [75, 25], 0),
        (words(100, 54), None, [75, 25], 0),  # too far back
        (words(100, 55), None, [56, 44], 0),
        (words(100, 3, 60, 70), None, [71, 29], 0),
        (words(100, 74), None, [75, 25], 0),
        (words(100, 60, 75), None, [75, 25], 0),  # a comma comes next: no tag is split
        (words(160, 60), None, [61, 75, 24], 0),
        (words(160, 60), 150, [61, 75, 14], 10),
        (words(150, 60), 150, [61, 75, 14], 0),
        (words(160, 60), 75, [75], 85),  # no further chunk for the tag to move to
        (words(225), 225, [75, 75, 75], 0),
        ("", None, [0], 0),
    ],
)
def test_where_a_long_caption_is_split(sdxl_tokenizers, caption, max_tokens, chunks, truncated):
    assert sdxl_tokenizers[0].get_vocab() == sdxl_tokenizers[1].get_vocab()
    (kept, dropped), second = (split_tokens(t, [caption], max_tokens)[0] for t in sdxl_tokenizers)
    assert (kept, dropped) == second
    assert ([len(chunk) for chunk in kept], len(dropped)) == (chunks, truncated)
    assert [token for chunk in (*kept, dropped) for token in chunk] == sdxl_tokenizers[0](caption).input_ids[1:-1]
    tokens = tokenize(sdxl_tokenizers, [caption], max_tokens)
    assert tokens.shape == (1, 2, 77 * (most_chunks(max_tokens) if max_tokens else len(chunks)))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from("aab,"), max_size=400).map(" ".join), min_size=1, max_size=3), st.integers(1, 4))
def test_no_caption_within_max_tokens_is_cut_or_depends_on_its_mates(sdxl_tokenizers, captions, number):
    max_tokens, (tokenizer, _) = 75 * number, sdxl_tokenizers
    inputs = TokenInputs(sdxl_tokenizers, max_tokens)
    (batch,) = inputs(captions, ())
    lengths = [len(tokens) - 2 for tokens in tokenizer(captions).input_ids]
    assert inputs.cut == Counter(max(0, length - max_tokens) for length in lengths)
    for caption, row, (chunks, rest) in zip(captions, batch, split_tokens(tokenizer, captions, max_tokens), strict=True):
        assert torch.equal(row, tokenize(sdxl_tokenizers, [caption], max_tokens)[0])
        assert [token for chunk in [*chunks, rest] for token in chunk] == tokenizer(caption).input_ids[1:-1]
        assert len(chunks) <= most_chunks(max_tokens) == len(row[0]) // 77


def test_the_most_chunks_occur(sdxl_tokenizers):
    for number in range(1, 6):
        caption = words(75 * number, *(56 * i - 1 for i in range(1, 9)))
        assert len(split_tokens(sdxl_tokenizers[0], [caption], None)[0][0]) == most_chunks(75 * number)


def test_chunks_are_encoded_one_by_one(pipe, denoiser):
    """Compares with transformers' encoders, called chunk by chunk: BOS and EOS around each, padding as of each tokenizer."""
    captions = ["a cat", words(160, 60), "", words(90)]
    context, pooled = denoiser.encode_text(tokenize(denoiser.tokenizers, captions, None))
    assert (context.shape, pooled.shape) == ((4, 3 * 77, 32 + 48), (4, 48))
    parts = [["a cat", "", ""], [words(61, 60), words(75), words(24)], None, [words(75), words(15), ""]]
    for i, texts in enumerate(parts):
        if texts is None:  # an empty caption
            assert not context[i].any()
            assert not pooled[i].any()
            continue
        tokens = by_transformers([pipe.tokenizer, pipe.tokenizer_2], texts)
        assert (tokens[:, :, 0] == pipe.tokenizer.bos_token_id).all()
        with torch.no_grad():
            first = pipe.text_encoder(tokens[:, 0], output_hidden_states=True)
            second = pipe.text_encoder_2(tokens[:, 1], output_hidden_states=True)
        wanted = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        torch.testing.assert_close(context[i], wanted.flatten(0, 1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pooled[i], second.text_embeds[0], atol=1e-6, rtol=1e-5)
    assert denoiser.encode_text(tokenize(denoiser.tokenizers, captions, 150))[0].shape[1] == 3 * 77


def test_an_empty_negative_prompt_is_the_same_for_short_and_long_prompts(pipe, denoiser):
    """The oracle is diffusers: None gives zeros if the model says so, an empty text is encoded."""
    for zeros in (True, False):
        denoiser.zero_empty = zeros
        pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
        for negative in (None, "", "b"):
            short, long = (denoiser.describe(prompt, negative) for prompt in ("a cat", words(160)))
            _, wanted, _, pooled = pipe.encode_prompt("a cat", negative_prompt=negative, device="cpu")
            for ours in (short, long):
                torch.testing.assert_close(ours["negative_prompt_embeds"][:, :77], wanted)
                torch.testing.assert_close(ours["negative_pooled_prompt_embeds"], pooled)
        (empty, _, pooled, _), ours = pipe.encode_prompt("", device="cpu"), denoiser.describe("", words(160))
        torch.testing.assert_close(ours["prompt_embeds"][:, :77], empty)
        torch.testing.assert_close(ours["pooled_prompt_embeds"], pooled)


def test_time_ids_equal_the_pipeline_and_are_exact(pipe):
    original, crop = torch.tensor([[1365, 777]]), torch.tensor([[0, 36]])
    dim = pipe.text_encoder_2.config.projection_dim
    wanted = pipe._get_add_time_ids((1365, 777), (0, 36), (1024, 1024), torch.float32, text_encoder_projection_dim=dim)
    ours = time_ids(original, crop, torch.tensor([[1024, 1024]]))
    assert torch.equal(ours, wanted)
    assert ours.dtype == torch.float32  # in bfloat16 1365 is 1368


def test_unet_call_equals_the_pipeline(pipe, denoiser):
    """One step of the pipeline without guidance: same latents, same prompt, same prediction."""
    calls = []
    forward = pipe.unet.forward

    def recorded(*args, **kwargs):
        calls.append((args, forward(*args, **kwargs)))
        return calls[-1][1]

    pipe.unet.forward = recorded
    pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0))
    pipe.unet.forward = forward
    (((latents, t), (expected,)),) = calls
    size = torch.tensor([[native_resolution(pipe)] * 2])
    ids = time_ids(size, torch.tensor([[0, 0]]), size)
    with torch.no_grad():
        ours = denoiser(latents, t, (tokenize(denoiser.tokenizers, ["a cat"]),), ids)
    torch.testing.assert_close(ours, expected)


def test_text_gradient_follows_the_parameters(denoiser):
    tokens = tokenize(denoiser.tokenizers, ["a cat"])
    assert not denoiser.encode_text(tokens)[0].requires_grad
    add_lora(denoiser, LoRAConfig(train_text_encoder=False), denoiser.unused)
    assert not denoiser.encode_text(tokens)[0].requires_grad
    add_lora(denoiser, LoRAConfig(targets="self_attn"), denoiser.unused)
    context, pooled = denoiser.encode_text(tokens)
    assert context.requires_grad
    assert pooled.requires_grad


def test_latents_are_a_scaled_sample_of_the_posterior(pipe):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    posterior = pipe.vae.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape)
    latents = sample_latents(pipe.vae, encode_pixels(pipe.vae, pixels), noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor)
    assert latents.shape == (2, 4, 8, 8)
    wanted = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(pipe.vae, latents), wanted)


def test_the_vae_is_never_float16(tiny_model):
    pipe = load_sdxl(str(tiny_model), torch.float16, torch.device("cpu"))
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16
    assert pipe.vae.dtype == torch.float32


# SDXL base in one file, without a network.


@pytest.fixture
def small_base(tiny_model, tmp_path, monkeypatch):
    """Puts a small model in the place of SDXL base. It has SDXL's two text widths, by which diffusers recognises SDXL."""
    folder = shutil.copytree(tiny_model, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    changed = {
        "unet": {"cross_attention_dim": 2048, "projection_class_embeddings_input_dim": 1280 + 6 * 8},
        "text_encoder": {"hidden_size": 768, "num_hidden_layers": 2},
        "text_encoder_2": {"hidden_size": 1280, "num_hidden_layers": 2, "projection_dim": 1280},
    }
    for part, fields in changed.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    monkeypatch.setattr("model.load.BASE", folder)
    return SimpleNamespace(**base_architecture())


@pytest.mark.parametrize("accelerate", [True, False])  # diffusers loads differently with it; the suite does not require it
def test_one_file_loads_every_weight(small_base, tmp_path, monkeypatch, accelerate):
    for module in ("single_file_model", "single_file_utils"):
        monkeypatch.setattr(f"diffusers.loaders.{module}.is_accelerate_available", lambda: accelerate)
    save_file(checkpoint_of(small_base), tmp_path / "model.safetensors")
    loaded = load_sdxl(str(tmp_path / "model.safetensors"), torch.float32, torch.device("cpu"))
    for name, model in vars(small_base).items():
        ours = getattr(loaded, name).state_dict()
        assert ours.keys() == model.state_dict().keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in model.state_dict().items())
    assert loaded.scheduler.config.prediction_type == "epsilon"
    assert loaded.tokenizer_2.pad_token == "!"


def test_a_checkpoint_that_predicts_v_says_so(small_base, tmp_path):
    flags = {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}
    save_file(checkpoint_of(small_base) | flags, tmp_path / "model.safetensors")
    loaded = load_sdxl(str(tmp_path / "model.safetensors"), torch.float16, torch.device("cpu"))
    assert loaded.unet.dtype == loaded.text_encoder_2.dtype == torch.float16
    assert torch.get_default_dtype() == torch.float32
    scheduler = loaded.scheduler
    assert scheduler.alphas_cumprod.dtype == torch.float32
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-6


def load_one(tensors: dict, folder, metadata: dict | None = None):
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return load_sdxl(str(folder / "model.safetensors"), torch.float32, torch.device("cpu"))


def refused(tensors: dict, message: str, folder, metadata: dict | None = None) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_one(tensors, folder, metadata)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_something_is_refused(small_base, tmp_path):
    complete = checkpoint_of(small_base)
    for index in random.Random(0).sample(range(len(complete)), 12):
        key = list(complete)[index]
        others = {name: tensor for name, tensor in complete.items() if name != key}
        if key.endswith("logit_scale"):  # nothing reads it
            continue
        refused(others, f"lacks {key} (1 of {len(complete)} tensors)", tmp_path)
        renamed = others | {f"{key}.weight": complete[key]}  # as many values as before
        refused(renamed, f"lacks {key} (1 of", tmp_path)
        refused(complete | {f"{key}.weight": torch.ones(1)}, f"has {key}.weight, which SDXL does not know", tmp_path)
        refused(complete | {key: torch.ones(3, 3, 3)}, f"has another shape of {key}", tmp_path)
    assert load_one({**complete, "model_ema.decay": torch.ones(1), "x.position_ids": torch.arange(77)}, tmp_path)


@pytest.mark.parametrize(
    ("said", "key", "predicts"),
    [
        (None, False, "epsilon"),
        ("epsilon", False, "epsilon"),
        ("v", False, "v_prediction"),
        ("v_prediction", False, "v_prediction"),
        ("v", True, "v_prediction"),
        ("epsilon", True, "contradicts itself"),
        ("flow", False, "predicts 'flow'"),
    ],
)
def test_header_or_key_says_what_a_checkpoint_predicts(small_base, tmp_path, said, key, predicts):
    metadata = {"modelspec.prediction_type": said} if said else None
    tensors = checkpoint_of(small_base) | ({"v_pred": torch.ones(1)} if key else {})
    if " " in predicts:
        refused(tensors, predicts, tmp_path, metadata)
    else:
        scheduler = load_one(tensors, tmp_path, metadata).scheduler
        assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == (predicts, False)


def test_checkpoints_of_other_kinds_are_refused_by_their_kind(small_base, tmp_path):
    tensors = checkpoint_of(small_base)
    refused({"lora_unet_mid.lora_up.weight": torch.ones(4, 4)}, "a LoRA belongs to --lora", tmp_path)
    refused(tensors | {"ztsnr": torch.ones(1)}, "predicts ε, but its last timestep is pure noise", tmp_path)
    conv_in = tensors["model.diffusion_model.input_blocks.0.0.weight"]
    inpainting = {"model.diffusion_model.input_blocks.0.0.weight": torch.cat([conv_in, conv_in, conv_in[:, :1]], dim=1)}
    refused(tensors | inpainting, "is an inpainting model: its U-Net takes 9 channels, not 4", tmp_path)
    refused(tensors | {"edm_mean": torch.ones(4)}, "a schedule of EDM cannot be used here", tmp_path)
    name = "conditioner.embedders.1.model.text_projection"
    others = {key: tensor for key, tensor in tensors.items() if key != name}
    refused(others | {f"{name}.weight": tensors[name].T.contiguous()}, f"it lacks {name} (1 of", tmp_path)
    integers = {"first_stage_model.quant_conv.bias": torch.ones(8, dtype=torch.int8)}
    refused(tensors | integers, "first_stage_model.quant_conv.bias is I8, which holds no weights", tmp_path)


# Diffusers folders.


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "copy")


def change_tensors(folder, part: str, change) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, {"format": "pt"})


def change_config(folder, part: str, **fields) -> None:
    name = part.removesuffix("_2")
    file = folder / part / (f"{name}_config.json" if name in ("scheduler", "tokenizer") else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def message_of(folder) -> str:
    with pytest.raises(UserError) as error:
        load_sdxl(str(folder), torch.float32, torch.device("cpu"))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"--model {folder}")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_a_folder_that_is_not_whole_is_refused_by_name(folder, part):
    (file,) = (folder / part).glob("*.safetensors")
    whole = load_file(file)
    for key in random.Random(part).sample(sorted(whole), 3):
        name = key.removeprefix("text_model.") if part == "text_encoder" else key
        change_tensors(folder, part, lambda tensors, key=key: {k: t for k, t in whole.items() if k != key})
        assert message_of(folder) == f" is no complete SDXL folder: {part} lacks {name} (1 of {len(whole)} tensors)"
        change_tensors(folder, part, lambda tensors: whole | {"foo.weight": torch.ones(3)})
        assert f"{part} has foo.weight, which SDXL does not know (1 of" in message_of(folder)
        change_tensors(folder, part, lambda tensors, key=key: whole | {key: torch.ones(7, 7)})
        assert f"{part} has another shape of {name} (1 of" in message_of(folder)
        change_tensors(folder, part, lambda tensors, key=key: whole | {key: torch.full_like(whole[key], torch.nan)})
        assert message_of(folder) == f": {part}.{name} is not finite in float32"
        change_tensors(folder, part, lambda tensors, key=key: whole | {key: whole[key].to(torch.int8)})
        assert f"{file}: {key} is I8, which holds no weights" in message_of(folder)
    save_file(whole, file, {"format": "pt"})
    assert read_sdxl(str(folder), torch.float32)


def test_a_weight_that_overflows_the_dtype_is_not_finite(folder):
    change_tensors(folder, "unet", lambda tensors: tensors | {"conv_in.bias": tensors["conv_in.bias"] + 1e6})
    with pytest.raises(UserError, match=r"unet\.conv_in\.bias is not finite in float16"):
        read_sdxl(str(folder), torch.float16)
    assert read_sdxl(str(folder), torch.float32)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_schedule_without_alphas_is_refused(folder, name):
    import diffusers

    getattr(diffusers, name)().save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    assert message_of(folder).startswith(f" has {name}, a schedule that cannot be used here")


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("scheduler", {"prediction_type": "sample"}, "predicts 'sample', as scheduler_config.json says"),
        ("scheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "a schedule that cannot be used"),
        ("scheduler", {"trained_betas": [0.1, 2.0]}, "a schedule that cannot be used"),
        ("vae", {"shift_factor": 0.1}, "the shift of the latents: 0.1"),
        ("vae", {"scaling_factor": float("nan")}, "cannot be used"),
        ("vae", {"scaling_factor": 0.0}, "not usable"),
        ("vae", {"latents_mean": [1.0, 2.0, 3.0], "latents_std": [1.0] * 4}, "not usable"),
        ("vae", {"latents_mean": [1.0] * 4}, "not usable"),
        ("unet", {"sample_size": None}, "no sample_size"),
        ("unet", {"sample_size": [8, 16]}, "no sample_size"),
        ("unet", {"act_fn": "rubbish"}, "is no complete SDXL folder: ValueError: "),
        ("scheduler", {"beta_start": "0.1"}, "is no complete SDXL folder: TypeError: "),
        ("scheduler", {"timestep_spacing": "rubbish"}, "is no complete SDXL folder: ValueError: rubbish"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "predicts ε, but its last timestep is pure noise"),
        ("scheduler", {"trained_betas": [0.1, 1.0]}, "predicts ε, but its last timestep is pure noise"),
        ("vae", {"scaling_factor": None}, "not usable"),
        ("vae", {"scaling_factor": "1"}, "not usable"),
        ("vae", {"latents_mean": 1.0, "latents_std": 1.0}, "not usable"),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, -1.0, 1.0]}, "not usable"),
        ("text_encoder", {"hidden_size": 7}, "is no complete SDXL folder: "),
        ("text_encoder_2", {"eos_token_id": 5}, "eos_token_id of text encoder 2"),
        ("tokenizer", {"model_max_length": None}, "tokenizer 1 is not the model's"),
        ("tokenizer_2", {"model_max_length": 50}, "tokenizer 2 is not the model's"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(folder, part, fields, message):
    change_config(folder, part, **fields)
    assert message.replace("cannot be used", "") in message_of(folder)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_is_not_the_models_is_refused(folder, name):
    """transformers makes one of two tokens where there is none."""
    shutil.rmtree(folder / name)
    assert "is not the model's: it has 2 tokens" in message_of(folder)


def test_each_part_has_its_own_variant(folder):
    """As after one part was exchanged: the others are there in half precision only."""
    whole = load_sdxl(str(folder), torch.float32, torch.device("cpu"))
    for part in ("unet", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    mixed = load_sdxl(str(folder), torch.float32, torch.device("cpu"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        half, wanted = part in ("unet", "text_encoder"), getattr(whole, part).state_dict()
        for key, tensor in getattr(mixed, part).state_dict().items():
            assert torch.equal(tensor, wanted[key].half().float() if half else wanted[key])


@pytest.mark.parametrize("said", ["v", "v_prediction", "eps", "epsilon"])
def test_every_name_of_a_prediction_reaches_the_scheduler(folder, said):
    change_config(folder, "scheduler", prediction_type=said)
    scheduler = read_sdxl(str(folder), torch.float32).scheduler
    assert scheduler.config.prediction_type == ("v_prediction" if said.startswith("v") else "epsilon")
    for sampler in SAMPLERS.values():  # DDIM's own default clips latents to [-1, 1]
        config = sampler.from_config(scheduler.config).config
        assert (config.prediction_type, config.get("clip_sample", False)) == (scheduler.config.prediction_type, False)


def test_zero_snr_comes_before_what_the_files_say(folder):
    for files, option in ((False, "yes"), (True, "no"), (True, "auto")):
        change_config(folder, "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr=files)
        scheduler = read_sdxl(str(folder), torch.float32, zero_snr=option).scheduler
        wanted = files if option == "auto" else option == "yes"
        assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == ("v_prediction", wanted)
        assert bool(scheduler.alphas_cumprod[-1] < 1e-6) == wanted


def test_zero_snr_is_refused_where_it_cannot_be(folder):
    with pytest.raises(UserError, match="predicts ε, but its last timestep is pure noise"):
        read_sdxl(str(folder), torch.float32, zero_snr="yes")
    change_config(folder, "scheduler", prediction_type="v_prediction")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("EulerDiscreteScheduler", "PNDMScheduler"))
    with pytest.raises(UserError, match="--zero-snr yes cannot be had with PNDMScheduler of"):
        read_sdxl(str(folder), torch.float32, zero_snr="yes")


def test_an_inpainting_folder_is_refused(folder):
    change_config(folder, "unet", in_channels=9)
    wide = {"conv_in.weight": torch.zeros(32, 9, 3, 3)}
    change_tensors(folder, "unet", lambda tensors: tensors | wide)
    assert message_of(folder) == " is an inpainting model: its U-Net takes 9 channels, not 4"


def test_another_class_of_a_part_is_refused(folder):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}))
    assert message_of(folder) == " is no SDXL: its vae is AutoencoderTiny, not AutoencoderKL"


def test_the_latents_of_a_vae_with_its_own_statistics_are_those_of_diffusers(folder):
    """The oracle: encoding and decoding in diffusers' image-to-image pipeline."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    statistics = {"latents_mean": [-1.6, 1.1, 3.2, -0.5], "latents_std": [8.4, 5.9, 9.5, 7.4]}
    change_config(folder, "vae", **statistics)
    pipe = load_sdxl(str(folder), torch.float32, torch.device("cpu"))
    assert "own mean and deviation" in describe_model(pipe)
    components = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    other = StableDiffusionXLImg2ImgPipeline(**components)
    pixels, seed = torch.rand(1, 3, 64, 64) * 2 - 1, 5
    generator = torch.Generator().manual_seed(seed)
    wanted = other.prepare_latents(pixels, None, 1, 1, torch.float32, "cpu", generator, add_noise=False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    latents = sample_latents(pipe.vae, encode_pixels(pipe.vae, pixels), noise)
    torch.testing.assert_close(latents, wanted)
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in statistics.values())
    decoded = pipe.vae.decode(latents * std / pipe.vae.config.scaling_factor + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(decode_latents(pipe.vae, latents), decoded)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.ckpt", b"PK\x03\x04", "is a pickle"),
        ("x.bin", b"\x80\x02}q", "is a pickle"),
        ("x.gguf", b"GGUF\x03\0\0\0", "is a GGUF file"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1", "run `git lfs pull`"),
        ("x.safetensors", b"<!DOCTYPE html>", "is a web page"),
        ("x.pt", b"", "is not a readable .safetensors file"),
        ("x", b"rubbish", "is not a readable .safetensors file"),
        ("x.SAFETENSORS", b"\x02\0\0\0\0\0\0\0{}", "must be renamed to end in .safetensors"),
    ],
)
def test_a_file_that_is_there_is_never_a_hub_id(tmp_path, monkeypatch, name, content, message):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    for model in (f"models/{name}", str(tmp_path / "models" / name)):
        with pytest.raises(UserError, match=re.escape(message)):
            read_sdxl(model, torch.float32)
    if "." in name:
        with pytest.raises(UserError, match="no such file or folder"):
            read_sdxl(f"models/other{name}", torch.float32)


def test_the_bundled_configurations_are_those_of_sdxl_base(sdxl_tokenizers):
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in base_architecture().items()}
    assert sizes == {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]  # "a photo of a cat", as CLIP's own tokenizer has it
    tokens = tokenize(sdxl_tokenizers, ["a photo of a cat"])[0]
    assert tokens[0].tolist() == cat + [49407] * 70
    assert tokens[1].tolist() == cat + [0] * 70


def test_bad_models(tmp_path, tiny_model):
    def load(model):
        load_sdxl(str(model), torch.float32, torch.device("cpu"))

    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", tmp_path / "x.safetensors"):
        with pytest.raises(UserError, match="no such file or folder"):
            load(missing)
    with pytest.raises(UserError, match=r"no model_index\.json"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="is no SDXL"):
        load(tmp_path)
    (tmp_path / "model_index.json").write_text((tiny_model / "model_index.json").read_text())
    with pytest.raises(UserError, match="no complete SDXL folder"):
        load(tmp_path)
    damaged = shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = damaged / "text_encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors is not a readable"):
        load(damaged)
    (tmp_path / "x.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"not a readable \.safetensors file"):
        load(tmp_path / "x.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"no SDXL base checkpoint: it lacks .* \(2[0-9]{3} of 2[0-9]{3} tensors\)$"):
        load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"hf download stabilityai/stable-diffusion-xl-base-1\.0"):
        load("sdxl")
    check_folder("tiny", tiny_model)
