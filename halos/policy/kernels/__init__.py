"""Faster operations for the policy's layers."""
