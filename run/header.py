"""What a run says of itself in the headers of its LoRA files, for the programs and the people that get them."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from dataset.sources import Source
from lora_files.write import without_folders
from model.load import MODELS
from model.prompts import Prompt, to_header
from options.training import LoRAConfig

MOST_TAGS = 200  # the commonest: a header is read whole before a file is listed
NETWORK_ARGS = {"conv_rank": "conv_dim", "conv_alpha": "conv_alpha", "rank_dropout": "rank_dropout"}  # kohya's names
TO_READ = 20_000  # captions of shards that are read for the tags


def file_stem(name: str | None, step: int) -> str:
    """A LoRA file's name without its extension."""
    return f"{name}-{step:06}" if name else f"pytorch_lora_weights_{step}"


def run_header(flags: dict[str, Any], source: Source, prediction_type: str, prompts: list[Prompt]) -> dict[str, str]:
    """What is true of all files of a run: what A1111 and Forge need to list them under SDXL, ModelSpec 1.0.1, our own
    `sdxl_lora.*`. `flags`: {option: value}; `prediction_type`: the scheduler's.
    """
    side = flags["resolution"]
    lora = LoRAConfig(flags["rank"], alpha=flags["alpha"], rank_stabilised=flags.get("rank_stabilised", False))
    several = flags.get("rank_pattern")  # ranks; with rsLoRA α follows them, as `rank_header` says it of any file
    network_args = {theirs: str(flags[own]) for own, theirs in NETWORK_ARGS.items() if flags.get(own)}
    given = {key: flags.get(key) for key in ("author", "description", "license")} | {"trigger_phrase": flags.get("trigger")}
    header = {f"modelspec.{key}": str(value) for key, value in given.items() if value} | {
        "ss_network_dim": "Dynamic" if several else str(flags["rank"]),
        "ss_network_alpha": "Dynamic" if several and lora.rank_stabilised else str(lora.stored_alpha(lora.rank)),
        "ss_network_args": json.dumps({"targets": flags["targets"]} | network_args),
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": str(source.samples),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "sdxl_lora.config": json.dumps(flags),
        "sdxl_lora.dataset": source.fingerprint,
    }
    if flags.get("tags") and (tags := tag_frequency(source)):
        header["ss_tag_frequency"] = json.dumps({"pictures": tags}, ensure_ascii=False)
    return header | base_model(str(flags["model"])) | to_header(prompts)


def step_header(name: str | None, step: int) -> dict[str, str]:
    """What is true of the file of one step."""
    stem = file_stem(name, step)
    return {"ss_output_name": stem, "modelspec.title": name or stem, "ss_steps": str(step), "sdxl_lora.step": str(step)}


def base_model(model: str) -> dict[str, str]:
    """Name of the base; of a single file also its SHA-256, by which A1111 and others know it. Reads all of it."""
    path, name = Path(model), str(without_folders(model))
    if model in MODELS or not path.is_file():
        return {"ss_sd_model_name": name}
    with path.open("rb") as file:
        return {"ss_sd_model_name": name, "ss_new_sd_model_hash": hashlib.file_digest(file, "sha256").hexdigest()}


def tag_frequency(source: Source) -> dict[str, int]:
    """{tag: number of captions with it} of the commonest tags, which commas separate; {} if the captions are on a server."""
    tags = Counter(tag for caption in source.local_captions(TO_READ) for tag in {part.strip() for part in caption.split(",")})
    return {tag: count for tag, count in tags.most_common(MOST_TAGS) if tag}
