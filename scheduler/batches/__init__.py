"""Batches on their way: reading the input file, running its lines as durable jobs, writing the files of results."""
