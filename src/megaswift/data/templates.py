"""Chat templates by name, for tokenizers that bring none and for `--template_type`; and the Jinja that runs any of them.

Each is Jinja over messages, bos_token and eos_token, as tokenizers bring it. `needs` lists the control tokens that the
tokenizer must know.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from megaswift.errors import UserError, nearest


@dataclass(frozen=True)
class NamedTemplate:
    """A template, the system prompt of rows that bring none, and the control tokens that it writes."""

    source: str
    default_system: str | None = None
    needs: tuple[str, ...] = ()


CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# Llama 2: the system prompt stands inside the first user turn.
LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message.content + ' [/INST]' -}}
{%- elif message.role == 'assistant' -%}{{- ' ' + message.content + ' ' + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant turns may follow the system prompt') -}}{%- endif -%}
{%- endfor -%}
"""

# Mistral: the system prompt stands before the first user text, at training and at inference alike.
MISTRAL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system = messages[0].content + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{%- if message.role == 'user' -%}{{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' -}}
{%- elif message.role == 'assistant' -%}{{- ' ' + message.content + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant turns may follow the system prompt') -}}{%- endif -%}
{%- endfor -%}
"""

PLAIN = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}{{- '### Human:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}{{- '### Assistant:\\n' + message.content + eos_token + '\\n\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}
"""

# Qwen3: an empty think block before the last answer unless the row brings thoughts; thoughts of earlier turns are left out.
QWEN3 = """\
{%- set ns = namespace(last_user=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and loop.index0 > ns.last_user and (message.reasoning_content or loop.last) -%}
{{- '<think>\\n' + (message.reasoning_content or '') | trim + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

_IM = ("<|im_start|>", "<|im_end|>")

TEMPLATES = {
    "chatml": NamedTemplate(CHATML, None, _IM),
    "qwen": NamedTemplate(CHATML, "You are a helpful assistant.", _IM),
    "qwen2_5": NamedTemplate(CHATML, "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", _IM),
    "qwen3": NamedTemplate(QWEN3, None, _IM),
    "smollm2": NamedTemplate(CHATML, "You are a helpful AI assistant named SmolLM, trained by Hugging Face", _IM),
    "llama3": NamedTemplate(LLAMA3, None, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "llama2": NamedTemplate(LLAMA2),
    "mistral": NamedTemplate(MISTRAL),
    "default": NamedTemplate(PLAIN),
}


class TemplateRaised(Exception):
    """The template itself refused a conversation through raise_exception."""


@lru_cache(maxsize=32)
def compile_template(source: str, date: str = "") -> Any:
    """A compiled template; `.render(messages=..., tools=..., add_generation_prompt=..., bos_token=...)`.

    Args:
        date: YYYY-MM-DD that a template is given which asks for the time; "" for the moment of rendering.
    """
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks assistant text for transformers; here it only has to parse."""

        tags = {"generation"}  # jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: (datetime.fromisoformat(date) if date else datetime.now()).strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template is not valid Jinja: {error}.",
            where="chat_template",
            fix="choose a template by name with --template_type",
        ) from error


def _raise(message: str) -> None:
    raise TemplateRaised(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON; Jinja's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# Names of ms-swift that stand for one of the templates above.
ALIASES = {
    "default-generation": "default",
    "llama": "llama2",
    "llama3_2": "llama3",
    "mistral-nemo": "mistral",
    "qwen2_5_math": "qwen2_5",
    "qwen3_thinking": "qwen3",
    "qwen3_nothinking": "qwen3",
}


def template_name(name: str) -> str:
    """The name of a template in `TEMPLATES`, or `name` itself where it is not known."""
    return ALIASES.get(name, name)


def choose_source(tokenizer: Any, template_type: str, fallback: str | None) -> tuple[str, str | None, str, str | None]:
    """The template of a tokenizer, or a named one, for ChatTemplate; its arguments are meant.

    Returns (Jinja source, that of conversations with tools where it is another, name, default system prompt). Raises
    UserError for a name that is not known, and where there is none.
    """
    own = getattr(tokenizer, "chat_template", None)
    # A tokenizer may bring several by name, of which transformers uses these two by itself.
    named = {key: text for key, text in (own if isinstance(own, dict) else {"default": own}).items() if text and text.strip()}
    if template_type == "AUTO" and "default" in named:
        return named["default"], named.get("tool_use"), "AUTO", None
    name = fallback if template_type == "AUTO" else template_type
    name = template_name(name) if name is not None else None
    if name is None:
        several = f" that is its default, only: {', '.join(sorted(named))}" if named else ""
        raise UserError(
            f"the tokenizer brings no chat template{several}.",
            where="--template_type",
            fix=f"choose one: {', '.join(TEMPLATES)}",
        )
    if name not in TEMPLATES:
        raise UserError(
            f"template {name!r} is not known.", where="--template_type", fix=f"did you mean: {nearest(name, list(TEMPLATES))}?"
        )
    return TEMPLATES[name].source, None, name, TEMPLATES[name].default_system
