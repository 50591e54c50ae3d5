"""Samplers of other people, in which a field is cached where it is called."""
