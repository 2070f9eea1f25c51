"""The options of a training run, in groups; `swift sft` has them all."""

from __future__ import annotations

from dataclasses import dataclass

from megaswift.config.parse import BaseArguments, option


@dataclass(kw_only=True)
class StartArguments(BaseArguments):
    """Where training starts, and where the run goes."""

    train_backend: str = option("megatron", "Training engine.", ("megatron",))
    sft_type: str = option("full", "What is trained: all weights, or a LoRA adapter beside them.", ("full", "lora"))
    resume_from_checkpoint: str | None = option(
        None, "Megatron directory to start from, or a run directory to go on with; default: {model_type}-tp{tp}-pp{pp}."
    )
    resume: bool = option(
        False,
        "Go on with the newest run of this model type under output_dir; where there is none, start one. For requeued jobs.",
    )
    verify: bool = option(True, "Check the SHA-256 of a checkpoint's files before going on from it.")
    allow_data_change: bool = option(False, "Go on with a run although its data or its seed changed since.")
    output_dir: str = option("output", "Directory of all runs.")
    add_output_dir_suffix: bool = option(
        True, "Put each run in {output_dir}/{model_type}-tp{tp}-pp{pp}/vN-time; false: straight in output_dir."
    )
    overwrite: bool = option(False, "Replace an output directory that holds a run (with --add_output_dir_suffix false).")
    logging_dir: str | None = option(None, "TensorBoard directory; default: runs/ in the run's directory.")
    logging_steps: int = option(5, "Steps between two lines of logging.jsonl.", low=1, unit="steps")


@dataclass(kw_only=True)
class TaskArguments(BaseArguments):
    """What the model is made to say: words, or scores."""

    task_type: str = option(
        "causal_lm",
        "What is trained: a language model, or with seq_cls one that gives each row a class (or numbers), by a head of its own.",
        ("causal_lm", "seq_cls"),
    )
    num_labels: int | None = option(None, "seq_cls: number of classes; labels of rows are 0 to N - 1.", low=1)
    problem_type: str | None = option(
        None,
        "seq_cls: single_label_classification (a label is a class), multi_label_classification (a list of classes), or regression "
        "(a number, or a list of num_labels numbers); default: the first.",
        ("single_label_classification", "multi_label_classification", "regression"),
    )


@dataclass(kw_only=True)
class PlanningArguments(BaseArguments):
    """What is looked at before a run starts."""

    fit: str = option(
        "check",
        "A run that this machine's memory cannot hold: check refuses it before a process starts and names the smallest change that "
        "fits; true takes that change; false starts anyway.",
        ("check", "true", "false"),
    )
    dry_run: bool = option(
        False,
        "Resolve and check everything, prepare the data and build the model without memory, then end: only run.json and plan.json "
        "are written.",
    )


@dataclass(kw_only=True)
class FreezeArguments(BaseArguments):
    """Which weights stay as they are, with --sft_type full."""

    freeze_parameters: list[str] = option([], "Weights that stay as they are, by prefixes of their Hugging Face names.")
    freeze_parameters_regex: str | None = option(None, "The same by a regular expression that is found in the names.")
    freeze_parameters_ratio: float = option(
        0.0, "Share of all weights that stay as they are, from the embedding on.", low=0, high=1
    )
    trainable_parameters: list[str] = option(
        [], "Weights that are trained whatever the options above say, by prefixes of their names."
    )
    trainable_parameters_regex: str | None = option(None, "The same by a regular expression that is found in the names.")


@dataclass(kw_only=True)
class AdapterArguments(BaseArguments):
    """The adapter of --sft_type lora."""

    lora_rank: int = option(8, "Rank r of an adapter's two halves.", low=1)
    lora_alpha: float = option(32.0, "The adapter's product is multiplied by this / r.", above=0)
    lora_dropout: float = option(
        0.05, "Share of a layer's inputs that its adapter does not see in a step; the same at every layout.", low=0, below=1
    )
    target_modules: list[str] = option(
        ["all-linear"],
        "Hugging Face modules that get an adapter: all-linear (those in the blocks that every token goes through), all-experts, "
        "all-router, ends of names (q_proj), or regular expressions of whole names.",
    )
    modules_to_save: list[str] = option(
        [],
        "Modules that are trained whole and saved beside the adapter: norms, and embed_tokens and lm_head where they are two.",
    )
    use_rslora: bool = option(False, "Multiply by lora_alpha / sqrt(r) in place of lora_alpha / r.")
    use_dora: bool = option(
        False,
        "Train the length of every adapted row as well (DoRA); needs --lora_dropout 0. vLLM does not load it, but merged.",
    )
    lora_plus_lr_ratio: float | None = option(
        None, "Learning rate of every B, as a multiple of that of A (LoRA+); default: the same.", above=0
    )
    init_weights: str = option(
        "true",
        "How an adapter begins. true: A uniform, as PEFT does, B zero; gaussian: A normal with deviation 1 / r; pissa, olora: as the "
        "largest part of each matrix (singular values, QR), which the frozen weights then lack; pissa_niter_N: the same, quickly.",
        ("true", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"),
    )
    quantization_bit: int | None = option(
        None,
        "Bits in which the frozen weights of linear layers and experts are held: 4 (NF4, QLoRA) or 8 (int8, a scale for each row); "
        "default: their own precision.",
        (4, 8),
    )
    bnb_4bit_use_double_quant: bool = option(
        False, "With --quantization_bit 4 the scales are held in 8 bits, too: 0.52 bytes a weight in place of 0.56."
    )
    adapters: str | None = option(
        None, "Directory of an adapter in PEFT's form that training goes on from; its rank, alpha and modules are taken over."
    )


@dataclass(kw_only=True)
class ParallelArguments(BaseArguments):
    """What else is spread over processes."""

    sequence_parallel: bool = option(False, "Also split norms and residuals along the sequence; needs tp > 1.")
    cp: int = option(
        1,
        "Context parallel size: each row's tokens are split over this many processes, for long rows.",
        low=1,
        unit="processes",
    )
    vpp: int = option(
        1, "Chunks of layers of each pipeline stage, which take turns: processes wait less, and send more; needs pp > 1.", low=1
    )


@dataclass(kw_only=True)
class ExpertArguments(BaseArguments):
    """How tokens are routed, in models with experts."""

    moe_aux_loss_coeff: float = option(
        0.0, "Weight of the loss that balances the load of experts, in each layer by itself; 0: there is none.", low=0
    )
    moe_z_loss_coeff: float = option(0.0, "Weight of the loss that keeps routers' logits small; 0: there is none.", low=0)
    moe_router_dtype: str = option(
        "fp32", "Precision of the products by which tokens are routed; none: that of the model.", ("fp32", "fp64", "none")
    )


@dataclass(kw_only=True)
class EncodingArguments(BaseArguments):
    """What else decides the tokens of a row."""

    loss_scale: str = option(
        "default",
        "What carries loss: default (every answer), last_round, or all; with + ignore_empty_think, last_think or no_think, and "
        "JSON files of weights (regular expression -> weight), joined by +.",
    )
    template_date: str | None = option(None, "YYYY-MM-DD for templates that write the date; default: the day the run began.")
    parse_special_tokens: bool = option(True, "Read control tokens in text rows as tokens; false: as characters.")


@dataclass(kw_only=True)
class BatchArguments(BaseArguments):
    """Rows of a step, and how many steps."""

    batch_size: int = option(1, "Rows in one micro batch.", low=1, unit="rows")
    gradient_accumulation_steps: int | None = option(
        None, "Global batch = batch_size x this x processes; default: ceil(16 / batch_size / processes).", low=1
    )
    num_train_epochs: float = option(1, "How often each row is seen.", low=0, unit="epochs")
    max_steps: int = option(-1, "Stop after this many steps; -1: as many as the epochs take.", low=-1, unit="steps")
    packing: bool = option(False, "Join whole rows up to max_length; attention stays within each row.")
    padding_free: bool = option(True, "Lay the rows of a micro batch end to end; false: pad them to the longest.")
    group_by_length: bool = option(False, "Draw rows of similar length into one global batch.")
    data_cache: bool = option(True, "Keep tokenized rows in the cache and use them again.")
    streaming: bool = option(
        False, "Read training data from its front, only as far as --max_steps needs it: for data without a length."
    )
    dataloader_num_workers: int = option(
        1, "Threads that prepare micro batches ahead; 0: prepared when needed.", low=0, unit="threads"
    )


@dataclass(kw_only=True)
class OptimizerArguments(BaseArguments):
    """Optimizer and learning rate."""

    learning_rate: float = option(1e-5, "Largest learning rate.", low=0)
    min_lr: float | None = option(None, "Learning rate at the last step; default: a tenth of learning_rate.", low=0)
    lr_scheduler_type: str = option(
        "cosine",
        "Decay of the learning rate.",
        ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"),
    )
    warmup_ratio: float = option(0.05, "Share of the steps in which the learning rate rises.", low=0, below=1)
    warmup_steps: int = option(
        0, "Steps in which the learning rate rises; above 0 it replaces warmup_ratio.", low=0, unit="steps"
    )
    optim: str = option(
        "adamw_torch",
        "Optimizer: AdamW with fp32 moments, or with moments in bf16 or in 8 bits, which save 4 and 6 bytes a parameter.",
        ("adamw_torch", "adamw_torch_fused", "adamw_bf16", "adamw_8bit"),
    )
    weight_decay: float = option(0.1, "Decoupled weight decay; norms and biases are spared.", low=0)
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0: never.", low=0)
    adam_beta1: float = option(0.9, "Adam's decay of the mean of gradients.", low=0, below=1)
    adam_beta2: float = option(0.95, "Adam's decay of the mean of squared gradients.", low=0, below=1)
    adam_epsilon: float = option(1e-8, "Adam's addend in the denominator.", low=0)


@dataclass(kw_only=True)
class SavingArguments(BaseArguments):
    """Evaluation and checkpoints."""

    eval_steps: int = option(
        200, "Steps between two evaluations on the validation rows; one more comes at the end.", low=1, unit="steps"
    )
    save_steps: int | None = option(
        None, "Steps between two checkpoints; one more comes at the end; default: eval_steps.", low=1, unit="steps"
    )
    save_only_model: bool = option(
        False, "Leave optimizer and random states out of checkpoints; the run cannot be resumed then."
    )
    save_safetensors: bool = option(
        False,
        "Make a Hugging Face model of each checkpoint too (iter_NNNNNNN-hf), while training goes on; the last one is proven.",
    )
    save_total_limit: int | None = option(
        None,
        "Checkpoints to keep: the newest, and the best by validation loss even where that is one more; default: all.",
        low=1,
        unit="checkpoints",
    )
    async_save: bool = option(
        False, "Write checkpoints while training goes on: a step waits only for the copy to host memory, which must have room."
    )


@dataclass(kw_only=True)
class GuardArguments(BaseArguments):
    """What happens when something goes wrong."""

    nonfinite: str = option(
        "stop",
        "What a NaN or infinite loss or gradient does: stop the run, or skip the step without an update.",
        ("stop", "skip"),
    )
    skip_spikes: float = option(
        0.0, "Skip steps whose gradient norm is above this many times the median of the steps before; 0: none.", low=0
    )
    max_skipped_steps: int = option(10, "Skipped steps after which the run stops.", low=0, unit="steps")
    start_timeout: float = option(
        1800.0, "Seconds that start-up, loading or saving may take before the run is ended as hanging.", above=0, unit="seconds"
    )
    step_timeout: float = option(
        600.0, "Seconds that one step may take before the run is ended as hanging.", above=0, unit="seconds"
    )


@dataclass(kw_only=True)
class SpeedArguments(BaseArguments):
    """Kernels, memory and speed."""

    use_flash_attn: bool | None = option(
        None, "true: only the flash kernel; false: never; default: the fastest kernel for the device."
    )
    cuda_graphs: str = option(
        "auto",
        "Replay small models' layers as CUDA graphs; auto: where the first steps show that launching kernels takes the time.",
        ("auto", "true", "false"),
    )
    overlap_grad_reduce: bool | None = option(
        None, "Sum gradients during the backward pass, where ranks share data; default: on GPUs, from a billion parameters."
    )
    overlap_param_gather: bool | None = option(
        None, "Gather new weights while the next forward pass goes on; default: where gradients are reduced that way."
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third more work."
    )
    recompute_modules: str = option(
        "auto",
        "Parts of a layer to recompute in the backward pass: swiglu (nearly free), or mlp (its first product too: half of the "
        "memory or less, a fifth more work). auto: swiglu with adapters, and where memory is short.",
        ("auto", "none", "swiglu", "mlp"),
    )
    fp8: bool = option(
        False,
        "Linear layers of the blocks multiply in FP8, weight gradients in bf16: for GPUs of compute capability 8.9 and above.",
    )
    optimizer_cpu_offload: bool = option(
        False, "Keep master weights and moments in the host's memory, page-locked; the GPU still makes the update, over PCIe."
    )
    cpu_offloading_num_layers: int = option(
        0,
        "Layers of each process, from its first on, whose activations wait in the host's memory for the backward pass.",
        low=0,
        unit="layers",
    )
    deterministic: bool = option(False, "Only kernels that give the same bits in each run.")
