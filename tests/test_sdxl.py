import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from errors import UserError
from lora import LoRAConfig, add_lora
from sdxl import check_folder, decode_latents, encode_pixels, load_sdxl, native_resolution, sample_latents, time_ids, tokenize

CAPTIONS = ["a cat", "", "a long caption " * 30]


def test_text_encoding_equals_the_pipeline(pipe, denoiser):
    context, _, pooled, _ = pipe.encode_prompt(["a cat", "two dogs on a hill"], device="cpu", do_classifier_free_guidance=False)
    ours = denoiser.encode_text(tokenize(denoiser.tokenizers, ["a cat", "two dogs on a hill"]))
    assert torch.equal(ours[0], context)
    assert torch.equal(ours[1], pooled)


def test_an_empty_caption_is_what_guidance_uses(pipe, denoiser):
    """Zeros where the model was trained so; else the encoding of the empty text."""
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
    assert tokens[2, 0, -1] == first.eos_token_id  # cut, but closed


def test_time_ids_equal_the_pipeline_and_are_exact(pipe):
    original, crop = torch.tensor([[1365, 777]]), torch.tensor([[0, 36]])
    dim = pipe.text_encoder_2.config.projection_dim
    wanted = pipe._get_add_time_ids((1365, 777), (0, 36), (1024, 1024), torch.float32, text_encoder_projection_dim=dim)
    ours = time_ids(original, crop, 1024)
    assert torch.equal(ours, wanted)
    assert ours.dtype == torch.float32  # in bfloat16 1365 is 1368


def test_unet_call_equals_the_pipeline(pipe, denoiser):
    """One step of the pipeline without guidance: same latents, same prompt, same prediction."""
    seen = {}
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: seen.setdefault("out", forward(*seen.setdefault("args", args), **kwargs))
    pipe("a cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", generator=torch.Generator().manual_seed(0))
    pipe.unet.forward = forward
    latents, t = seen["args"]
    ids = time_ids(torch.tensor([[64, 64]]), torch.tensor([[0, 0]]), native_resolution(pipe))
    with torch.no_grad():
        ours = denoiser(latents, t, tokenize(denoiser.tokenizers, ["a cat"]), ids)
    torch.testing.assert_close(ours, seen["out"][0])


def test_text_gradient_follows_the_parameters(denoiser):
    tokens = tokenize(denoiser.tokenizers, ["a cat"])
    assert not denoiser.encode_text(tokens)[0].requires_grad
    add_lora(denoiser, LoRAConfig(train_text_encoder=False), denoiser.unread)
    assert not denoiser.encode_text(tokens)[0].requires_grad
    add_lora(denoiser, LoRAConfig(targets="self_attn"), denoiser.unread)
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
    with pytest.raises(UserError, match="no complete SDXL folder"):
        load(damaged)
    (tmp_path / "x.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"no readable \.safetensors file"):
        load(tmp_path / "x.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no SDXL base checkpoint"):
        load(tmp_path / "x.safetensors")
    save_file({"conditioner.embedders.1.model.ln_final.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="hf download"):  # its configurations are not on this machine
        load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"hf download stabilityai/stable-diffusion-xl-base-1\.0"):
        load("sdxl")
    check_folder("tiny", tiny_model)
