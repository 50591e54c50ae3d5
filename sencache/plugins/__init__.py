"""Samplers of other people, one file a host: each offers `wrap(model, profile, grid, method=..., **options)`."""
