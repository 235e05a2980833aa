"""Renders a conversation with the model's own chat template and tokenizes it. Pure host work, on the reader thread."""

from __future__ import annotations

import json
from typing import Any, Protocol

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper

from scheduler.errors import ContextLengthExceeded, InvalidRequest
from scheduler.request import InferenceRequest, Message, ToolCall

# What apply_chat_template itself takes; a request may set the template's variables, not these.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
# A text longer than this many characters per token of context is measured by its beginning first.
_GENEROUS_CHARS_PER_TOKEN = 16
_BORDER_TOKENS = 64


class PromptModel(Protocol):
    """What of a LoadedModel the encoding of a prompt needs."""

    @property
    def tokenizer(self) -> TokenizerWrapper: ...

    @property
    def context_tokens(self) -> int: ...


def encode_prompt(model: PromptModel, request: InferenceRequest) -> list[int]:
    """Token ids of the request's prompt, ready for the answer's first token.

    Raises InvalidRequest where the template refuses the messages, ContextLengthExceeded where the prompt leaves no
    room for a single token. A `max_tokens` beyond the room that remains is no error: the engine ends the answer at the
    context's end with finish_reason `length`, as OpenAI's API does.
    """
    text = render(model.tokenizer, request)
    ids = _encode(model, text)
    if not ids:
        raise InvalidRequest("The messages render to an empty prompt. Send some text.", param="messages")
    if len(ids) >= model.context_tokens:
        raise _too_long(model.context_tokens, str(len(ids)))
    return ids


def render(tokenizer: TokenizerWrapper, request: InferenceRequest) -> str:
    """The prompt as text. Raises InvalidRequest with the template's own reason."""
    reserved = sorted(_RESERVED & request.template_kwargs.keys())
    if reserved:
        raise InvalidRequest(f"{reserved[0]!r} cannot be set for the chat template.", param="chat_template_kwargs")
    if not tokenizer.has_chat_template:
        raise InvalidRequest(f"The model {request.model!r} has no chat template; it cannot chat.", param="model")
    messages = [_as_template_message(message) for message in request.messages]
    try:
        return _apply(tokenizer, messages, request.template_kwargs)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error).strip() or type(error).__name__
        raise InvalidRequest(f"The model's chat template refuses these messages: {reason}", param="messages") from error


def _apply(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    """Past mlx_lm's wrapper unless it renders by itself: it switches thinking on for every model that can think."""
    renders_itself = getattr(tokenizer, "_chat_template", None) is not None
    renderer: Any = tokenizer if renders_itself else hf_tokenizer(tokenizer)
    return renderer.apply_chat_template(messages, **variables, tokenize=False, add_generation_prompt=True)


def hf_tokenizer(tokenizer: TokenizerWrapper) -> Any:
    """The Hugging Face tokenizer inside mlx_lm's wrapper."""
    return tokenizer._tokenizer  # the wrapper has no public name for it


def _as_template_message(message: Message) -> dict[str, Any]:
    """The dict form that chat templates are written for (transformers, "Chat templates")."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name is not None:
        fields["name"] = message.name
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_as_template_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _as_template_call(call: ToolCall) -> dict[str, Any]:
    """Templates want the arguments as an object; text that is no JSON object goes in as the model wrote it."""
    try:
        arguments: Any = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    if not isinstance(arguments, dict):
        arguments = call.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _encode(model: PromptModel, text: str) -> list[int]:
    """Ids of the rendered text; a text far beyond the context is refused by its beginning, without reading it all."""
    plain = hf_tokenizer(model.tokenizer)
    generous = model.context_tokens * _GENEROUS_CHARS_PER_TOKEN
    if len(text) > generous:
        beginning: list[int] = plain.encode(text[:generous], add_special_tokens=False)
        if len(beginning) >= model.context_tokens + _BORDER_TOKENS:
            estimate = len(beginning) * len(text) // generous
            raise _too_long(model.context_tokens, f"about {estimate}")
    return plain.encode(text, add_special_tokens=False)


def _too_long(context_tokens: int, prompt_tokens: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context_tokens} tokens. However, your messages resulted in "
        f"{prompt_tokens} tokens. Please reduce the length of the messages.",
        param="messages",
    )
