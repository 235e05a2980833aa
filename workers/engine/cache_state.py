"""What mlx_lm's caches hold after some tokens, taken out and put back: plain keys and values apart from the rest.

A part is one cache of a layer (a CacheList has several). Plain parts are KVCache: position p in column p, so pages can
hold them. Of all others the state is taken whole: rotating windows, chunks, recurrent states. Engine thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from workers.engine.slot_cache import LayerShape

_STATEFUL = (RotatingKVCache, ArraysCache, ChunkedKVCache)


def parts_of(caches: Items[Any]) -> list[Any]:
    return [part for cache in caches for part in (parts_of(cache.caches) if type(cache) is CacheList else [cache])]


def can_be_kept(caches: Items[Any]) -> bool:
    """Whether every part, after it read something, is of a kind that is understood here."""
    return all(
        type(part) in _STATEFUL or (type(part) is KVCache and isinstance(part.keys, mx.array))
        for part in parts_of(caches)
    )


def plain_parts(caches: Items[Any]) -> list[KVCache]:
    return [part for part in parts_of(caches) if type(part) is KVCache]


def plain_shapes(caches: Items[Any]) -> tuple[LayerShape, ...]:
    """Of caches that have read something, what their plain parts keep per token."""
    shapes: list[LayerShape] = []
    for part in plain_parts(caches):
        keys, values = part.keys, part.values
        assert keys is not None and values is not None
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
    return tuple(shapes)


def plain_rows(caches: Items[Any]) -> list[mx.array]:
    """Keys and values [1, kv_heads, columns, head_dim] of the plain parts, alternating; columns behind are stale."""
    return [array for part in plain_parts(caches) for array in (part.keys, part.values) if array is not None]


def fill_plain(caches: Items[Any], rows: Items[mx.array], tokens: int) -> None:
    """Let the plain parts of fresh caches hold rows of so many tokens."""
    for part, keys, values in zip(plain_parts(caches), rows[::2], rows[1::2], strict=True):
        part.state = (keys, values, tokens)


def take_states(caches: Items[Any]) -> list[Any]:
    """The states of all parts that are not plain, safe from what the caches read afterwards."""
    return [_taken(part) for part in parts_of(caches) if type(part) is not KVCache]


def fill_states(caches: Items[Any], states: Items[Any]) -> None:
    """Let the other parts of fresh caches hold what `take_states` gave, which stays as it is."""
    others = [part for part in parts_of(caches) if type(part) is not KVCache]
    for part, state in zip(others, states, strict=True):
        part.state = _own(state)


def state_bytes(states: Items[Any]) -> int:
    return sum(array.nbytes for array in state_arrays(states))


def state_arrays(states: Any) -> list[mx.array]:
    if isinstance(states, mx.array):
        return [states]
    if isinstance(states, (list, tuple)):
        return [array for state in states for array in state_arrays(state)]
    return []


def _taken(part: Any) -> Any:
    match part:
        case RotatingKVCache(keys=mx.array() as keys, values=mx.array() as values):
            place = part.max_size if keys.shape[2] > part.max_size else part._idx
            window = (_window(part, keys), _window(part, values))
            return (*window, part.offset, part.keep, part.max_size, place)
        case ChunkedKVCache(keys=mx.array() as keys, values=mx.array() as values):
            end = part.offset - part.start_position
            held = (mx.contiguous(keys[:, :, :end]), mx.contiguous(values[:, :, :end]))
            return (*held, part.offset, part.chunk_size, part.start_position)
        case _:
            return _own(part.state, mx.contiguous)


def _window(part: RotatingKVCache, array: mx.array) -> mx.array:
    """Of what a long pass left, the newest that fill the window: the cache itself cuts the rest at its next step."""
    if array.shape[2] <= part.max_size:
        return mx.contiguous(array)
    newest = array[:, :, array.shape[2] - part.max_size + part.keep :]
    return mx.concatenate([array[:, :, : part.keep], newest], axis=2)


def _view(array: mx.array) -> mx.array:
    return array[...]


def _own(state: Any, as_own: Callable[[mx.array], mx.array] = _view) -> Any:
    """The same state in lists and array objects of its own: caches assign into theirs.

    `as_own` mx.contiguous: in buffers of its own too, as a view would keep the whole of what it was cut from.
    """
    if isinstance(state, mx.array):
        return as_own(state)
    if isinstance(state, list):
        return [_own(part, as_own) for part in state]
    if isinstance(state, tuple):
        return tuple(_own(part, as_own) for part in state)
    return state
