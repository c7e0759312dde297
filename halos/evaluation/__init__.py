"""Evaluation: samples, rewards on held-out feedback, KL, judges, labels, and the statistics that they rest on."""
