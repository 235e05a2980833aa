"""OpenAI chat messages ↔ the neutral Message: roles, text parts, tool calls and reasoning of earlier turns."""

from __future__ import annotations

import msgspec

from api.protocols.parameters import BadParameter
from scheduler.errors import UnsupportedOption
from scheduler.request import Message, Role, ToolCall

_ROLES: dict[str, Role] = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_OTHER_MODALITIES = frozenset(
    {"image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"}
)


class WirePart(msgspec.Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class WireFunction(msgspec.Struct):
    name: str
    arguments: str = ""


class WireToolCall(msgspec.Struct):
    id: str = ""
    type: str = "function"
    function: WireFunction | None = None


class WireMessage(msgspec.Struct):
    """One element of `messages`; members that nothing reads are ignored."""

    role: str
    content: str | list[WirePart] | None = None
    name: str | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: str | None = None
    function_call: WireFunction | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


def read_messages(messages: list[WireMessage]) -> tuple[Message, ...]:
    """All messages, neutral; raises BadParameter or UnsupportedOption with the path of the first bad one."""
    if not messages:
        raise BadParameter("Invalid 'messages': empty array.", param="messages", reason="empty_array")
    return tuple(_read_message(f"messages[{position}]", message) for position, message in enumerate(messages))


def _read_message(path: str, message: WireMessage) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        known = ", ".join(f"'{name}'" for name in _ROLES)
        raise BadParameter(
            f"Invalid value: '{message.role[:64]}'. Supported values are: {known}.",
            param=f"{path}.role",
            reason="invalid_value",
        )
    if role == "assistant":
        return _read_assistant(path, message)
    if message.role == "tool" and message.tool_call_id is None:
        raise _missing(f"{path}.tool_call_id")
    if message.content is None and message.role != "function":
        raise _missing(f"{path}.content")
    content = _read_content(f"{path}.content", message.content)
    return Message(role=role, content=content, name=message.name, tool_call_id=message.tool_call_id)


def _read_assistant(path: str, message: WireMessage) -> Message:
    calls = tuple(
        _read_call(f"{path}.tool_calls[{position}]", call) for position, call in enumerate(message.tool_calls or ())
    )
    if message.function_call is not None:
        calls += (ToolCall(id="", name=message.function_call.name, arguments=message.function_call.arguments),)
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if message.content is None and message.refusal is None and reasoning is None and not calls:
        raise _missing(f"{path}.content")
    content = _read_content(f"{path}.content", message.content) if message.content else message.refusal
    return Message(
        role="assistant",
        content="" if content is None else content,
        name=message.name,
        reasoning=reasoning,
        tool_calls=calls,
    )


def _read_call(path: str, call: WireToolCall) -> ToolCall:
    if call.type != "function":
        raise UnsupportedOption(f"Tool calls of type '{call.type[:64]}' are not supported.", param=f"{path}.type")
    if call.function is None:
        raise _missing(f"{path}.function")
    return ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)


def _read_content(path: str, content: str | list[WirePart] | None) -> str:
    if content is None or isinstance(content, str):
        return "" if content is None else content
    if not content:
        raise BadParameter(f"Invalid '{path}': empty array.", param=path, reason="empty_array")
    # Parts are joined as chat templates join them: without anything in between.
    return "".join(_read_part(f"{path}[{position}]", part) for position, part in enumerate(content))


def _read_part(path: str, part: WirePart) -> str:
    if part.type in _OTHER_MODALITIES:
        raise UnsupportedOption(f"The model reads text only; '{part.type}' parts are not supported.", param=path)
    text = {"text": part.text, "input_text": part.text, "output_text": part.text, "refusal": part.refusal}
    if part.type not in text:
        raise BadParameter(
            f"Invalid value: '{part.type[:64]}'. Supported values are: 'text' and 'refusal'.",
            param=f"{path}.type",
            reason="invalid_value",
        )
    value = text[part.type]
    if value is None:
        raise _missing(f"{path}.{'refusal' if part.type == 'refusal' else 'text'}")
    return value


def _missing(param: str) -> BadParameter:
    return BadParameter(f"Missing required parameter: '{param}'.", param=param, reason="missing_required_parameter")
