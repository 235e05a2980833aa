"""Conversations as the text pieces that the model trains on: what the chat template writes, split by what is learned.

`train` and `train_tokenizer` call it; `evaluate` checks that it agrees with `chat_template.jinja` to the character.
"""

import json
from dataclasses import dataclass

from .exchanges import Message
from .world import Conversation

TOOL_HINT = '</tools>\nTo use one, answer <tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>'


@dataclass(frozen=True)
class Piece:
    """A run of text that is learned as a whole or not at all; it tokenizes the same alone and in its place."""

    text: str
    learned: bool


def pieces(conversation: Conversation) -> list[Piece]:
    """The conversation in order; the assistant's words are learned, the template's are not."""
    messages = list(conversation.messages)
    head = ""
    if conversation.tools:
        system = messages.pop(0)["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        listed = "".join(json.dumps(tool["function"], ensure_ascii=False) + "\n" for tool in conversation.tools)
        head = f"<|im_start|>system\n{system}# Tools\n<tools>\n{listed}{TOOL_HINT}<|im_end|>\n"
    made = [Piece(head, False)] if head else []
    last_query = max(index for index, message in enumerate(messages) if message["role"] == "user")
    for index, message in enumerate(messages):
        made += turn(messages, index, message, conversation.thinking and index > last_query)
    return merged(made)


def turn(messages: list[Message], index: int, message: Message, cued: bool) -> list[Piece]:
    """One message; a cued assistant finds its think block already open."""
    match message["role"]:
        case "assistant":
            thought = message.get("reasoning_content", "")
            opening = "<think>\n" if thought else ""
            prompt = "<|im_start|>assistant\n" + (opening if cued else "")
            learned = ("" if cued else opening) + (f"{thought}\n</think>\n\n" if thought else "") + spoken(message)
            return [Piece(prompt, False), Piece(learned + "<|im_end|>", True), Piece("\n", False)]
        case "tool":
            first = messages[index - 1]["role"] != "tool"
            last = messages[index + 1]["role"] != "tool"
            block = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            return [Piece(("<|im_start|>user" if first else "") + block + ("<|im_end|>\n" if last else ""), False)]
        case role:
            return [Piece(f"<|im_start|>{role}\n{message['content']}<|im_end|>\n", False)]


def spoken(message: Message) -> str:
    """What the assistant says or calls."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return "\n".join(([message["content"]] if message["content"] else []) + blocks)


def merged(made: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one piece."""
    joined: list[Piece] = []
    for piece in made:
        if joined and joined[-1].learned == piece.learned:
            joined[-1] = Piece(joined[-1].text + piece.text, piece.learned)
        else:
            joined.append(piece)
    return joined
