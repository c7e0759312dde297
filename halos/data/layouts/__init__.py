"""Layouts of feedback: which column plays which role, and what the values of a judgement mean."""
