"""The events that webhooks tell of, by their names on the wire."""

from __future__ import annotations

JOB_EVENTS = ("job.succeeded", "job.failed", "job.cancelled", "job.expired")
BATCH_EVENTS = ("batch.completed", "batch.failed", "batch.expired", "batch.cancelled")
EVENT_TYPES = frozenset((*JOB_EVENTS, *BATCH_EVENTS))
TEST_EVENT = "webhook.test"
