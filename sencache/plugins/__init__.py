"""Samplers and pipelines of other people, one host a file: each says in its first lines how it is used."""
