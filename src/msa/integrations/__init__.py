"""Retrievers of other frameworks over a bank, in this process or served elsewhere."""
