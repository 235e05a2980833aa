"""The interactive part of `spillway chat`: a prompt with history, slash commands, answers as they come."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.text import Text

from api.cli.api_client import ApiClient
from api.cli.chat import Conversation, Piece, answer_pieces
from api.cli.plain_text import printable
from scheduler.errors import SpillwayError
from scheduler.settings import Settings

HELP = """\
  /clear         forget the conversation
  /system TEXT   what the model is told first; without TEXT, nothing any more
  /model NAME    go on with another model; without NAME, show what is served
  /help          this
  Alt-Enter      a new line in your message
  Ctrl-C         cancel the answer, or the line
  Ctrl-D         leave"""


class ChatLoop:
    """One conversation. Ctrl-C during an answer closes its connection, and the service cancels the job."""

    def __init__(self, settings: Settings, client: ApiClient, conversation: Conversation) -> None:
        self._client = client
        self._talk = conversation
        self._console = Console(highlight=False)
        self._ask = _prompt(settings.home)

    def run(self) -> None:
        """Talk until Ctrl-D; raises SpillwayError where nothing answers at the start."""
        names = self._served()
        model = names[0] if self._talk.model == "default" and names else self._talk.model
        self._console.print(Text.assemble((model, "bold"), (f" at {self._client.url}   /help · Ctrl-D leaves", "dim")))
        while (line := self._read()) is not None:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._exchange(line)

    def _served(self) -> list[str]:
        return [str(model["id"]) for model in self._client.get("/v1/models")["data"]]

    def _read(self) -> str | None:
        try:
            return self._ask().strip()
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/clear":
                self._talk.turns.clear()
                self._note("The conversation is forgotten.")
            case "/system":
                self._talk.system = value or None
                self._note("The model is told that first." if value else "The model is told nothing first.")
            case "/model":
                self._switch_model(value)
            case "/help":
                self._note(HELP)
            case _:
                self._note(f"{name} is no command; /help shows them.")

    def _switch_model(self, name: str) -> None:
        try:
            served = self._served()
        except SpillwayError as error:
            self._complain(error)
            return
        if name not in {"default", *served}:
            self._note(f"Served: {', '.join(served)}" + (f"; {name} is not." if name else "."))
            return
        self._talk.model = name
        self._note(f"Going on with {name}.")

    def _exchange(self, line: str) -> None:
        self._talk.turns.append({"role": "user", "content": line})
        said: list[str] = []
        try:
            with contextlib.closing(answer_pieces(self._client, self._talk)) as pieces:
                for piece in pieces:
                    self._show(piece)
                    if piece.kind == "answer":
                        said.append(piece.text)
            self._console.print()
        except KeyboardInterrupt:
            self._note(" (cancelled)")
        except SpillwayError as error:
            self._complain(error)
        if said:
            self._talk.turns.append({"role": "assistant", "content": "".join(said)})
        else:
            self._talk.turns.pop()

    def _show(self, piece: Piece) -> None:
        match piece.kind:
            case "answer":
                shown = Text(printable(piece.text))
            case "thought":
                shown = Text(printable(piece.text), "dim italic")
            case "cut":
                shown = Text(" (cut off: the answer reached its token limit)", "dim")
        self._console.print(shown, end="", soft_wrap=True)
        sys.stdout.flush()

    def _note(self, text: str) -> None:
        self._console.print(Text(text, "dim"), soft_wrap=True)

    def _complain(self, error: SpillwayError) -> None:
        self._console.print(Text(printable(error.message), "red"), soft_wrap=True)


def _prompt(home: Path) -> Callable[[], str]:
    """Asks for one message; Enter sends, Alt-Enter starts a new line, a pasted text may have many."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import ANSI
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept = home / "chat_history"
    history: History = InMemoryHistory()
    if home.is_dir():
        kept.touch(mode=0o600)
        history = FileHistory(str(kept))
    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys)
    return lambda: session.prompt(ANSI("\n\x1b[1;36m›\x1b[0m "), prompt_continuation="  ")
