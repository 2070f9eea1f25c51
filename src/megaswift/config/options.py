"""The options of every `swift` command, as dataclasses built from small shared groups, and their parser.

Building them does no work: no file is read, no network, GPU or process group is touched. `parse(SftArguments, argv)`
is what the command line calls; a script builds the same classes directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megaswift.config.parse import REFUSED, BaseArguments, allowed, default_of, option, parse
from megaswift.config.preference import RLHF_TYPES, PreferenceArguments
from megaswift.config.text import NOT_OF_TEXT, TextArguments
from megaswift.config.training import (
    AdapterArguments,
    BatchArguments,
    EncodingArguments,
    ExpertArguments,
    FreezeArguments,
    GuardArguments,
    OptimizerArguments,
    ParallelArguments,
    PlanningArguments,
    SavingArguments,
    SpeedArguments,
    StartArguments,
    TaskArguments,
)

__all__ = ["REFUSED", "BaseArguments", "allowed", "default_of", "option", "parse"]


@dataclass(kw_only=True)
class ModelArguments(BaseArguments):
    """Which model, and in which precision."""

    model_type: str | None = option(
        None, "Registered name of the model, for example qwen2-7b-instruct or smollm2-135m-instruct."
    )
    model_id_or_path: str | None = option(None, "Local directory or hub id of the model; then model_type is optional.")
    model_revision: str | None = option(None, "Revision (branch, tag or commit) on the hub.")
    dtype: str = option(
        "AUTO",
        "Precision of the weights. AUTO: bf16 on a GPU that has it, fp32 on a CPU; export keeps the source's.",
        ("AUTO", "bf16", "fp16", "fp32"),
    )


@dataclass(kw_only=True)
class LayoutArguments(BaseArguments):
    """How the model is spread over processes."""

    tp: int = option(1, "Tensor parallel size: each matrix is split over this many processes.", low=1)
    pp: int = option(1, "Pipeline parallel size: the layers are split over this many stages.", low=1)
    ep: int = option(1, "Expert parallel size: the experts of each layer are spread over this many processes.", low=1)
    etp: int = option(1, "Expert tensor parallel size: the matrices of each expert are split over this many processes.", low=1)


@dataclass(kw_only=True)
class VocabularyArguments(BaseArguments):
    """Tokens that the model gets in addition to its own."""

    new_special_tokens: list[str] = option(
        [],
        "Special tokens to add, or .txt files with one a line: the tokenizer gets them, and the embedding a row for each, "
        "the mean of the old ones.",
    )


@dataclass(kw_only=True)
class PartArguments(BaseArguments):
    """Which part of a model is meant."""

    language_model_only: bool = option(
        False,
        "Of a model that reads pictures, too: train its text model; all other tensors are carried along as they are, and what is exported "
        "is the whole model.",
    )


@dataclass(kw_only=True)
class TemplateArguments(BaseArguments):
    """How a conversation becomes tokens."""

    template_type: str = option("AUTO", "Chat template by name; AUTO is the tokenizer's own, else the model type's.")
    system: str | None = option(
        None, "System prompt for rows that bring none; '' for no system prompt; default: the template's."
    )


@dataclass(kw_only=True)
class DataArguments(TemplateArguments):
    """Which rows are used, and how they are cut."""

    dataset: list[str] = option([], "Training data: [HF::|MS::]name|hub/id|file[:subset/...][#N], several separated by spaces.")
    val_dataset: list[str] = option([], "Validation data, in the same form; then nothing is taken from the training data.")
    dataset_test_ratio: float = option(
        0.01, "Share of each training dataset that becomes validation data; 0 for none.", low=0, below=1
    )
    dataset_seed: int | None = option(None, "Seed of sampling and of the validation split; default: --seed.")
    max_length: int = option(2048, "Longest sample; -1 for no limit.", low=2, also=-1, unit="tokens")
    truncation_strategy: str = option(
        "delete", "What happens to longer rows; each is counted.", ("delete", "truncation_left", "split")
    )
    columns: str | None = option(None, 'Column names to read under other names, as JSON: \'{"prompt_text": "query"}\'.')
    strict: bool = option(False, "Stop at the first bad row; otherwise bad rows are skipped, counted and shown.")
    model_name: list[str] = option([], "Name that self-cognition rows teach: Chinese and English, or one for both.")
    model_author: list[str] = option([], "Author that self-cognition rows teach: Chinese and English, or one for both.")
    custom_dataset_info: str | None = option(None, "More registered datasets: a JSON file, or JSON text.")


@dataclass(kw_only=True)
class ExportArguments(ModelArguments, LayoutArguments, VocabularyArguments, PartArguments):
    """`swift export`: between a Hugging Face folder and Megatron weights."""

    to_megatron: bool = option(False, "Convert a Hugging Face model to Megatron weights.")
    to_hf: bool = option(False, "Convert Megatron weights to a Hugging Face model.")
    ckpt_dir: str | None = option(None, "Megatron directory to convert: one made by --to_megatron, or a training run.")
    megatron_output_dir: str | None = option(None, "Where Megatron weights go; default: {model_type}-tp{tp}-pp{pp}.")
    hf_output_dir: str | None = option(None, "Where the Hugging Face model goes; default: {ckpt_dir}/{model_type}-hf.")
    iteration: int | None = option(None, "Which checkpoint of a run to convert; default: the newest complete one.", low=0)
    overwrite: bool = option(False, "Replace an output directory that exists.")
    verify: bool = option(
        True, "Prove the result: every tensor bit for bit, every config field, and logits against transformers."
    )
    allow_nonfinite: bool = option(
        False,
        "Convert weights that have NaN or infinite values; otherwise they are refused by name. Logits are not compared then.",
    )
    allow_pickle: bool = option(
        False,
        "Read a local folder that has only pytorch_model.bin files. Of the pickle nothing but tensors is read; no code runs.",
    )
    resume: bool = option(False, "Go on with a conversion that was interrupted: files that it completed are kept.")
    sign: str | None = option(None, "Ed25519 private key (PEM file) to sign the manifest with.")
    merge_lora: bool = option(
        False, "Of a run with an adapter: make the merged model, not the adapter; what its rounding loses is measured and told."
    )
    max_shard_size: str = option("5GB", "Largest safetensors file, for example 500MB or 5GB.", size=True)


@dataclass(kw_only=True)
class VerifyArguments(BaseArguments):
    """`swift verify DIR`: check a directory that this product made, and what it was made from."""

    FIRST_WORD: ClassVar[str] = "directory"

    directory: str | None = option(
        None, "Megatron directory, run or exported Hugging Face model; may stand without --directory."
    )
    deep: bool = option(False, "Hash every file again; otherwise sizes and records are compared.")
    public_key: str | None = option(None, "Ed25519 public key (PEM file) that must have signed the directory's manifest.")
    mtp: bool = option(
        False,
        "Of a Hugging Face model with layers that predict further ahead: measure how often they guess the model's own token, before training "
        "(where that folder is still there) and after.",
    )
    mtp_prompts: str | None = option(None, "Text file to measure that on, one prompt a line; default: built-in prompts.")


@dataclass(kw_only=True)
class FamiliesArguments(BaseArguments):
    """`swift families`: which models can be trained, and what of one model's config counts."""

    model_id_or_path: str | None = option(None, "Model folder on this machine, whose config is explained field by field.")
    markdown: bool = option(False, "Print the table as Markdown, as docs/families.md has it.")


@dataclass(kw_only=True)
class SftArguments(
    SpeedArguments, GuardArguments, SavingArguments, AdapterArguments, FreezeArguments, OptimizerArguments, BatchArguments,
    EncodingArguments, ExpertArguments, ParallelArguments, LayoutArguments, DataArguments, VocabularyArguments, PartArguments,
    ModelArguments, TaskArguments, PlanningArguments, StartArguments,
):  # fmt: skip
    """`swift sft`: fine-tuning with Megatron-Core, of all weights or of an adapter."""

    VERB: ClassVar[str] = "sft"


@dataclass(kw_only=True)
class RlhfArguments(PreferenceArguments, SftArguments):
    """`swift rlhf`: training from preferences, of all weights or of an adapter."""

    VERB: ClassVar[str] = "rlhf"
    FIRST: ClassVar[tuple[type, ...]] = (PreferenceArguments,)  # of the groups that --help shows


@dataclass(kw_only=True)
class PtArguments(TextArguments, SftArguments):
    """`swift pt`: continued pre-training on plain text, of all weights or of an adapter; or pre-training from nothing."""

    VERB: ClassVar[str] = "pt"
    FIRST: ClassVar[tuple[type, ...]] = (TextArguments,)
    MEANINGLESS: ClassVar[dict[str, str]] = NOT_OF_TEXT


@dataclass(kw_only=True)
class BackendArguments(ModelArguments, TemplateArguments):
    """Which trained model answers, and with what."""

    ckpt_dir: str | None = option(
        None,
        "Directory of the model: one made by `swift export --to_hf`, a Megatron directory (the newest complete checkpoint), or a LoRA adapter.",
    )
    adapters: list[str] = option(
        [],
        "Directory of a LoRA adapter in PEFT's form, which answers merged into its base; or one or more NAME=DIR, kept apart: requests and "
        "conversations choose by name. The base is the one that they name, unless the model is given.",
    )
    infer_backend: str = option(
        "AUTO",
        "What generates: pt is transformers; AUTO is vllm where a GPU and vLLM are there, else pt.",
        ("AUTO", "auto", "pt", "vllm"),
    )
    max_model_len: int | None = option(
        None, "Longest prompt and answer together; default: what the model allows.", low=2, unit="tokens"
    )
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory that vLLM takes.", above=0, high=1)
    tensor_parallel_size: int = option(1, "GPUs over which vLLM splits the model.", low=1, unit="GPUs")


@dataclass(kw_only=True)
class InferArguments(BackendArguments, DataArguments):
    """`swift infer`: a conversation in the terminal, or answers to a file of questions."""

    max_new_tokens: int = option(2048, "Longest answer.", low=1, unit="tokens")
    do_sample: bool = option(True, "Draw tokens at random; false: always the likeliest.")
    temperature: float = option(0.3, "Sharpness of the draw; 0 is greedy.", low=0)
    top_k: int = option(20, "Draw among this many likeliest tokens; 0: all.", low=0, unit="tokens")
    top_p: float = option(0.7, "Draw among the likeliest tokens that together reach this probability.", above=0, high=1)
    repetition_penalty: float = option(1.0, "Above 1, tokens that already appeared become less likely.", above=0)
    num_beams: int = option(1, "Beams of beam search; 1: none.", low=1)
    stop_words: list[str] = option([], "Texts at which an answer ends.")
    stream: bool = option(True, "Show the answer while it is made.")
    infer_batch_size: int = option(
        1, "Questions answered at once when a file is read; vLLM: as many as fit, unless given.", low=1, unit="questions"
    )
    show_dataset_sample: int = option(10, "Questions taken from val_dataset; -1: all.", low=0, also=-1, unit="questions")
    save_result: bool = option(True, "Write questions and answers to infer_result/.")
    result_dir: str | None = option(None, "Where results go; default: infer_result/ in the model's directory.")
    resume_result: bool = option(False, "Go on with the newest results file, where it holds the first of these questions.")
    load_dataset_config: bool = option(False, "Answer the validation rows of the run that made the model.")
    eval_human: bool | None = option(None, "Talk in the terminal; default: true when no dataset is given.")
    max_length: int = option(-1, "Longest prompt; -1: what the model allows.", low=1, also=-1, unit="tokens")


@dataclass(kw_only=True)
class DeployArguments(BackendArguments):
    """`swift deploy`: a model behind the OpenAI API, on this machine only unless --host says otherwise."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines in, so give --api_key with it.")
    port: int = option(8000, "Port to listen on; 0: any free one.", low=0, high=65535)
    api_key: str | None = option(None, "Key that requests must bring; default: the environment's MEGASWIFT_API_KEY, else none.")
    served_model_name: str | None = option(None, "Name of the model in requests; default: its model_type.")
    max_new_tokens: int = option(2048, "Longest answer, whatever a request asks for.", low=1, unit="tokens")
    max_body_size: str = option("4MB", "Largest request body, for example 500KB or 4MB.", size=True)
    max_concurrency: int = option(64, "Requests that wait or run at once; more get status 429.", low=1, unit="requests")
    infer_batch_size: int = option(8, "Waiting requests that pt answers together.", low=1, unit="requests")
    temperature: float = option(0.3, "Sharpness of the draw where a request gives none; 0 is greedy.", low=0)
    top_k: int = option(
        20, "Draw among this many likeliest tokens where a request gives no other number; 0: all.", low=0, unit="tokens"
    )
    top_p: float = option(
        0.7, "Draw among the likeliest tokens of this probability where a request gives none.", above=0, high=1
    )
    repetition_penalty: float = option(1.0, "Above 1, tokens that already appeared become less likely.", above=0)


@dataclass(kw_only=True)
class EvalArguments(BackendArguments):
    """`swift eval`: benchmarks for one model, or several models on the same questions."""

    compare: list[str] = option(
        [], "Two or more models to compare, as [title=]DIR or [title=]model_type; the first is the base."
    )
    eval_dataset: list[str] = option([], "Benchmarks: ceval, mmlu, gsm8k, arc, arc_easy, or names of --custom_eval_config.")
    preference_dataset: list[str] = option(
        [],
        "Held-out pairs, as swift rlhf reads them: the share in which the model puts the chosen answer first, by its score (reward models) or by "
        "the mean log-probability of the answer's tokens.",
    )
    eval_backend: str = option(
        "Native",
        "Who evaluates: Native is EvalScope's scoring, or ours where it is not installed.",
        ("Native", "lm-eval", "OpenCompass"),
    )
    eval_method: str = option(
        "generate",
        "generate: read the choice from an answer; loglikelihood: the choice that the model finds likeliest.",
        ("generate", "loglikelihood"),
    )
    eval_data_dir: str | None = option(None, "Directory with the benchmarks' own files or zips; default: they come from a hub.")
    eval_limit: int | None = option(
        None, "Questions of each benchmark, spread evenly over its subsets; default: all.", low=1, unit="questions"
    )
    eval_few_shot: int = option(0, "Solved examples before each question.", low=0, unit="examples")
    eval_batch_size: int = option(8, "Questions answered at once; vLLM: as many as fit, unless given.", low=1, unit="questions")
    eval_output_dir: str = option("eval_outputs", "Where results go, in {name}/{time}/.")
    name: str = option("", "Name of this evaluation in the output directory; default: default.")
    eval_use_cache: bool = option(
        False, "Take answers that an earlier evaluation in the output directory has for the same model and prompt."
    )
    custom_eval_config: str | None = option(
        None, "JSON list of own benchmarks: {name, pattern: ceval | general_qa, dataset: DIR, subset_list}."
    )
    max_new_tokens: int | None = option(None, "Longest answer; default: the benchmark's own limit.", low=1, unit="tokens")
    temperature: float = option(0.0, "Sharpness of the draw; 0 is greedy.", low=0)
    top_k: int = option(20, "Draw among this many likeliest tokens when temperature is above 0; 0: all.", low=0, unit="tokens")
    top_p: float = option(
        0.7, "Draw among the likeliest tokens of this probability when temperature is above 0.", above=0, high=1
    )
    repetition_penalty: float = option(1.0, "Above 1, tokens that already appeared become less likely.", above=0)


@dataclass(kw_only=True)
class CostArguments(BaseArguments):
    """On what, and how much of it."""

    gpus: int | None = option(None, "GPUs, or processes on a CPU; default: NPROC_PER_NODE x NNODES.", low=1, unit="GPUs")
    card: str | None = option(
        None,
        "H200, H100, A100-80G and others of the table, CPU, or a card's memory in GiB; default: what this machine has.",
    )
    price: float | None = option(None, "What a GPU costs an hour, in any currency.", low=0)
    train_rows: int | None = option(
        None, "Rows of training data, packed ones where --packing true; default: steps are told one by one.", low=1, unit="rows"
    )
    json: bool = option(False, "Print all figures as one JSON object.")


@dataclass(kw_only=True)
class PlanArguments(CostArguments, RlhfArguments):
    """`swift plan`: memory, time and money of a training run, before it is one, and the layouts that are best for it."""

    VERB: ClassVar[str] = "plan"
    FIRST: ClassVar[tuple[type, ...]] = (CostArguments,)


@dataclass(kw_only=True)
class DoctorArguments(BaseArguments):
    """`swift doctor`: would a run start on this machine, and what would make it slow?"""

    output_dir: str = option("output", "Where runs would go: its disk is looked at.")
    network: bool = option(False, "Ask whether the hubs can be reached; otherwise nothing is asked of the network.")
    distributed: bool = option(
        False,
        "Let all ranks (NPROC_PER_NODE x NNODES; default: the GPUs, or 2) exchange data, and name the slow or silent one.",
    )
    exchange_timeout: float = option(20.0, "Seconds after which a rank that does not answer is named.", above=0, unit="seconds")
    json: bool = option(False, "Print everything as one JSON object.")


@dataclass(kw_only=True)
class InspectArguments(SftArguments):
    """`swift data`: counts, lengths, duplicates and examples of the data that `swift sft` would train on."""

    MEANT: ClassVar[tuple[type, ...]] = (
        ModelArguments,
        VocabularyArguments,
        PartArguments,
        TemplateArguments,
        DataArguments,
        EncodingArguments,
        BatchArguments,
        AdapterArguments,
        FreezeArguments,
        TaskArguments,
    )

    rlhf_type: str | None = option(
        None, "Read rows as swift rlhf does for this method: both answers of pairs, or answers with labels (kto).", RLHF_TYPES
    )
    output: str | None = option(None, "Directory for a page (index.html) with all of it; default: the terminal only.")
    examples: int = option(3, "Samples to show in full, drawn at random.", low=0)


@dataclass(kw_only=True)
class ExpertsArguments(SftArguments):
    """`swift experts`: what the routers of a model with experts do with rows; no training."""

    MEANT: ClassVar[tuple[type, ...]] = (ModelArguments, PartArguments, TemplateArguments, DataArguments)

    compare: str | None = option(
        None,
        "Another model of the same shape, the one before fine-tuning as a rule: folder or hub id; shown beside it on the same rows.",
    )
    output: str | None = option(None, "Directory for a page (experts.html) and experts.json; default: the terminal only.")


@dataclass(kw_only=True)
class ParityArguments(SftArguments):
    """`swift parity`: does this run compute what it should?"""

    MEANT: ClassVar[tuple[type, ...]] = (
        ModelArguments, PartArguments, TemplateArguments, DataArguments, EncodingArguments, LayoutArguments, ParallelArguments, ExpertArguments, BatchArguments, OptimizerArguments, AdapterArguments, StartArguments, SpeedArguments,
    )  # fmt: skip

    steps: int = option(5, "Steps to compare.", low=1)
    layouts: str | None = option(
        None, 'Layouts to compare with the first, for example "tp1 tp2,sp pp2 tp2,pp2,dp2 recompute padded".'
    )
    learning: bool = option(
        False, "Train the whole run both ways, here and in transformers, and compare curves and final validation losses."
    )
    keep_dumps: bool = option(False, "Keep the gradients and weights of every step; with --learning the two trained models.")
