"""Captions -> tokens of both text encoders, in chunks of 75."""

import math
from collections import Counter

import torch
from torch import Tensor
from transformers import CLIPTokenizer

BACKTRACK = 20  # tokens: A1111's default "comma_padding_backtrack"


def split_tokens(tokenizer: CLIPTokenizer, captions: list[str], max_tokens: int | None) -> list[tuple[list, list[int]]]:
    """For each caption (its chunks of up to 75 tokens, what is cut off beyond `max_tokens`), without BOS, EOS and padding.

    None: nothing is cut. Where another follows, a chunk ends after the last comma of its last 20 tokens, so that no tag is
    torn: A1111's modules/sd_hijack_clip.py, tokenize_line. So a caption may take more chunks than its tokens would fill.
    """
    room, comma, split = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>"), []
    for tokens in tokenizer(captions, add_special_tokens=False).input_ids:
        chunks: list[list[int]] = []
        rest = tokens[:max_tokens]
        while len(rest) > room:
            ends = [i + 1 for i in range(room - BACKTRACK, room + 1) if rest[i] == comma]
            end = min(room, max(ends, default=room))
            chunks, rest = [*chunks, rest[:end]], rest[end:]
        split.append(([*chunks, rest], tokens[len(tokens[:max_tokens]) :]))
    return split


def most_chunks(max_tokens: int, room: int = 75) -> int:
    """Of the captions of at most `max_tokens`: if each chunk but the last ends at a comma as early as it may."""
    return 1 + math.ceil(max(0, max_tokens - room) / (room - BACKTRACK + 1))


def tokenize(tokenizers: list[CLIPTokenizer], captions: list[str], max_tokens: int | None = 75) -> Tensor:
    """captions -> tokens [B, 2, 77·n] int64, one row for each text encoder. n is what `max_tokens` may need, so that the
    context of a caption does not depend on the others; None: what the longest caption needs.

    Each chunk has its own BOS and EOS, and the padding of its tokenizer; `max_tokens` as in `split_tokens`.
    """
    split = [[chunks for chunks, _ in split_tokens(t, captions, max_tokens)] for t in tokenizers]
    n = most_chunks(max_tokens) if max_tokens else max(len(chunks) for captioned in split for chunks in captioned)
    rows = [
        [close_chunks(t, chunks + [[]] * (n - len(chunks))) for chunks in captioned]  # of nothing: an empty caption's
        for t, captioned in zip(tokenizers, split, strict=True)
    ]
    return torch.stack([torch.tensor(row) for row in rows], dim=1)


def close_chunks(tokenizer: CLIPTokenizer, chunks: list[list[int]]) -> list[int]:
    """Chunks of up to 75 tokens -> 77 tokens for each, one after the other."""
    bos, eos, pad = [tokenizer.bos_token_id], [tokenizer.eos_token_id], [tokenizer.pad_token_id]
    room = tokenizer.model_max_length - 2
    return [token for chunk in chunks for token in bos + chunk + eos + pad * (room - len(chunk))]


# The `text` of a training step: an object that is called with the captions of every batch.


class TokenInputs:
    """Tokens, which the text encoders read in every step. Counts what is cut."""

    def __init__(self, tokenizers: list[CLIPTokenizer], max_tokens: int):
        self.tokenizers, self.max_tokens = tokenizers, max_tokens
        self.cut: Counter[int] = Counter()

    def __call__(self, captions: list[str], encoded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """-> (tokens [B, 2, 77·n],). `encoded` is ()."""
        self.cut = self.cut + Counter(len(rest) for _, rest in split_tokens(self.tokenizers[0], captions, self.max_tokens))
        return (tokenize(self.tokenizers, captions, self.max_tokens),)

    def advice(self) -> str | None:
        """For the end of a run: what to know about captions that were cut."""
        if not (most := max(self.cut, default=0)):
            return None
        share = f"{1 - self.cut[0] / self.cut.total():.1%} of the captions"
        return f"{share} have more than --max-tokens {self.max_tokens} and were cut, by up to {most} tokens"


class CachedText:
    """Captions that scripts/cache_latents.py has encoded. A dropped caption gets what the encoders make of the empty one."""

    def __init__(self, empty: tuple[Tensor, Tensor]):
        self.empty = empty

    def __call__(self, captions: list[str], encoded: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`encoded`: context [B, 77, d1 + d2] and pooled [B, d2] -> the same, with those of the empty caption put in."""
        context, pooled = encoded
        empty_context, empty_pooled = self.empty
        kept = torch.tensor([bool(caption) for caption in captions])
        context = torch.where(kept[:, None, None], context.to(empty_context.dtype), empty_context)
        return context, torch.where(kept[:, None], pooled.to(empty_pooled.dtype), empty_pooled)

    def advice(self) -> None:
        return None
