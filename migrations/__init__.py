"""Alembic migrations of the SQL tables in scheduler/db/models.py; scheduler/db/schema.py runs them at start."""

VERSION_TABLE = "spillway_revision"
