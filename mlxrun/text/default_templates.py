"""Chat templates for models without one, chosen by the markers in the vocabulary."""

from __future__ import annotations

from collections.abc import Container
from typing import Final, NamedTuple

__all__ = ["DefaultTemplate", "default_template"]

_CHATML: Final = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

_LLAMA3: Final = """\
{{- bos_token -}}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
   + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif -%}"""

_GEMMA: Final = """\
{{- bos_token -}}
{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

_PHI3: Final = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

_LLAMA2: Final = """\
{%- set ns = namespace(system='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set ns.system = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + ns.system + message['content'] + ' [/INST]' }}
{%- set ns.system = '' -%}
{%- else -%}
{{ ' ' + message['content'] | trim + eos_token }}
{%- endif -%}
{%- endfor -%}"""

_PLAIN: Final = """\
{%- for message in messages -%}
{{ message['role'] | capitalize + ': ' + message['content'] | trim + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""

_BY_MARKERS: Final = (
    (("<|im_start|>", "<|im_end|>"), "ChatML's", _CHATML),
    (("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "llama 3's", _LLAMA3),
    (("<start_of_turn>", "<end_of_turn>"), "gemma's", _GEMMA),
    (("<|user|>", "<|assistant|>", "<|end|>"), "phi 3's", _PHI3),
    (("[INST]", "[/INST]"), "llama 2's", _LLAMA2),
)


class DefaultTemplate(NamedTuple):
    """A chat template for a model without one: whose it is, and its source."""

    name: str
    source: str

    @property
    def warning(self) -> str:
        return (
            f"no chat template in this file: probably a base model; using {self.name}. "
            "`mlxrun generate` (in Python: generate with a string) continues text"
        )


def default_template(tokens: Container[str]) -> DefaultTemplate:
    """A template whose markers are all tokens, else a plain dialogue."""
    for markers, name, source in _BY_MARKERS:
        if all(marker in tokens for marker in markers):
            return DefaultTemplate(name, source)
    return DefaultTemplate("a plain dialogue", _PLAIN)
