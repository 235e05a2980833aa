"""The Lua scripts of scheduler/queue/lua, loaded once, and the one way to run them: EVALSHA with a fallback to EVAL.

A script is its fragments (shared Lua functions) followed by its own file; `$name` placeholders come from keys.py.
Every script is atomic, fenced where it must be, and safe to repeat after a lost reply.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from string import Template
from typing import Any, Final, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import MasterDownError, NoScriptError, OutOfMemoryError, ReadOnlyError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from scheduler.errors import QueueUnavailable
from scheduler.queue.endings import lua_ends
from scheduler.queue.keys import lua_names

_FOLDER = Path(__file__).parent / "lua"
Argument = str | bytes | int | float

# Plain commands are refused with a class of their own, or, inside a script, with the words in the middle.
_REFUSED = (OutOfMemoryError, ReadOnlyError, MasterDownError)
_REFUSAL = re.compile(r"command not allowed when used memory|\b(MISCONF|READONLY|NOREPLICAS|BUSY|MASTERDOWN)\b")
CALL_TIMEOUT_S = 10.0  # one call with all its retries


def _source(*names: str) -> str:
    *fragments, own = ((_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in names)
    if "settling" in names:
        own = f"local function run()\n{own}end\nlocal reply = run()\nsettle()\nreturn reply\n"
    return Template("\n".join([*fragments, own])).substitute(lua_names() | {"ends": lua_ends()})


class Script:
    """One Lua script: its own file last, fragments before it, `clock` first; with `settling` it settles at its end."""

    def __init__(self, name: str, *fragments: str) -> None:
        self.name = name
        self.text = _source("clock", *fragments, name)
        self.sha = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, redis: Redis, prefix: str, *args: Argument) -> Any:
        """Raw reply; raises QueueUnavailable where Redis cannot be reached or refuses."""
        return await available(self._call(redis, prefix, args), self.name)

    async def _call(self, redis: Redis, prefix: str, args: tuple[Argument, ...]) -> Any:
        execute = raw(redis)
        try:
            return await execute("EVALSHA", self.sha, 1, prefix, *args)
        except NoScriptError:
            return await execute("EVAL", self.text, 1, prefix, *args)


def raw(redis: Redis) -> Callable[..., Awaitable[Any]]:
    """`execute_command` with a type: arguments as they go out, the reply as redis-py parses it."""
    return cast(Callable[..., Awaitable[Any]], redis.execute_command)  # pyright: ignore[reportUnknownMemberType]


async def available(call: Awaitable[Any], what: str) -> Any:
    """Awaits a Redis call within CALL_TIMEOUT_S; every reason why Redis did not do it becomes QueueUnavailable."""
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return await call
    except (RedisConnectionError, RedisTimeoutError, TimeoutError) as error:
        raise QueueUnavailable(f"Redis did not answer ({what}): {error or type(error).__name__}") from error
    except ResponseError as error:
        if not (isinstance(error, _REFUSED) or _REFUSAL.search(str(error))):
            raise
        raise QueueUnavailable(f"Redis refuses to write ({what}): {error}", retry_after_s=5) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether Redis refused for maxmemory; in a script's error these words stand in the middle."""
    return isinstance(error, ResponseError) and "command not allowed when used memory" in str(error)


_READY = ("settling", "ready")
_ENDING = (*_READY, "ending")
_REAPING = (*_ENDING, "reaping")
ENQUEUE: Final = Script("enqueue", *_READY)
CLAIM: Final = Script("claim", *_READY, "peeking", "starting", "choosing", "preempting")
EMIT: Final = Script("emit")
FINISH: Final = Script("finish", *_ENDING)
SWEEP: Final = Script("sweep", *_REAPING)
REPRIORITISE: Final = Script("reprioritise", *_READY)
HOLD_UP: Final = Script("hold_up", *_READY)
REPLAY: Final = Script("replay", *_ENDING)
DISCARD: Final = Script("discard", *_ENDING)
LIST_JOBS: Final = Script("list_jobs", *_READY)
QUEUES: Final = Script("queues", *_READY)
RELEASE: Final = Script("release", *_READY)
CANCEL: Final = Script("cancel", *_ENDING)
HAND_BACK: Final = Script("hand_back", *_ENDING)
EXPIRE_WORKER: Final = Script("expire_worker", *_REAPING)
RETIRE_WORKER: Final = Script("retire_worker", *_REAPING)
PUBLISH: Final = Script("publish")
READ_REGISTRY: Final = Script("read_registry")
