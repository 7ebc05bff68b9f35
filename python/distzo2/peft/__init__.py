"""Adapters of the peft package, and which parameters are trained."""
