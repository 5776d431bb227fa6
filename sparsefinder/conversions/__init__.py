"""Conversions of short-input checkpoints into models for long inputs, each with a certificate."""
