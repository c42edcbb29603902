"""Cached latents and hidden states of text: the key.safetensors of one sample in a shard."""

import json

import torch
from safetensors.torch import load, save

from dataset.images import Decoded, Size

LATENTS = "safetensors"  # the extension of a sample of cached latents


def signature_of(metadata: bytes, name: str) -> tuple[float, ...]:
    """The signature 'vae' or 'text' that cache_latents.py writes into the .json of latents; () if there is none."""
    try:
        return tuple(float(value) for value in json.loads(metadata)[name])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()


def size_of_latents(encoded: bytes) -> tuple[Size, set[str]]:
    """((height, width) in pixels, names of the tensors) by the header of a safetensors file; (0, 0) if it holds no latents."""
    try:
        header = json.loads(encoded[8 : 8 + int.from_bytes(encoded[:8], "little")])
        _, height, width = header["posterior"]["shape"]
        if not all(type(side) is int and 0 < side < 2**16 for side in (height, width)):
            raise ValueError("impossible numbers")
        return (8 * height, 8 * width), set(header)
    except (ValueError, KeyError, TypeError, RecursionError):
        return (0, 0), set()


# Names of the tensors, by whether the image was mirrored.
LATENT_KEYS = {False: ("posterior", "crop", "mask"), True: ("mirrored", "mirrored_crop", "mirrored_mask")}
TEXT_KEYS = ("context", "pooled")


def pack_latents(latents: Decoded, mirrored: Decoded | None = None) -> bytes:
    """The latents of an image, and of its mirror image if there are any -> the bytes of key.safetensors in a shard, float16."""
    tensors = {"original_size": torch.tensor(latents.original)}
    for flip, part in ((False, latents), (True, mirrored)):
        values = (part.values, part.crop, part.mask) if part else ()
        tensors |= {name: torch.as_tensor(v) for name, v in zip(LATENT_KEYS[flip], values, strict=False) if v is not None}
    return save({name: (t.half() if t.is_floating_point() else t).contiguous() for name, t in tensors.items()})


def unpack_latents(encoded: bytes, flip: bool, masked: bool = False) -> Decoded:
    """The latents of an image, or if `flip` of its mirror image; with its loss mask if `masked`.

    Raises ValueError, or what safetensors raises, if it is damaged or not finite: one NaN would spoil the whole training.
    """
    tensors = load(encoded)
    original = tensors["original_size"]
    posterior, crop, *mask = (tensors[name] for name in LATENT_KEYS[flip][: 3 if masked else 2])
    _, height, width = posterior.shape
    wanted = [(torch.float16, (8, height, width)), *[(torch.int64, (2,))] * 2, *[(torch.uint8, (height, width))] * len(mask)]
    if [(tensor.dtype, tuple(tensor.shape)) for tensor in (posterior, original, crop, *mask)] != wanted:
        raise ValueError("its tensors are not those of latents")
    if not posterior.abs().max() < torch.inf:  # false for NaN too, and faster than isfinite().all()
        raise ValueError("its latents are not finite")
    (height, width), (top, left) = original.tolist(), crop.tolist()
    return Decoded(posterior.numpy(), (height, width), (top, left), mask[0].numpy() if mask else None)


def with_text(encoded: bytes, text: tuple[torch.Tensor, ...] | None) -> bytes:
    """Replaces the hidden states of text in packed latents: by context [K, 77, d1 + d2] and pooled [K, d2] of K captions, which
    are stored in float16, or by nothing.
    """
    tensors = {name: tensor for name, tensor in load(encoded).items() if name not in TEXT_KEYS}
    return save(tensors | dict(zip(TEXT_KEYS, (t.half().contiguous() for t in text or ()), strict=False)))


def unpack_text(encoded: bytes) -> tuple[torch.Tensor, ...]:
    """-> context [K, 77, d1 + d2], pooled [K, d2], float16. Raises ValueError if they are not finite."""
    tensors = load(encoded)
    text = tuple(tensors[name] for name in TEXT_KEYS)
    if not all(states.abs().max() < torch.inf for states in text):
        raise ValueError("its text is not finite")
    return text
