"""Prefect flows that schedule the stages on workers."""
