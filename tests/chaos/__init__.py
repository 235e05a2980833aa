"""The chaos run: producers, workers of both kinds and two APIs under seeded faults, then a reckoning of every job.

`python -m tests.chaos --seconds 60 --seed 7`, or `make chaos ARGS="--seconds 600 --seed 7"`.
"""
