"""Which options of chat completions are refused by name, and which are accepted without effect.

An option that would change the output and cannot be honoured is refused unless it has one of its harmless values.
Everything that is neither here nor in the request struct is unknown: accepted, ignored, and named in the log.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from api.protocols.parameters import BadParameter
from scheduler.errors import UnsupportedOption

# What each option may be without changing the output; null is always harmless.
REFUSED: dict[str, tuple[object, ...]] = {
    "adapters": (),
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (True,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "reasoning": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}

HINTS = frozenset(
    {
        "cache_salt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "session_id",
        "store",
        "stream_interval",
        "user",
        "verbosity",
        "vllm_xargs",
        "web_search_options",
    }
)

_MAX_NAMED = 16


def check_refused(fields: Mapping[str, msgspec.Raw]) -> None:
    """Raise UnsupportedOption for the first option that is asked to do what cannot be done yet."""
    for name in fields.keys() & REFUSED.keys():
        value = _plain(name, fields[name])
        if name == "tools" and value == []:
            raise BadParameter("Invalid 'tools': empty array.", param="tools", reason="empty_array")
        if value is not None and not _is_harmless(value, REFUSED[name]):
            raise UnsupportedOption(
                f"'{name}' is not supported with this value yet, and ignoring it would change the answer. Remove it.",
                param=name,
            )


def unknown_fields(fields: Mapping[str, msgspec.Raw], known: frozenset[str]) -> tuple[str, ...]:
    """Names of members that nothing reads, bounded in number and length for the log."""
    unknown = sorted(fields.keys() - known - REFUSED.keys() - HINTS)
    return tuple(name[:64] for name in unknown[:_MAX_NAMED])


def _is_harmless(value: object, harmless: tuple[object, ...]) -> bool:
    """Equality as JSON has it: `true` is not 1."""
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in harmless)


def _plain(name: str, raw: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadParameter(f"Invalid value for '{name}'.", param=name, reason="invalid_value") from error
