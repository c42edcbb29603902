"""The names that options have in kohya's sd-scripts and GUI and in diffusers' training scripts, and what they are here."""

SAME = {  # their name: the option here
    "pretrained_model_name_or_path": "model", "train_data_dir": "data", "image_dir": "data",
    "instance_data_dir": "data", "dataset_name": "data", "train_batch_size": "bs", "batch_size": "bs",
    "resolution": "resolution", "max_resolution": "resolution", "enable_bucket": "buckets",
    "bucket_reso_steps": "bucket_step", "flip_aug": "flip", "random_flip": "flip", "alpha_mask": "masked_loss",
    "masked_loss": "masked_loss", "max_data_loader_n_workers": "workers", "dataloader_num_workers": "workers",
    "caption_dropout_rate": "caption_dropout", "shuffle_caption": "shuffle_tags", "keep_tokens": "keep_tags",
    "reg_data_dir": "prior_data", "class_data_dir": "prior_data",
    "prior_loss_weight": "prior_weight", "caption_prefix": "trigger", "max_token_length": "max_tokens", "network_dim": "rank",
    "network_alpha": "alpha", "lora_alpha": "alpha", "use_rslora": "rank_stabilised", "rs_lora": "rank_stabilised",
    "scale_weight_norms": "max_norm", "loraplus_lr_ratio": "lora_plus", "learning_rate": "lr", "unet_lr": "lr",
    "conv_dim": "conv_rank", "conv_alpha": "conv_alpha", "rank_dropout": "rank_dropout",
    "text_encoder_lr": "text_encoder_lr", "network_train_unet_only": "no_train_text_encoder",
    "optimizer_type": "optimizer", "optimizer": "optimizer",
    "use_8bit_adam": "optimizer", "lr_scheduler": "lr_schedule", "lr_warmup_steps": "warmup",
    "lr_scheduler_min_lr_ratio": "min_lr", "max_grad_norm": "clip", "optimizer_args": "optimizer_args",
    "adam_epsilon": "eps", "adam_weight_decay": "weight_decay",
    "max_train_steps": "steps", "epoch": "epochs", "max_train_epochs": "epochs", "num_train_epochs": "epochs",
    "caption_extension": "caption_extension", "class_tokens": "caption", "instance_prompt": "caption",
    "network_weights": "init_lora", "lora_network_weights": "init_lora", "base_weights": "base_lora",
    "save_every_n_epochs": "save_every", "sample_every_n_steps": "sample_every",
    "gradient_accumulation_steps": "grad_accum", "seed": "seed",
    "ip_noise_gamma": "input_perturbation", "mixed_precision": "precision",
    "fp8_base": "base_precision", "gradient_checkpointing": "checkpointing",
    "output_dir": "out", "output_name": "name", "metadata_license": "license", "logging_dir": "log_dir",
    "save_every_n_steps": "save_every",
    "checkpointing_steps": "save_every", "save_last_n_steps": "keep", "checkpoints_total_limit": "keep",
    "save_precision": "save_dtype", "resume_from_checkpoint": "resume", "sample_prompts": "prompts",
    "validation_prompt": "prompts", "training_comment": "description", "metadata_author": "author",
    "metadata_description": "description",
}  # fmt: skip

REASONS = {  # what is done here: their names
    "the repeats of a folder are --data folder:x3": "num_repeats",
    "pictures of the class, with captions of their own, are --prior-data, mixed in by --prior-share":
        "dataset_repeats is_reg with_prior_preservation num_class_images class_prompt",
    "a percentage: --warmup is in steps, or a share as 0.05": "lr_warmup",
    "--lr-schedule is constant, linear, cosine, cosine-restarts:N, rex or wsd:SHARE":
        "lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_args lr_scheduler_type lr_num_cycles lr_power "
        "lr_scheduler_timescale lr_decay_steps",
    "--betas are both at once": "adam_beta1 adam_beta2",
    "--noise is offset:x or pyramid:LEVELS,DECAY":
        "noise_offset noise_offset_type multires_noise_iterations multires_noise_discount",
    "the strength of --noise is the same in every step": "adaptive_noise_scale noise_offset_random_strength",
    "--timesteps is LOW-HIGH, as in 200-800": "min_timestep max_timestep",
    "--weighting is min-snr:γ, soft-min-snr:γ or debiased": "min_snr_gamma snr_gamma debiased_estimation_loss",
    "--weighting already weighs v as it does ε": "scale_v_pred_loss_like_noise_pred v_pred_like_loss",
    "--loss is mse, l1, huber:δ or huber-snr:δ": "loss_type huber_c huber_schedule",
    "--prediction-type, which is measured": "v_parameterization",
    "--zero-snr, which is measured": "zero_terminal_snr",
    "plain LoRA, a new one: --targets and --conv-rank choose the layers":
        "network_module network_args algo preset dim_from_weights LoRA_type LyCORIS_preset "
        "conv_dims conv_alphas constrain decompose_both factor rescaled train_norm train_on_input unit "
        "use_cp use_scalar use_tucker block_lr_zero_threshold conv_block_dims conv_block_alphas",
    "--dora is for linear layers, without --conv-rank": "dora_wd use_dora wd_on_output wd_on_out",
    "learning rates of single blocks are --lr-pattern": "down_lr_weight mid_lr_weight up_lr_weight",
    "one ratio for all layers: --lora-plus": "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
    "ranks of single blocks are --rank-pattern, and --alpha is that of all": "block_dims block_alphas",
    "ranks are left out, image by image: --rank-dropout": "network_dropout module_dropout rank_dropout_scale",
    "buckets have the area of --resolution": "bucket_no_upscale min_bucket_reso max_bucket_reso",
    "--flip is the only augmentation": "color_aug random_crop center_crop face_crop_aug_range",
    "captions are used as they are: --caption-dropout, --shuffle-tags":
        "weighted_captions caption_dropout_every_n_epochs caption_tag_dropout_rate caption_suffix keep_tokens_separator "
        "secondary_separator enable_wildcard token_warmup_min token_warmup_step",
    "SDXL always takes the penultimate layer": "clip_skip",
    "--keep is a number of files": "save_last_n_epochs",
    "scripts/cache_latents.py does that once, before training":
        "cache_latents cache_latents_to_disk sdxl_cache_text_encoder_outputs cache_text_encoder_outputs "
        "cache_text_encoder_outputs_to_disk",
    "the VAE is that of --model": "vae pretrained_vae_model_name_or_path",
    "pictures are drawn at every save": "sample_every_n_epochs validation_epochs sample_sampler",
    "--text-encoder-until is a share of the run, as 0.6":
        "stop_text_encoder_training stop_text_encoder_training_pct",
    "states of another program cannot be resumed": "resume",
    "torchrun starts the processes": "multi_gpu num_processes num_machines gpu_ids",
    "every model is an SDXL": "v2 sdxl",
    "--lr is taken as it is": "scale_lr",
}  # fmt: skip

NOT_NEEDED = {  # why nothing needs to be said here: their names
    "the fastest attention is chosen: --attention":
        "xformers mem_eff_attn sdpa enable_xformers_memory_efficient_attention",
    "the memory plan decides: --vram-gb":
        "full_bf16 full_fp16 lowram highvram sdxl_no_half_vae no_half_vae vae_batch_size allow_tf32",
    "workers live as long as the run": "persistent_data_loader_workers num_cpu_threads_per_process",
    "logs are for TensorBoard, or with --log-to for Weights & Biases":
        "log_with report_to log_prefix log_tracker_name wandb_api_key wandb_run_name log_tracker_config logging_strategy",
    "the newest state is always saved, and LoRA files are .safetensors":
        "save_state save_last_n_steps_state save_state_on_train_end save_model_as",
    "nothing here depends on it":
        "no_token_padding tracker_project_name push_to_hub config_file dataset_config sample_at_first no_metadata",
    "its flags are read one by one": "additional_parameters",
    "kernels of our own are always used, and are faster than compiled blocks":
        "compile torch_compile dynamo_backend dynamo_mode dynamo_use_dynamic",
}  # fmt: skip

REMOVED = {"compile"}  # options of older commits, which are in the config.toml of their runs: read, and without effect

DIFFERENT = {name: reason for reason, names in REASONS.items() for name in names.split()}
NO_EFFECT = {name: reason for reason, names in NOT_NEEDED.items() for name in names.split()}
