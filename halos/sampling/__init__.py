"""Generating replies and writing them down."""
