"""Differential privacy: the plan, its accounting, its ledger, and the private training loop."""
