"""Every Redis key name and every TTL of the queue, the only place that knows either.

All keys of a shard share the hash tag `{shard}`, hence one slot: a script may touch any of them. The Lua files
write `$job .. id`, `$idem_ttl` and so on; `lua_names` is what those placeholders become.

A key has a TTL, or it is one of SINGLETONS, each with the reason why it may stay.
"""

from __future__ import annotations

import functools
import hashlib
from urllib.parse import quote, unquote

GROUP = "workers"  # consumer group of every ready stream
RECORDER_GROUP = "recorder"  # consumer group of the `done` stream

# TTLs in ms.
SLACK_MS = 24 * 3600 * 1000  # what live keys get on top of the longest time that a job may wait
IDEMPOTENCY_MS = 24 * 3600 * 1000
DEAD_MS = 24 * 3600 * 1000  # hash and body of a dead letter, so that it can be replayed
DURABLE_KEEP_MS = 24 * 3600 * 1000  # hash and log of an ended job with a SQL row, until the recorder has it
COUNTER_MS = 3600 * 1000  # virtual-token counters and class passes of an idle pool
RATE_MS = 600 * 1000
SOLO_HOLD_MS = 30 * 1000  # how long a worker may empty itself for a job that must run alone
FULL_MS = 12 * 1000  # a full worker says again that it listens, at least this often
GATE_MS = 5 * 1000  # memory gate, written by every sweep
WORKER_MS = 10 * 1000  # fleet registry: a worker that was not published for this long is gone
CARD_MS = 60 * 1000  # fleet registry: how long a pool is still offered after its last worker

DONE_MAXLEN = 100_000
DEAD_MAXLEN = 10_000

_PREFIXES = {
    "job": "j:",  # hash: the job
    "body": "b:",  # string: the encoded request
    "log": "ev:",  # stream: the job's events, ids `<attempt>-<seq>`
    "channel": "c:",  # pub/sub: the same events, live
    "queue": "q:",  # stream <pool>:<class>:<tenant> or <pool>:<lane>:-: ready jobs
    "active": "act:",  # zset <pool>:<class>: tenants with ready jobs, by virtual tokens
    "counters": "vt:",  # zset <pool>:<class>: virtual tokens of tenants without ready jobs
    "passes": "pass:",  # hash <pool>: stride passes of the classes
    "rate": "rate:",  # hash <pool>: decayed count of claims per class, for Retry-After
    "urgent": "urg:",  # zset <pool>: queued jobs with a deadline of their own (not batch), by deadline
    "bell": "bell:",  # zset <pool>: wakes exactly one idle worker
    "alarm": "alarm:",  # zset <pool>: the bell of full workers that could give up batch work
    "full": "full:",  # string <pool>: such a worker listens to it
    "hold": "hold:",  # string <pool>: the worker that empties itself for a solo job
    "own": "own:",  # hash <worker>: job id → attempt that it owns
    "cancels": "cx:",  # set <worker>: its jobs that somebody cancelled
    "lastclaim": "cl:",  # string <worker>: nonce and ids of its last claim, for a repeated one
    "touched": "cons:",  # set <worker>: ready streams in which it is a consumer
    "idem": "idem:",  # string <tenant>:<hash of the key>: job id and digest
    "worker": "w:",  # string <worker>: fleet registry entry
    "card": "card:",  # string <pool>: model card
}
_SINGLETON_NAMES = {
    "lease": "lease",
    "due": "due",
    "deadlines": "dl",
    "scheduled": "scheduled",
    "depth": "depth",
    "paused": "paused",
    "epoch": "epoch",
    "live": "live",
    "count": "count",
    "sweep": "sweep",
    "gate": "gate",
    "done": "done",
    "dead": "dead",
    "fleet": "fleet",
    "pools": "pools",
    "cron": "cron",
}

SINGLETONS = {
    "lease": "zset worker → lease expiry; the sweep removes expired members",
    "due": "zset of scheduled jobs; promotion and every terminal move remove the member",
    "dl": "zset of queue TTLs and deadlines; every terminal move removes the member",
    "scheduled": "hash: how many of `due` per pool and class; a field is removed at 0",
    "paused": "hash of what an operator holds up: pool and class, pool and `*`, pool and `drain`; resuming removes it",
    "epoch": "counter of failovers: attempts start above 1000 times it",
    "depth": "hash of waiting jobs per pool and class; a field is removed at 0",
    "live": "zset of jobs that are not terminal, by the time in their ids; every terminal move removes the member",
    "count": "hash of a few fixed counters: accepted, and one per terminal state",
    "sweep": "hash of the sweep's own clock and the server's replication id: two fields",
    "done": f"stream of outcomes for the SQL recorder; acknowledged entries are deleted, MAXLEN ~ {DONE_MAXLEN}",
    "dead": f"stream of dead letters, MAXLEN ~ {DEAD_MAXLEN}",
    "fleet": "set of worker ids; reading the registry removes those whose entry expired",
    "pools": "set of pool names; reading the registry removes those whose card expired",
    "cron": "zset of arq's pending control jobs; arq removes each when it ends, and its other keys have TTLs",
}


class Keys:
    """Names of one shard's keys. Pools and tenants come quoted (see `quoted`) or plain: quoting is idempotent here."""

    def __init__(self, shard: str) -> None:
        self.prefix = f"sw:{{{shard}}}:"

    def of(self, kind: str, *parts: str) -> str:
        """The key of a kind (a name of this module's tables): `of("job", job_id)`, `of("lease")`."""
        if kind in _SINGLETON_NAMES:
            return self.prefix + _SINGLETON_NAMES[kind]
        return self.prefix + _PREFIXES[kind] + ":".join(parts)

    def job(self, job_id: str) -> str:
        return self.of("job", job_id)

    def log(self, job_id: str) -> str:
        return self.of("log", job_id)

    def channel(self, job_id: str) -> str:
        return self.of("channel", job_id)

    def bell(self, pool: str) -> str:
        return self.of("bell", quoted(pool))

    def is_singleton(self, key: str) -> bool:
        """Whether this key may stay without a TTL."""
        return key.startswith(self.prefix) and key.removeprefix(self.prefix) in SINGLETONS


@functools.lru_cache(4096)
def quoted(name: str) -> str:
    """A pool's or tenant's name as a part of a key: no `:`, `|`, `{`, `}`, no space."""
    return quote(name, safe="/@+~")


@functools.lru_cache(4096)
def unquoted(part: str) -> str:
    return unquote(part)


def idempotency_part(tenant: str, key: str) -> str:
    """Key part for one tenant's Idempotency-Key; hashed, so that its length and content are ours."""
    return f"{quoted(tenant)}:{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def lua_names() -> dict[str, str]:
    """What the `$name` placeholders of the Lua files stand for; `P` is the shard's prefix inside a script."""
    names = {name: f"P .. '{part}'" for name, part in (_PREFIXES | _SINGLETON_NAMES).items()}
    numbers = {
        "slack_ms": SLACK_MS,
        "idem_ms": IDEMPOTENCY_MS,
        "dead_ms": DEAD_MS,
        "durable_keep_ms": DURABLE_KEEP_MS,
        "counter_ms": COUNTER_MS,
        "rate_ms": RATE_MS,
        "solo_hold_ms": SOLO_HOLD_MS,
        "gate_ms": GATE_MS,
        "worker_ms": WORKER_MS,
        "card_ms": CARD_MS,
        "done_maxlen": DONE_MAXLEN,
        "dead_maxlen": DEAD_MAXLEN,
    }
    words = {"group": f"'{GROUP}'"}
    return names | {name: f"'{value}'" for name, value in numbers.items()} | words  # Redis is told words faster
