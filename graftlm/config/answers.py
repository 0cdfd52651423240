"""Options of TRL, PEFT, Axolotl, LLaMA-Factory and vLLM that have no field here, and what to write instead.

Values that ask for what Graft does anyway, or that do not change the result, are `harmless` and dropped; all others are refused
with the answer. Names that mean a field are in `aliases.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptionAnswer:
    """What to write instead of a foreign name."""

    text: str
    harmless: Collection[Any] | None = ()
    """Values that are dropped, since they ask for what Graft does anyway; None: every value."""


_TEMPLATE = "the chat template is the tokenizer's own; for another one put chat_template.jinja into the model's folder"
_COLUMNS = (
    "columns are recognized by their names: messages; prompt and completion; text. Rename the column, or see "
    "`graft check FILE` for what was recognized"
)
_PACKED = "examples are always packed without padding, and never attend to each other; leave it out"
_FUSED = "attention, norms, MLP and loss are fused where the result is verified to be the same; leave it out"
_LOADED = "rows are tokenized once, in this process, and drawn in a seeded order; leave it out"
_BASE_AS_IS = "the base is loaded as its own config.json says; change that file"
_EVAL_MEMORY = "--micro-batch-tokens bounds memory in training and in evaluation; leave it out"
_INITIAL = "A starts random and B at zero; initialization from the base's weights is not supported; leave it out"
_BEST = "the step with the lowest eval loss is saved; leave it out"
_LOGGED = "every step is in metrics.jsonl, and --track adds tensorboard, wandb or mlflow; leave it out"
_NAMED = "set it in the environment: WANDB_PROJECT, WANDB_ENTITY, MLFLOW_EXPERIMENT_NAME; a run is named after --out"
_PUBLISHED = "after the run: graft adapters publish OUT --name NAME, then graft adapters push OWNER/NAME NAME"
_SEVERAL_GPUS = (
    "give --ranks N, or start graft train with torchrun, and --layout shard to split the model (FSDP2); leave this out"
)
_ALWAYS_ON = "prefix caching, chunked prefill and JSON schemas are always on; leave it out"
_NO = (False, None, "none", "None", 0, "false")
_YES = (True, None, "auto", "true")


def _each(names: str, answer: OptionAnswer) -> dict[str, OptionAnswer]:
    return dict.fromkeys(names.split(), answer)


ANSWERS: dict[str, OptionAnswer] = {
    **_each(
        "base_model_config tokenizer_config tokenizer_type tokenizer",
        OptionAnswer("the tokenizer is the base model's own; put its files into that folder"),
    ),
    **_each("dataset_text_field field_messages dataset_kwargs", OptionAnswer(_COLUMNS)),
    **_each(
        "chat_template chat_template_path chat_template_jinja template",
        OptionAnswer(_TEMPLATE, ("tokenizer_default", "default", None)),
    ),
    **_each(
        "packing sample_packing padding_free eval_packing eval_sample_packing pad_to_sequence_len neat_packing "
        "packing_strategy "
        "pad_to_multiple_of group_by_length",
        OptionAnswer(_PACKED, None),
    ),
    **_each(
        "roles_to_train train_on_eos train_on_eot",
        OptionAnswer(
            "the loss counts the assistant's messages and the token that ends each; take --train-on all-assistant or "
            "last-assistant",
            ("turn", "all", "assistant", None),
        ),
    ),
    **_each(
        "dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataset_num_proc dataset_processes "
        "preprocessing_num_workers dataset_prepared_path overwrite_cache "
        "remove_unused_columns",
        OptionAnswer(_LOADED, None),
    ),
    **_each(
        "shuffle_dataset shuffle_merged_datasets",
        OptionAnswer("rows are shuffled by --seed; leave it out", _YES),
    ),
    "dataloader_drop_last": OptionAnswer("an epoch has every row; leave it out", _NO),
    "max_samples": OptionAnswer("the whole file is read; give a smaller one"),
    "streaming": OptionAnswer("the whole file is read; leave it out", _NO),
    **_each(
        "quantization_method bnb_4bit_quant_type",
        OptionAnswer(
            "4 bits are NF4 here: --base-precision nf4; checkpoints that are quantized already are loaded as they are",
            ("nf4", "bnb", "bitsandbytes"),
        ),
    ),
    **_each(
        "bnb_4bit_use_double_quant double_quantization",
        OptionAnswer("NF4 is stored with double quantization here; leave it out", _YES),
    ),
    "bnb_config_kwargs": OptionAnswer("give --base-precision nf4 or int8 instead"),
    **_each("tf32 bf16_full_eval", OptionAnswer("--compute-dtype is the matmul dtype; leave it out", None)),
    "fp16_full_eval": OptionAnswer(
        "--compute-dtype is the matmul dtype, and float16 is not supported; leave it out", _NO
    ),
    **_each(
        "attn_implementation flash_attn flash_attention flash_attention_2 use_flash_attention_2 sdp_attention "
        "xformers_attention "
        "flash_attn_rms_norm use_liger_kernel liger_kernel_config enable_liger_kernel use_unsloth torch_compile "
        "torch_compile_backend torch_compile_mode low_cpu_mem_usage",
        OptionAnswer(_FUSED, None),
    ),
    "plugins": OptionAnswer("there are no plugins; leave it out"),
    "neftune_noise_alpha": OptionAnswer("no noise is added to embeddings; leave it out", (None, 0, 0.0)),
    "device_map": OptionAnswer("give --device, such as cuda:0", ("auto", None)),
    **_each("model_init_kwargs overrides_of_model_config rope_scaling", OptionAnswer(_BASE_AS_IS, (None,))),
    "gpu_memory_limit": OptionAnswer("--micro-batch-tokens bounds memory; see `graft plan`"),
    "use_cache": OptionAnswer("training keeps no KV cache; leave it out", None),
    "special_tokens": OptionAnswer(
        "the special tokens are the tokenizer's own; change tokenizer_config.json in the model's folder"
    ),
    **_each(
        "trainable_token_indices peft_trainable_token_indices",
        OptionAnswer("give the tokens themselves, not their ids: --trainable-tokens TOKEN"),
    ),
    "tokens": OptionAnswer("give them as --trainable-tokens TOKEN"),
    **_each(
        "add_special_tokens resize_vocab",
        OptionAnswer("give the tokens as --trainable-tokens TOKEN; free rows of the matrix are used", _YES),
    ),
    **_each(
        "model_type is_llama_derived_model strict hub_token hf_use_auth_token hf_token",
        OptionAnswer(
            "what the model is comes from its config.json, and the token from `hf auth login`; leave it out", None
        ),
    ),
    **_each(
        "bias lora_bias", OptionAnswer("adapters have no biases here; --modules-to-save trains whole modules", _NO)
    ),
    **_each("task_type", OptionAnswer("Graft trains causal language models", ("CAUSAL_LM", None))),
    **_each("peft_type", OptionAnswer("adapters are LoRA here", ("LORA", None))),
    **_each(
        "inference_mode fan_in_fan_out auto_mapping base_model_name_or_path megatron_config ensure_weight_tying "
        "runtime_config "
        "layers_pattern init_type",
        OptionAnswer("it follows from the base; leave it out", None),
    ),
    "revision": OptionAnswer("give the folder of the wanted revision as --model", ("main", None)),
    **_each(
        "layers_to_transform peft_layers_to_transform",
        OptionAnswer(
            r"name the layers by pattern, such as "
            r"--targets 'layers\.(0|1)\..*'",
            (None,),
        ),
    ),
    "exclude_modules": OptionAnswer("name the layers to adapt with --targets", (None,)),
    **_each(
        "init_lora_weights loftq_config eva_config corda_config use_qalora pissa_init layer_replication "
        "alora_invocation_tokens "
        "arrow_config",
        OptionAnswer(_INITIAL, (True, None, "default", False)),
    ),
    "target_parameters": OptionAnswer("stacked experts are adapted by --targets", (None,)),
    "loraplus_lr_embedding": OptionAnswer(
        "one learning rate is used for A, embeddings and whole modules; leave it out"
    ),
    "create_new_adapter": OptionAnswer("merge the first adapter with graft merge, and train on the merged model", _NO),
    **_each(
        "per_device_eval_batch_size eval_batch_size auto_find_batch_size eval_accumulation_steps",
        OptionAnswer(_EVAL_MEMORY, None),
    ),
    **_each(
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio",
        OptionAnswer("the learning rate goes down to zero; leave it out", (None,)),
    ),
    **_each(
        "optim_args optim_target_modules use_galore use_apollo use_badam use_muon use_adam_mini",
        OptionAnswer(
            "take --optimizer adamw or adamw-8bit; for less memory see --optimizer-in-backward and `graft plan`", _NO
        ),
    ),
    "data_seed": OptionAnswer("one seed decides order, initial A and dropout: --seed"),
    **_each(
        "label_smoothing_factor router_aux_loss_coef use_dft_loss unfrozen_parameters freeze_trainable_layers",
        OptionAnswer(
            "the loss is the mean over the target tokens of a whole step, and nothing is added; leave it out",
            (*_NO, 0.0),
        ),
    ),
    "average_tokens_across_devices": OptionAnswer("the loss is the mean over the target tokens of a whole step", _YES),
    "loss_type": OptionAnswer("the loss is the mean over the target tokens of a whole step", ("nll", None)),
    "gradient_checkpointing_kwargs": OptionAnswer("give --activation-checkpointing", None),
    "overwrite_output_dir": OptionAnswer(
        "a folder that holds a run is never overwritten; take another --out, or --resume", _NO
    ),
    "evals_per_epoch": OptionAnswer("give --eval-every N; by default at most ten evaluations"),
    "saves_per_epoch": OptionAnswer("give --save-every N"),
    **_each(
        "eval_strategy evaluation_strategy",
        OptionAnswer("give --eval-every N; by default at most ten evaluations", ("steps", "no", False, None)),
    ),
    **_each(
        "do_eval eval_on_start",
        OptionAnswer("the base is evaluated first, then every --eval-every steps; leave it out", None),
    ),
    "eval_delay": OptionAnswer("the base is always evaluated first; leave it out", (0, None)),
    "save_strategy": OptionAnswer(
        "give --save-every N; the best step is always kept", ("steps", "no", "best", False, None)
    ),
    **_each(
        "load_best_model_at_end metric_for_best_model greater_is_better",
        OptionAnswer(_BEST, (True, None, "eval_loss", "loss", False)),
    ),
    "predict_with_generate": OptionAnswer(
        "graft train answers eval prompts with --score, and a comparison with --metric exact-match, rouge-l or bleu",
        _NO,
    ),
    **_each(
        "do_causal_lm_eval eval_causal_lm_metrics compute_accuracy",
        OptionAnswer("give --score exact-match, rouge-l, bleu or FILE.py:FUNCTION to graft train", _NO),
    ),
    "early_stopping_patience": OptionAnswer(
        "graft train has --early-stopping N; here --steps or --epochs bounds a run, and the best step is what is saved",
        (None,),
    ),
    **_each(
        "save_only_model save_safetensors logging_steps logging_dir logging_first_step logging_strategy "
        "disable_tqdm log_level "
        "plot_loss include_num_input_tokens_seen include_tokens_per_second",
        OptionAnswer(_LOGGED, None),
    ),
    "ddp_timeout": OptionAnswer(
        "a rank that shows no progress is ended after --rank-timeout seconds; leave it out", None
    ),
    **_each(
        "wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_log_model run_name "
        "mlflow_experiment_name project",
        OptionAnswer(_NAMED, (None,)),
    ),
    **_each(
        "push_to_hub hub_model_id hub_strategy hub_private_repo export_hub_model_id", OptionAnswer(_PUBLISHED, _NO)
    ),
    **_each(
        "deepspeed fsdp fsdp_config ddp ddp_find_unused_parameters local_rank context_parallel_size "
        "sequence_parallel_degree "
        "dp_shard_size",
        OptionAnswer(_SEVERAL_GPUS, (*_NO, "", -1)),
    ),
    "stage": OptionAnswer(
        "graft train is supervised fine-tuning; rows of text are trained in full as they are", ("sft", None)
    ),
    "do_train": OptionAnswer("graft train trains; leave it out", _YES),
    "do_predict": OptionAnswer("generate from the adapter with graft generate", _NO),
    **_each(
        "rl reward_model ref_model pref_beta rlhf_type",
        OptionAnswer("graft train is supervised fine-tuning; preference training is not supported", (None,)),
    ),
    **_each(
        "load_in_4bit load_in_8bit quantization_bit",
        OptionAnswer(
            "a comparison stores each method's base its own way: --methods lora,qlora, or lora:base-precision=int8", _NO
        ),
    ),
    # vLLM
    "served_model_name": OptionAnswer("the base is called by its hub id or the name of its folder"),
    "max_cpu_loras": OptionAnswer("adapters in memory are bounded by bytes, not by number: --adapter-memory-gb"),
    **_each(
        "enable_lora max_lora_rank lora_dtype fully_sharded_loras lora_extra_vocab_size",
        OptionAnswer("adapters of any rank are served together; leave it out", None),
    ),
    "lora_modules": OptionAnswer(
        "put the adapter into a store, and serve that: graft adapters import DIR --name NAME, then --store"
    ),
    **_each(
        "gpu_memory_utilization swap_space cpu_offload_gb num_gpu_blocks_override",
        OptionAnswer("--kv-cache-gb bounds the KV cache in GB"),
    ),
    "block_size": OptionAnswer("the KV cache has blocks of 16 tokens", (16, "16")),
    "kv_cache_dtype": OptionAnswer("the KV cache is in the compute dtype", ("auto",)),
    "max_model_len": OptionAnswer(
        "the model bounds prompt and answer together; bound a request with --max-prompt-tokens and --max-output-tokens"
    ),
    "load_format": OptionAnswer("checkpoints are safetensors", ("auto", "safetensors")),
    "api_key": OptionAnswer("write the keys into a file and give --api-keys FILE"),
    **_each("enable_prefix_caching enable_chunked_prefill", OptionAnswer(_ALWAYS_ON, _YES)),
    **_each(
        "enforce_eager disable_log_requests disable_log_stats scheduling_policy guided_decoding_backend "
        "structured_outputs_config",
        OptionAnswer(_ALWAYS_ON, None),
    ),
    "enable_auto_tool_choice": OptionAnswer(
        "tool calls are read where a request has tools; their form is found in the chat template, or is --tool-call-parser",
        _YES,
    ),
    **_each(
        "tensor_parallel_size pipeline_parallel_size data_parallel_size distributed_executor_backend",
        OptionAnswer(
            "one device serves here; for several take --engine vllm, which prints the command for these adapters",
            (1, "1", None),
        ),
    ),
    **_each("ssl_keyfile ssl_certfile root_path", OptionAnswer("put a proxy in front of the server")),
    **_each("tokenizer_mode download_dir", OptionAnswer("give the folder of the model as --model", ("auto", None))),
}
"""A foreign name that has no field here -> what to write instead."""
