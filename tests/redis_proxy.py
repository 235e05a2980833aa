"""A TCP proxy before a Redis on a unix socket that loses replies, cuts and freezes connections, for fault tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote


class RedisProxy:
    """`url` is what clients connect to. Executed commands whose reply is lost count in `lost`."""

    def __init__(self, redis_url: str) -> None:
        self._path = unquote(redis_url.removeprefix("unix://"))
        self._open: set[asyncio.StreamWriter] = set()
        self._losing = False
        self._whole = asyncio.Event()
        self._whole.set()
        self.lost = 0
        self.url = ""

    def lose_next_reply(self) -> None:
        """The next command is executed by Redis; its reply never arrives, the connection breaks."""
        self._losing = True

    def partition(self) -> None:
        """From now on nothing passes, and nobody is told; what is on its way arrives after `heal`."""
        self._whole.clear()

    def heal(self) -> None:
        self._whole.set()

    def cut(self) -> None:
        """Breaks all connections of now."""
        for writer in list(self._open):
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._whole.wait()
        try:
            up_reader, up_writer = await asyncio.open_unix_connection(self._path)
        except OSError:  # the server is down: so is this connection
            writer.close()
            return
        self._open |= {writer, up_writer}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, up_writer))
                group.create_task(self._answer(up_reader, writer, up_writer))
        finally:
            for end in (writer, up_writer):
                self._open.discard(end)
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._whole.wait()
                up.write(data)
                await up.drain()
        up.close()

    async def _answer(
        self, up: asyncio.StreamReader, down: asyncio.StreamWriter, up_writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await up.read(65536):
                await self._whole.wait()
                if self._losing:
                    self._losing = False
                    self.lost += 1
                    up_writer.close()
                    break
                down.write(data)
                await down.drain()
        down.close()


@asynccontextmanager
async def redis_proxy(redis_url: str) -> AsyncIterator[RedisProxy]:
    proxy = RedisProxy(redis_url)
    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(proxy.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.heal()
        proxy.cut()
        await asyncio.gather(*tasks, return_exceptions=True)
