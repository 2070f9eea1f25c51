"""Registered models: the name a user types, both hub ids, the chat template and the family, one model a line.

Names and ModelScope ids are those of ms-swift 2.x; models that came later follow the same pattern. This file is data:
it imports nothing heavy, so that the command line can look up names at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megaswift.errors import UserError, nearest

# System message that a template adds when the user gives none; a template that is not here adds none.
TEMPLATE_SYSTEMS = {
    "qwen": "You are a helpful assistant.",
    "qwen2_5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "qwen2_5_math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}
BASE_TEMPLATE = "default-generation"  # what models without instruction tuning have


@dataclass(frozen=True)
class ModelType:
    """One registered model.

    Args:
        name: what `--model_type` takes.
        ms_id: id on ModelScope.
        hf_id: id on the Hugging Face hub.
        template: name of the chat template.
        family: `model_type` in the config.json of this model.
    """

    name: str
    ms_id: str
    hf_id: str
    template: str
    family: str

    @property
    def default_system(self) -> str | None:
        """The system message that the template adds by itself, or None."""
        return TEMPLATE_SYSTEMS.get(self.template)


_LLM = "LLM-Research/"
_AIM = "AI-ModelScope/"
_META = "meta-llama/"
_MISTRAL = "mistralai/"
_SMOL = "HuggingFaceTB/"
_GRANITE = "ibm-granite/granite-3.1-"


def _llama(name: str, ms_id: str, hf_id: str, template: str = BASE_TEMPLATE) -> ModelType:
    return ModelType(name, ms_id, hf_id, template, "llama")


def _mistral(name: str, ms_id: str, hf_id: str, template: str = BASE_TEMPLATE) -> ModelType:
    return ModelType(name, ms_id, hf_id, template, "mistral")


def _qwen2(name: str, repo: str, template: str = BASE_TEMPLATE) -> ModelType:
    return ModelType(name, f"qwen/{repo}", f"Qwen/{repo}", template, "qwen2")


def _qwen3(name: str, repo: str, template: str = "qwen3") -> ModelType:
    return ModelType(name, f"Qwen/{repo}", f"Qwen/{repo}", template, "qwen3")


def _moe(name: str, ms_id: str, hf_id: str, family: str, template: str = BASE_TEMPLATE) -> ModelType:
    return ModelType(name, ms_id, hf_id, template, family)


def _qwen3_moe(name: str, repo: str, template: str = "qwen3") -> ModelType:
    return _moe(name, f"Qwen/{repo}", f"Qwen/{repo}", "qwen3_moe", template)


def _same_names(family: str, prefix: str, ms: str, hf: str, names: dict[str, str]) -> list[ModelType]:
    """Models whose repositories have one name on both hubs: what follows the prefix in our name -> the repository."""
    return [ModelType(f"{prefix}-{end}", ms + repo, hf + repo, BASE_TEMPLATE, family) for end, repo in names.items()]


_REGISTERED = (
    # Qwen1.5
    _qwen2("qwen1half-0_5b", "Qwen1.5-0.5B"),
    _qwen2("qwen1half-1_8b", "Qwen1.5-1.8B"),
    _qwen2("qwen1half-4b", "Qwen1.5-4B"),
    _qwen2("qwen1half-7b", "Qwen1.5-7B"),
    _qwen2("qwen1half-14b", "Qwen1.5-14B"),
    _qwen2("qwen1half-32b", "Qwen1.5-32B"),
    _qwen2("qwen1half-72b", "Qwen1.5-72B"),
    _qwen2("qwen1half-110b", "Qwen1.5-110B"),
    _qwen2("qwen1half-0_5b-chat", "Qwen1.5-0.5B-Chat", "qwen"),
    _qwen2("qwen1half-1_8b-chat", "Qwen1.5-1.8B-Chat", "qwen"),
    _qwen2("qwen1half-4b-chat", "Qwen1.5-4B-Chat", "qwen"),
    _qwen2("qwen1half-7b-chat", "Qwen1.5-7B-Chat", "qwen"),
    _qwen2("qwen1half-14b-chat", "Qwen1.5-14B-Chat", "qwen"),
    _qwen2("qwen1half-32b-chat", "Qwen1.5-32B-Chat", "qwen"),
    _qwen2("qwen1half-72b-chat", "Qwen1.5-72B-Chat", "qwen"),
    _qwen2("qwen1half-110b-chat", "Qwen1.5-110B-Chat", "qwen"),
    _qwen2("codeqwen1half-7b", "CodeQwen1.5-7B"),
    _qwen2("codeqwen1half-7b-chat", "CodeQwen1.5-7B-Chat", "qwen"),
    # Qwen2
    _qwen2("qwen2-0_5b", "Qwen2-0.5B"),
    _qwen2("qwen2-0_5b-instruct", "Qwen2-0.5B-Instruct", "qwen"),
    _qwen2("qwen2-1_5b", "Qwen2-1.5B"),
    _qwen2("qwen2-1_5b-instruct", "Qwen2-1.5B-Instruct", "qwen"),
    _qwen2("qwen2-7b", "Qwen2-7B"),
    _qwen2("qwen2-7b-instruct", "Qwen2-7B-Instruct", "qwen"),
    _qwen2("qwen2-72b", "Qwen2-72B"),
    _qwen2("qwen2-72b-instruct", "Qwen2-72B-Instruct", "qwen"),
    _qwen2("qwen2-math-1_5b", "Qwen2-Math-1.5B", "qwen"),
    _qwen2("qwen2-math-1_5b-instruct", "Qwen2-Math-1.5B-Instruct", "qwen"),
    _qwen2("qwen2-math-7b", "Qwen2-Math-7B", "qwen"),
    _qwen2("qwen2-math-7b-instruct", "Qwen2-Math-7B-Instruct", "qwen"),
    _qwen2("qwen2-math-72b", "Qwen2-Math-72B", "qwen"),
    _qwen2("qwen2-math-72b-instruct", "Qwen2-Math-72B-Instruct", "qwen"),
    # Qwen2.5
    _qwen2("qwen2_5-0_5b", "Qwen2.5-0.5B"),
    _qwen2("qwen2_5-1_5b", "Qwen2.5-1.5B"),
    _qwen2("qwen2_5-3b", "Qwen2.5-3B"),
    _qwen2("qwen2_5-7b", "Qwen2.5-7B"),
    _qwen2("qwen2_5-14b", "Qwen2.5-14B"),
    _qwen2("qwen2_5-32b", "Qwen2.5-32B"),
    _qwen2("qwen2_5-72b", "Qwen2.5-72B"),
    _qwen2("qwen2_5-0_5b-instruct", "Qwen2.5-0.5B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-1_5b-instruct", "Qwen2.5-1.5B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-3b-instruct", "Qwen2.5-3B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-7b-instruct", "Qwen2.5-7B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-14b-instruct", "Qwen2.5-14B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-32b-instruct", "Qwen2.5-32B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-72b-instruct", "Qwen2.5-72B-Instruct", "qwen2_5"),
    # Qwen2.5-Math; its own template asks for the steps, so ours does too (ms-swift 2.x gave it the text of qwen2_5)
    _qwen2("qwen2_5-math-1_5b", "Qwen2.5-Math-1.5B"),
    _qwen2("qwen2_5-math-7b", "Qwen2.5-Math-7B"),
    _qwen2("qwen2_5-math-72b", "Qwen2.5-Math-72B"),
    _qwen2("qwen2_5-math-1_5b-instruct", "Qwen2.5-Math-1.5B-Instruct", "qwen2_5_math"),
    _qwen2("qwen2_5-math-7b-instruct", "Qwen2.5-Math-7B-Instruct", "qwen2_5_math"),
    _qwen2("qwen2_5-math-72b-instruct", "Qwen2.5-Math-72B-Instruct", "qwen2_5_math"),
    # Qwen2.5-Coder
    _qwen2("qwen2_5-coder-0_5b", "Qwen2.5-Coder-0.5B"),
    _qwen2("qwen2_5-coder-0_5b-instruct", "Qwen2.5-Coder-0.5B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-coder-1_5b", "Qwen2.5-Coder-1.5B"),
    _qwen2("qwen2_5-coder-1_5b-instruct", "Qwen2.5-Coder-1.5B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-coder-3b", "Qwen2.5-Coder-3B"),
    _qwen2("qwen2_5-coder-3b-instruct", "Qwen2.5-Coder-3B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-coder-7b", "Qwen2.5-Coder-7B"),
    _qwen2("qwen2_5-coder-7b-instruct", "Qwen2.5-Coder-7B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-coder-14b", "Qwen2.5-Coder-14B"),
    _qwen2("qwen2_5-coder-14b-instruct", "Qwen2.5-Coder-14B-Instruct", "qwen2_5"),
    _qwen2("qwen2_5-coder-32b", "Qwen2.5-Coder-32B"),
    _qwen2("qwen2_5-coder-32b-instruct", "Qwen2.5-Coder-32B-Instruct", "qwen2_5"),
    # Qwen3
    _qwen3("qwen3-0_6b", "Qwen3-0.6B"),
    _qwen3("qwen3-1_7b", "Qwen3-1.7B"),
    _qwen3("qwen3-4b", "Qwen3-4B"),
    _qwen3("qwen3-8b", "Qwen3-8B"),
    _qwen3("qwen3-14b", "Qwen3-14B"),
    _qwen3("qwen3-32b", "Qwen3-32B"),
    _qwen3("qwen3-0_6b-base", "Qwen3-0.6B-Base", BASE_TEMPLATE),
    _qwen3("qwen3-1_7b-base", "Qwen3-1.7B-Base", BASE_TEMPLATE),
    _qwen3("qwen3-4b-base", "Qwen3-4B-Base", BASE_TEMPLATE),
    _qwen3("qwen3-8b-base", "Qwen3-8B-Base", BASE_TEMPLATE),
    _qwen3("qwen3-14b-base", "Qwen3-14B-Base", BASE_TEMPLATE),
    _qwen3("qwen3-4b-instruct-2507", "Qwen3-4B-Instruct-2507", "qwen3_nothinking"),
    _qwen3("qwen3-4b-thinking-2507", "Qwen3-4B-Thinking-2507", "qwen3_thinking"),
    # Llama
    _llama("llama2-7b", "modelscope/Llama-2-7b-ms", _META + "Llama-2-7b-hf"),
    _llama("llama2-7b-chat", "modelscope/Llama-2-7b-chat-ms", _META + "Llama-2-7b-chat-hf", "llama"),
    _llama("llama2-13b", "modelscope/Llama-2-13b-ms", _META + "Llama-2-13b-hf"),
    _llama("llama2-13b-chat", "modelscope/Llama-2-13b-chat-ms", _META + "Llama-2-13b-chat-hf", "llama"),
    _llama("llama2-70b", "modelscope/Llama-2-70b-ms", _META + "Llama-2-70b-hf"),
    _llama("llama2-70b-chat", "modelscope/Llama-2-70b-chat-ms", _META + "Llama-2-70b-chat-hf", "llama"),
    _llama("llama3-8b", _LLM + "Meta-Llama-3-8B", _META + "Meta-Llama-3-8B"),
    _llama("llama3-8b-instruct", _LLM + "Meta-Llama-3-8B-Instruct", _META + "Meta-Llama-3-8B-Instruct", "llama3"),
    _llama("llama3-70b", _LLM + "Meta-Llama-3-70B", _META + "Meta-Llama-3-70B"),
    _llama("llama3-70b-instruct", _LLM + "Meta-Llama-3-70B-Instruct", _META + "Meta-Llama-3-70B-Instruct", "llama3"),
    _llama("llama3_1-8b", _LLM + "Meta-Llama-3.1-8B", _META + "Meta-Llama-3.1-8B"),
    _llama("llama3_1-8b-instruct", _LLM + "Meta-Llama-3.1-8B-Instruct", _META + "Meta-Llama-3.1-8B-Instruct", "llama3"),
    _llama("llama3_1-70b", _LLM + "Meta-Llama-3.1-70B", _META + "Meta-Llama-3.1-70B"),
    _llama("llama3_1-70b-instruct", _LLM + "Meta-Llama-3.1-70B-Instruct", _META + "Meta-Llama-3.1-70B-Instruct", "llama3"),
    _llama("llama3_1-405b", _LLM + "Meta-Llama-3.1-405B", _META + "Meta-Llama-3.1-405B"),
    _llama("llama3_1-405b-instruct", _LLM + "Meta-Llama-3.1-405B-Instruct", _META + "Meta-Llama-3.1-405B-Instruct", "llama3"),
    _llama("llama3_2-1b", _LLM + "Llama-3.2-1B", _META + "Llama-3.2-1B"),
    _llama("llama3_2-1b-instruct", _LLM + "Llama-3.2-1B-Instruct", _META + "Llama-3.2-1B-Instruct", "llama3_2"),
    _llama("llama3_2-3b", _LLM + "Llama-3.2-3B", _META + "Llama-3.2-3B"),
    _llama("llama3_2-3b-instruct", _LLM + "Llama-3.2-3B-Instruct", _META + "Llama-3.2-3B-Instruct", "llama3_2"),
    _llama("llama3_3-70b-instruct", _LLM + "Llama-3.3-70B-Instruct", _META + "Llama-3.3-70B-Instruct", "llama3_2"),
    # SmolLM2 (llama architecture)
    _llama("smollm2-135m", _SMOL + "SmolLM2-135M", _SMOL + "SmolLM2-135M"),
    _llama("smollm2-135m-instruct", _SMOL + "SmolLM2-135M-Instruct", _SMOL + "SmolLM2-135M-Instruct", "smollm2"),
    _llama("smollm2-360m", _SMOL + "SmolLM2-360M", _SMOL + "SmolLM2-360M"),
    _llama("smollm2-360m-instruct", _SMOL + "SmolLM2-360M-Instruct", _SMOL + "SmolLM2-360M-Instruct", "smollm2"),
    _llama("smollm2-1_7b", _SMOL + "SmolLM2-1.7B", _SMOL + "SmolLM2-1.7B"),
    _llama("smollm2-1_7b-instruct", _SMOL + "SmolLM2-1.7B-Instruct", _SMOL + "SmolLM2-1.7B-Instruct", "smollm2"),
    # SmolLM3 and ERNIE 4.5: the tokenizers of the chat models bring their templates
    ModelType("smollm3-3b", _SMOL + "SmolLM3-3B", _SMOL + "SmolLM3-3B", "chatml", "smollm3"),
    ModelType("smollm3-3b-base", _SMOL + "SmolLM3-3B-Base", _SMOL + "SmolLM3-3B-Base", BASE_TEMPLATE, "smollm3"),
    ModelType("ernie4_5-0_3b", "PaddlePaddle/ERNIE-4.5-0.3B-PT", "baidu/ERNIE-4.5-0.3B-PT", BASE_TEMPLATE, "ernie4_5"),
    ModelType(
        "ernie4_5-0_3b-base", "PaddlePaddle/ERNIE-4.5-0.3B-Base-PT", "baidu/ERNIE-4.5-0.3B-Base-PT", BASE_TEMPLATE, "ernie4_5"
    ),
    # Mistral
    _mistral("mistral-7b", _AIM + "Mistral-7B-v0.1", _MISTRAL + "Mistral-7B-v0.1"),
    _mistral("mistral-7b-v2", _AIM + "Mistral-7B-v0.2-hf", "alpindale/Mistral-7B-v0.2-hf"),
    _mistral("mistral-7b-instruct", _AIM + "Mistral-7B-Instruct-v0.1", _MISTRAL + "Mistral-7B-Instruct-v0.1", "llama"),
    _mistral("mistral-7b-instruct-v2", _AIM + "Mistral-7B-Instruct-v0.2", _MISTRAL + "Mistral-7B-Instruct-v0.2", "llama"),
    _mistral("mistral-7b-instruct-v3", _LLM + "Mistral-7B-Instruct-v0.3", _MISTRAL + "Mistral-7B-Instruct-v0.3", "llama"),
    _mistral("mistral-nemo-base-2407", _AIM + "Mistral-Nemo-Base-2407", _MISTRAL + "Mistral-Nemo-Base-2407"),
    _mistral(
        "mistral-nemo-instruct-2407",
        _AIM + "Mistral-Nemo-Instruct-2407",
        _MISTRAL + "Mistral-Nemo-Instruct-2407",
        "mistral-nemo",
    ),
    _mistral(
        "mistral-large-instruct-2407",
        _LLM + "Mistral-Large-Instruct-2407",
        _MISTRAL + "Mistral-Large-Instruct-2407",
        "mistral-nemo",
    ),
    _mistral(
        "mistral-small-instruct-2409",
        _AIM + "Mistral-Small-Instruct-2409",
        _MISTRAL + "Mistral-Small-Instruct-2409",
        "mistral-nemo",
    ),
    # Experts. The tokenizers of OLMoE's and Granite's chat models bring their templates.
    _qwen3_moe("qwen3-30b-a3b", "Qwen3-30B-A3B"),
    _qwen3_moe("qwen3-30b-a3b-base", "Qwen3-30B-A3B-Base", BASE_TEMPLATE),
    _qwen3_moe("qwen3-30b-a3b-instruct-2507", "Qwen3-30B-A3B-Instruct-2507", "qwen3_nothinking"),
    _qwen3_moe("qwen3-30b-a3b-thinking-2507", "Qwen3-30B-A3B-Thinking-2507", "qwen3_thinking"),
    _qwen3_moe("qwen3-235b-a22b", "Qwen3-235B-A22B"),
    _qwen3_moe("qwen3-235b-a22b-instruct-2507", "Qwen3-235B-A22B-Instruct-2507", "qwen3_nothinking"),
    _qwen3_moe("qwen3-235b-a22b-thinking-2507", "Qwen3-235B-A22B-Thinking-2507", "qwen3_thinking"),
    _moe("qwen1half-moe-a2_7b", "qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen1.5-MoE-A2.7B", "qwen2_moe"),
    _moe("qwen1half-moe-a2_7b-chat", "qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "qwen2_moe", "qwen"),
    _moe("qwen2-57b-a14b", "qwen/Qwen2-57B-A14B", "Qwen/Qwen2-57B-A14B", "qwen2_moe"),
    _moe("qwen2-57b-a14b-instruct", "qwen/Qwen2-57B-A14B-Instruct", "Qwen/Qwen2-57B-A14B-Instruct", "qwen2_moe", "qwen"),
    _moe("mixtral-moe-7b", _AIM + "Mixtral-8x7B-v0.1", _MISTRAL + "Mixtral-8x7B-v0.1", "mixtral"),
    _moe(
        "mixtral-moe-7b-instruct",
        _AIM + "Mixtral-8x7B-Instruct-v0.1",
        _MISTRAL + "Mixtral-8x7B-Instruct-v0.1",
        "mixtral",
        "llama",
    ),
    _moe("mixtral-moe-8x22b-v1", _AIM + "Mixtral-8x22B-v0.1", "mistral-community/Mixtral-8x22B-v0.1", "mixtral"),
    _moe("olmoe-1b-7b-0125", "allenai/OLMoE-1B-7B-0125", "allenai/OLMoE-1B-7B-0125", "olmoe"),
    _moe("olmoe-1b-7b-0125-instruct", "allenai/OLMoE-1B-7B-0125-Instruct", "allenai/OLMoE-1B-7B-0125-Instruct", "olmoe"),
    _moe("dots_llm1-base", "rednote-hilab/dots.llm1.base", "rednote-hilab/dots.llm1.base", "dots1"),
    _moe("dots_llm1-inst", "rednote-hilab/dots.llm1.inst", "rednote-hilab/dots.llm1.inst", "dots1"),
    _moe("granite3_1-1b-a400m-base", _GRANITE + "1b-a400m-base", _GRANITE + "1b-a400m-base", "granitemoe"),
    _moe("granite3_1-1b-a400m-instruct", _GRANITE + "1b-a400m-instruct", _GRANITE + "1b-a400m-instruct", "granitemoe"),
    _moe("granite3_1-3b-a800m-base", _GRANITE + "3b-a800m-base", _GRANITE + "3b-a800m-base", "granitemoe"),
    _moe("granite3_1-3b-a800m-instruct", _GRANITE + "3b-a800m-instruct", _GRANITE + "3b-a800m-instruct", "granitemoe"),
    _moe(
        "qwen3-next-80b-a3b-instruct", "Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next",
        "qwen3_nothinking",
    ),
    _moe(
        "qwen3-next-80b-a3b-thinking", "Qwen/Qwen3-Next-80B-A3B-Thinking", "Qwen/Qwen3-Next-80B-A3B-Thinking", "qwen3_next",
        "qwen3_thinking",
    ),
    *_same_names("gpt_oss", "gpt-oss", "openai-mirror/", "openai/", {"20b": "gpt-oss-20b", "120b": "gpt-oss-120b"}),
    # Dense models of other families, all of whose chat models bring their templates with their tokenizers.
    *_same_names("gemma2", "gemma2", _LLM, "google/", {
        "2b": "gemma-2-2b", "2b-instruct": "gemma-2-2b-it", "9b": "gemma-2-9b", "9b-instruct": "gemma-2-9b-it",
        "27b": "gemma-2-27b", "27b-instruct": "gemma-2-27b-it",
    }),
    *_same_names("gemma3_text", "gemma3", _LLM, "google/", {
        "270m": "gemma-3-270m", "270m-instruct": "gemma-3-270m-it", "1b": "gemma-3-1b-pt", "1b-instruct": "gemma-3-1b-it",
    }),
    *_same_names("phi3", "phi3", _LLM, "microsoft/", {
        "4b-4k-instruct": "Phi-3-mini-4k-instruct", "4b-128k-instruct": "Phi-3-mini-128k-instruct",
        "medium-4k-instruct": "Phi-3-medium-4k-instruct", "medium-128k-instruct": "Phi-3-medium-128k-instruct",
    }),
    *_same_names("phi3", "phi3_5", _LLM, "microsoft/", {"mini-instruct": "Phi-3.5-mini-instruct"}),
    *_same_names("phi3", "phi4", _LLM, "microsoft/", {"14b": "phi-4", "mini-instruct": "Phi-4-mini-instruct"}),
    *_same_names("glm", "glm4", "ZhipuAI/", "zai-org/", {"9b-hf": "glm-4-9b-hf", "9b-chat-hf": "glm-4-9b-chat-hf"}),
    *_same_names("glm", "glm_edge", "ZhipuAI/", "zai-org/", {"1_5b-chat": "glm-edge-1.5b-chat", "4b-chat": "glm-edge-4b-chat"}),
    *_same_names("glm4", "glm4_0414", "ZhipuAI/", "zai-org/", {
        "9b-chat": "GLM-4-9B-0414", "32b-base": "GLM-4-32B-Base-0414", "32b-chat": "GLM-4-32B-0414", "z1-9b": "GLM-Z1-9B-0414",
        "z1-32b": "GLM-Z1-32B-0414",
    }),
    *_same_names("granite", "granite3_1", "ibm-granite/", "ibm-granite/", {
        "2b-base": "granite-3.1-2b-base", "2b-instruct": "granite-3.1-2b-instruct", "8b-base": "granite-3.1-8b-base",
        "8b-instruct": "granite-3.1-8b-instruct",
    }),
    *_same_names("olmo2", "olmo2", "allenai/", "allenai/", {
        "1b": "OLMo-2-0425-1B", "1b-instruct": "OLMo-2-0425-1B-Instruct", "7b": "OLMo-2-1124-7B",
        "7b-instruct": "OLMo-2-1124-7B-Instruct", "13b": "OLMo-2-1124-13B", "13b-instruct": "OLMo-2-1124-13B-Instruct",
    }),
    *_same_names("olmo3", "olmo3", "allenai/", "allenai/", {
        "7b": "Olmo-3-1025-7B", "7b-instruct": "Olmo-3-7B-Instruct", "7b-think": "Olmo-3-7B-Think", "32b": "Olmo-3-1125-32B",
    }),
    *_same_names("seed_oss", "seed_oss", "ByteDance-Seed/", "ByteDance-Seed/", {
        "36b-base": "Seed-OSS-36B-Base", "36b-instruct": "Seed-OSS-36B-Instruct",
    }),
    *_same_names("exaone4", "exaone4", "LGAI-EXAONE/", "LGAI-EXAONE/", {
        "1_2b-instruct": "EXAONE-4.0-1.2B", "32b-instruct": "EXAONE-4.0-32B",
    }),
    *_same_names("hunyuan_v1_dense", "hunyuan", "Tencent-Hunyuan/", "tencent/", {
        "0_5b-instruct": "Hunyuan-0.5B-Instruct", "1_8b-instruct": "Hunyuan-1.8B-Instruct", "4b-instruct": "Hunyuan-4B-Instruct",
        "7b-instruct": "Hunyuan-7B-Instruct",
    }),
    *_same_names("helium", "helium1", "kyutai/", "kyutai/", {"2b": "helium-1-2b"}),
    *_same_names("arcee", "afm", "arcee-ai/", "arcee-ai/", {"4_5b-base": "AFM-4.5B-Base", "4_5b-instruct": "AFM-4.5B"}),
    *_same_names("starcoder2", "starcoder2", _AIM, "bigcode/", {"3b": "starcoder2-3b", "7b": "starcoder2-7b", "15b": "starcoder2-15b"}),
    *_same_names("nemotron", "minitron", "nvidia/", "nvidia/", {"4b-base": "Minitron-4B-Base", "8b-base": "Minitron-8B-Base"}),
    *_same_names("cohere", "c4ai-command-r", _AIM, "CohereLabs/", {"35b-chat": "c4ai-command-r-v01"}),
    *_same_names("deepseek_v2", "deepseek", "deepseek-ai/", "deepseek-ai/", {
        "v2": "DeepSeek-V2", "v2-chat": "DeepSeek-V2-Chat", "v2-lite": "DeepSeek-V2-Lite", "v2-lite-chat": "DeepSeek-V2-Lite-Chat",
        "v2_5": "DeepSeek-V2.5", "coder-v2-instruct": "DeepSeek-Coder-V2-Instruct", "coder-v2-lite-instruct": "DeepSeek-Coder-V2-Lite-Instruct",
    }),
    *_same_names("glm4_moe", "glm4_5", "ZhipuAI/", "zai-org/", {
        "355b": "GLM-4.5", "355b-base": "GLM-4.5-Base", "air": "GLM-4.5-Air", "air-base": "GLM-4.5-Air-Base",
    }),
    *_same_names("glm4_moe", "glm4_6", "ZhipuAI/", "zai-org/", {"357b": "GLM-4.6"}),
    *_same_names("glm4_moe", "glm4_7", "ZhipuAI/", "zai-org/", {"358b": "GLM-4.7"}),
    *_same_names("ernie4_5_moe", "ernie4_5", "PaddlePaddle/", "baidu/", {
        "21b-a3b": "ERNIE-4.5-21B-A3B-PT", "21b-a3b-base": "ERNIE-4.5-21B-A3B-Base-PT", "21b-a3b-thinking": "ERNIE-4.5-21B-A3B-Thinking",
        "300b-a47b": "ERNIE-4.5-300B-A47B-PT", "300b-a47b-base": "ERNIE-4.5-300B-A47B-Base-PT",
    }),
    *_same_names("hunyuan_v1_moe", "hunyuan", "Tencent-Hunyuan/", "tencent/", {
        "a13b-instruct": "Hunyuan-A13B-Instruct", "a13b-base": "Hunyuan-A13B-Pretrain",
    }),
    # Published in FP8, which `swift export` reads; and MiniMax M2, whose name on ModelScope is another.
    *_same_names("deepseek_v3", "deepseek", "deepseek-ai/", "deepseek-ai/", {
        "v3": "DeepSeek-V3", "v3-base": "DeepSeek-V3-Base", "v3-0324": "DeepSeek-V3-0324", "v3_1": "DeepSeek-V3.1", "v3_1-base": "DeepSeek-V3.1-Base",
        "r1": "DeepSeek-R1", "r1-0528": "DeepSeek-R1-0528",
    }),
    _moe("minimax-m2", "MiniMax/MiniMax-M2", "MiniMaxAI/MiniMax-M2", "minimax_m2"),
    *_same_names("deepseek_v3", "moonlight", "moonshotai/", "moonshotai/", {
        "16b-a3b": "Moonlight-16B-A3B", "16b-a3b-instruct": "Moonlight-16B-A3B-Instruct",
    }),
    *_same_names("cohere2", "c4ai-command-r7b", _LLM, "CohereLabs/", {"chat": "c4ai-command-r7b-12-2024"}),
)  # fmt: skip

MODEL_TYPES: dict[str, ModelType] = {entry.name: entry for entry in _REGISTERED}

# Second spellings, after the name on the hub. The name that a user typed is the name that directories get.
_ALIASES = {
    "mixtral-8x7b": "mixtral-moe-7b",
    "mixtral-8x7b-instruct": "mixtral-moe-7b-instruct",
    "mistral-7b-v0.1": "mistral-7b",
    "mistral-7b-v0.2": "mistral-7b-v2",
    "mistral-7b-instruct-v0.1": "mistral-7b-instruct",
    "mistral-7b-instruct-v0.2": "mistral-7b-instruct-v2",
    "mistral-7b-instruct-v0.3": "mistral-7b-instruct-v3",
}
for _alias, _name in _ALIASES.items():
    _entry = MODEL_TYPES[_name]
    MODEL_TYPES[_alias] = ModelType(_alias, _entry.ms_id, _entry.hf_id, _entry.template, _entry.family)


def model_type(name: str) -> ModelType:
    """The registered model of that name. Raises UserError naming the nearest ones."""
    if name not in MODEL_TYPES:
        raise UserError(
            f"model_type {name!r} is not registered.",
            where="--model_type",
            fix=f"nearest: {nearest(name, list(MODEL_TYPES))}; for any other model give --model_id_or_path DIR",
        )
    return MODEL_TYPES[name]


def by_hub_id(hub_id: str) -> ModelType | None:
    """The registered model with that ModelScope or Hugging Face id (case does not matter), or None."""
    wanted = hub_id.lower()
    return next((entry for entry in _REGISTERED if wanted in (entry.ms_id.lower(), entry.hf_id.lower())), None)


def type_for_directory(path: Path | str) -> str | None:
    """The model_type that a model directory tells by itself, or None.

    Asked in this order: sft_args.json and export_args.json (then any name is taken), `_name_or_path` in config.json, the
    name of the directory: a registered name (also with "-hf" behind it), the name of a hub repository, or its place in a
    hub cache. The last three count only where config.json has the family of the registered model.
    """
    directory = Path(path)
    for file in ("sft_args.json", "export_args.json"):
        told = _read_json(directory / file).get("model_type")
        if isinstance(told, str) and told:
            return told
    config = _read_json(directory / "config.json")
    for guess in _guesses(directory, config):
        if guess is not None and guess.family == config.get("model_type"):
            return guess.name
    return None


def _guesses(directory: Path, config: dict) -> list[ModelType | None]:
    """Registered models that the config or the name of a directory points to, best first."""
    guesses: list[ModelType | None] = []
    told = config.get("_name_or_path")
    if isinstance(told, str):
        guesses.append(by_hub_id(told))
    name = repository_name(directory)
    guesses += [MODEL_TYPES.get(name.lower()), MODEL_TYPES.get(name.lower().removesuffix("-hf"))]
    repositories = {
        part.lower(): entry for entry in _REGISTERED for part in (entry.ms_id.split("/")[1], entry.hf_id.split("/")[1])
    }
    return [*guesses, repositories.get(name.lower())]


def repository_name(directory: Path | str) -> str:
    """The name of a model directory; inside a hub cache, that of the repository.

    `.../models--Qwen--Qwen2.5-7B/snapshots/<sha>` and `.../Qwen2___5-7B` both give "Qwen2.5-7B".
    """
    place = Path(directory).absolute()
    cached = place.parent.name == "snapshots"
    name = place.parent.parent.name if cached else place.name
    return (name.split("--")[-1] if cached or name.startswith("models--") else name).replace("___", ".")


def _read_json(path: Path) -> dict:
    """The object in a JSON file, or an empty one: a guess must not fail where the reader will report the file anyway."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
