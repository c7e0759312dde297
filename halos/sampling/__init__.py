"""Samples replies from a policy, scores them, and writes them to files."""
